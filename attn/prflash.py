"""PrFlashAttention (Li, 2024) arXiv:2410.18441: which blocks are read is a matter of
chance, and near ones have more of it.

Of a block of queries and a block of keys that is t blocks behind, the pair is read with
probability p(t), p(0) = 1, drawn anew for each pass of a layer; a call without a key
reads the most probable ones. The formulas were not to be had: all below stays within
what the abstract says and is proposed here, not published.

    p(t) = min(1, a / (t + 1)^s),  or r^t,  or a table
"""

from __future__ import annotations

import dataclasses
import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.masks import Causal, Mask, Reach
from attn.parallel.query_blocks import over_rows
from attn.softmax import Softmax
from attn.sparse import chosen_blocks
from attn.sparse.block_grid import grid
from pallas_kernels.logits import LogitSpec, Where

FAMILIES, DRAWS = ("harmonic", "geometric", "table"), ("bernoulli", "fixed")


@dataclasses.dataclass(frozen=True)
class BlocksBack(Mask):
    """A query's block of `block` tokens sees the blocks that are so many behind it:
    `distances`, in order, from 0."""

    block: int
    distances: tuple[int, ...]

    def __call__(self, h, i, j):
        far = i // self.block - j // self.block
        if self.distances == tuple(range(len(self.distances))):
            return (far < len(self.distances)) & (far >= 0)
        seen = far == self.distances[0]
        for t in self.distances[1:]:
            seen = seen | (far == t)
        return seen

    def bounds(self, i, j):
        least, most = (a // self.block - b // self.block
                       for a, b in ((i[0], j[1]), (i[1], j[0])))
        some = (least <= self.distances[-1]) & (most >= 0)
        whole = self.distances == tuple(range(len(self.distances)))
        every = (most < len(self.distances)) & (least >= 0)
        return some, every if whole else every & (most != most)

    def reach(self):
        return Reach((self.distances[-1] + 1) * self.block - 1, 0)


@dataclasses.dataclass(frozen=True)
class PrFlash(Softmax):
    """PrFlashAttention (Li, 2024) arXiv:2410.18441: blocks drawn by their distance.

    family: of p(t), "harmonic" with `factor` a and `power` s, "geometric" with `ratio`
    r, or "table", p(0), p(1), ... and 0 behind it. budget: the share of the causal
    block pairs that is read in the mean, for which a is then found by bisection.
    draw: "bernoulli", every pair by itself, with -log p(t) added to the logits of what
    is read if `rescale`, so that the sums of the softmax are right in the mean; or
    "fixed", exactly `blocks` c a row, without replacement in proportion to p (Gumbel
    top-c). by_head: heads draw for themselves; rows of the batch share a draw.

    Draws are made where a call has a `key` (or is given its numbers as `draws`);
    without one, and in a stream, the c most probable distances are read: for p that
    falls with t, the last ones. c < 1 block is no attention: the own block is always
    read. capacity: blocks that a drawn row has room for; of more the furthest are
    dropped. None has room for all, and so takes time T^2 whatever is drawn. The other
    fields are those of `Softmax`; the mask stays causal.
    """

    block: int = 64
    blocks: int = 8
    family: str = "harmonic"
    factor: float = 1.0
    power: float = 1.0
    ratio: float = 0.8
    table: tuple[float, ...] = ()
    budget: float | None = None
    draw: str = "bernoulli"
    by_head: bool = False
    rescale: bool = False
    capacity: int | None = None
    row = TemplateRow(MASKED, "c b L D for c blocks", 1)

    def __post_init__(self):
        check_fields(
            self, least={"block": 1, "blocks": 1, "capacity": 1, "factor": 0},
            above={"power": 0, "ratio": 0, "budget": 0},
            choices={"family": FAMILIES, "draw": DRAWS})
        if self.family == "table" and (
                not self.table or not all(0 <= p <= 1 for p in self.table)):
            raise ValueError(
                f"PrFlash: table={self.table}: expected probabilities p(0), p(1), ...")
        super().__post_init__()
        if not self.visible.causal:
            raise ValueError(f"PrFlash: mask={self.mask}: expected a causal one")
        for name, most in (("ratio", 1), ("budget", 1)):
            if (value := getattr(self, name)) is not None and value > most:
                raise ValueError(f"PrFlash: {name}={value}: expected at most {most}")
        if self.budget is not None and self.family != "harmonic":
            raise ValueError(
                f"PrFlash: budget={self.budget} of family={self.family!r}: expected "
                "'harmonic', whose factor it finds")
        if self.rescale and self.draw == "fixed":
            raise ValueError(
                "PrFlash: rescale=True of draw='fixed': expected 'bernoulli', whose "
                "probabilities are known")

    @property
    def visible(self) -> Mask:
        """What is seen without a draw: the most probable distances."""
        mask = super().visible
        return mask & BlocksBack(self.block, self.distances)

    @property
    def distances(self) -> tuple[int, ...]:
        """The c most probable distances, the nearer of equals; 0 among them."""
        if self.family != "table":
            return tuple(range(self.blocks))
        p = self.probabilities(len(self.table))
        best = [t for t in np.argsort(-p, kind="stable")[:self.blocks] if p[t] > 0]
        return tuple(sorted(int(t) for t in best))

    def probabilities(self, n: int) -> np.ndarray:
        """p(t) of t = 0 ... n-1 for a row of n blocks, float64."""
        t = np.arange(n)
        if self.family == "table":
            p = np.zeros(n)
            p[:len(self.table)] = self.table[:n]
        elif self.family == "geometric":
            p = self.ratio ** t.astype(float)
        else:
            factor = self.factor if self.budget is None else self._factor(n)
            # p(t) = min(1, a / (t + 1)^s)
            p = np.minimum(1, factor / (t + 1.0) ** self.power)
        # the own block is always read
        p[0] = 1
        return p

    def _factor(self, n: int) -> float:
        """The a for which `budget` of n(n+1)/2 pairs are read in the mean; 0 if the
        diagonal is more already."""
        t = np.arange(1, n)

        def read(a):
            # n - t pairs of blocks are t blocks apart
            return n + ((n - t) * np.minimum(1, a / (t + 1.0) ** self.power)).sum()

        low, high = 0.0, float(n) ** self.power
        want = (self.budget or 1) * n * (n + 1) / 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if read(middle) < want else (low, middle)
        return 0.0 if read(0.0) >= want else high

    def __call__(self, q, k, v, *, x=None, segments=None, key=None, draws=None, **more):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V].

        key: a PRNG key for a draw; draws [n,n] or [H,n,n]: its uniform numbers, of n
        blocks. The other arguments of `Softmax` go with neither.
        """
        if key is None and draws is None:
            return super().__call__(q, k, v, x=x, segments=segments, **more)
        if more or self.softcap is not None or self.score is not None or self.dropout:
            raise NotImplementedError(
                f"a draw with {sorted(more) or 'softcap, score or dropout'}: chosen "
                "blocks have logits without")
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, *q.shape[:2])
        on = grid(now.pos, now.segment, self.block, packed=segments is not None)
        chosen, bias = self._drawn(on, q.shape[2], key, draws)  # [B|1,N,H,c]
        number = jnp.arange(on.pos.shape[1], dtype=jnp.int32)[None]
        told = on.pos, on.segment, number
        o = over_rows(
            self._of_rows, self.axis, on.put(q), told, (chosen, bias), on.put(k),
            on.put(v), (on.pos, on.segment))
        return on.poison(on.take(o, q.shape[1]))

    def _of_rows(self, q, rows, heads, k, v, columns, head):
        (chosen, bias), flat = heads, lambda a: a.reshape(a.shape[0], -1)
        b, n, size, h, _ = q.shape
        where = Where(
            flat(rows[0]), flat(columns[0]), flat(rows[1]), flat(columns[1]), head)
        every = lambda a: jnp.moveaxis(
            jnp.broadcast_to(a, (b, *a.shape[1:])), 1, 2)  # [B,H,N,c]
        o, _ = chosen_blocks.attend(
            q.reshape(b, n * size, h, -1), k, v, every(chosen),
            LogitSpec(self.mask or Causal(), self.scale), where, block=self.block,
            bias=every(bias) if self.rescale else None,
            implementation=self.implementation)
        return o.reshape(b, n, size, h, -1)

    def _drawn(self, on, h: int, key, draws) -> tuple[jax.Array, jax.Array]:
        """The drawn blocks of each row [B|1,N,H,c], -1 for none, and -log p of each."""
        n = on.pos.shape[1]
        p = jnp.asarray(self.probabilities(n), jnp.float32)
        first = on.first_block(on.owner)  # [B|1,N]
        heads = h if self.by_head else 1
        fixed = self.draw == "fixed"
        most = self.blocks if fixed else self.capacity or n
        columns = jnp.arange(n, dtype=jnp.int32)

        def row(args):
            number, first, u = args
            if u is None:
                u = jax.random.uniform(
                    jax.random.fold_in(key, number), (heads, n), jnp.float32)
            # how far each block is behind the row's own [n]
            far = number - columns
            here = jnp.where(far >= 0, p[jnp.maximum(far, 0)], 0)  # [n]
            some = (here > 0)[None] & (columns[None] >= first[:, None])  # [B,n]
            own = far == 0
            if fixed:
                # log p plus a Gumbel number: the largest are a draw in proportion to p
                noise = -jnp.log(-jnp.log(jnp.maximum(u, 1e-20)))
                importance = jnp.log(jnp.where(here > 0, here, 1))[None] + noise
            else:
                # where there is no room for all the nearest stay
                near = -jnp.abs(far).astype(jnp.float32)[None]
                importance = jnp.broadcast_to(near, u.shape)
                some = some[:, None] & ((u < here[None]) | own[None])[None]
            some = some if some.ndim == 3 else some[:, None]
            importance = jnp.where(own[None], jnp.inf, importance)
            importance = jnp.where(some, importance[None], -jnp.inf)  # [B,heads,n]
            top, at = jax.lax.top_k(importance, min(most, n))
            return jnp.where(top > -jnp.inf, at, -1), jnp.log(
                jnp.where(top > -jnp.inf, here[at], 1))

        if draws is not None:
            draws = draws[None] if draws.ndim == 2 else draws
            if draws.shape != (heads, n, n):
                raise ValueError(
                    f"draws has shape {draws.shape}: expected {(heads, n, n)}")
            draws = jnp.moveaxis(draws, 1, 0)  # [n,H,n]
        found, log = jax.lax.map(row, (columns, jnp.moveaxis(first, 1, 0), draws))
        shape = lambda a: jnp.broadcast_to(
            jnp.moveaxis(a, 0, 1), (first.shape[0], n, h, min(most, n)))
        return shape(found), -shape(log)

    def share(self, length: int) -> float:
        """The share of the causal block pairs of `length` tokens that a draw reads in
        the mean, room for all provided."""
        n = -(-length // self.block)
        if self.draw == "fixed":
            read = np.minimum(np.arange(1, n + 1), self.blocks).sum()
        else:
            read = ((n - np.arange(n)) * self.probabilities(n)).sum()
        return float(read / (n * (n + 1) / 2))
