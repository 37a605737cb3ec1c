"""FlexPrefill (Lai et al., 2025) arXiv:2502.20766: each head finds its own pattern.

While a prompt is read, its last queries tell for each head which blocks of keys matter.
Where the mean of the keys of a block predicts what they see (the square root of the
Jensen-Shannon divergence is below tau) the head is query-aware: it takes the best pairs
of pooled blocks. Otherwise it takes columns that all look at and diagonals at which all
look. How many is up to the data: what holds a share gamma of the weights.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.shapes import check
from attn.exact.dense import logits
from attn.masks import Causal
from attn.parallel.query_blocks import over_rows
from attn.parallel.sharding import Axis, devices_of
from attn.softmax import Softmax
from attn.sparse import block_scores as scores
from attn.sparse import chosen_blocks
from pallas_kernels.logits import LogitSpec, Where


class Pattern(NamedTuple):
    """What the last queries of a prompt of n blocks say, float32: vertical, slash
    [B,H,S], the mean weight of each column and of the diagonal that ends there in the
    last row; divergence [B,H], the square root; query_aware [B,H] bool; columns,
    diagonals [B,H]: tokens that hold gamma; active [B,H,n,n] bool; importance
    [B,H,n,n]: in which order a row drops what it has no room for."""

    vertical: jax.Array
    slash: jax.Array
    divergence: jax.Array
    query_aware: jax.Array
    columns: jax.Array
    diagonals: jax.Array
    active: jax.Array
    importance: jax.Array


class Share(NamedTuple):
    """Of each head [B,H], float32: active, the share of the causal block pairs that the
    data asked for; read, what is read; capped, rows that had room for fewer."""

    active: jax.Array
    read: jax.Array
    capped: jax.Array


@dataclasses.dataclass(frozen=True)
class FlexPrefill(Attention):
    """FlexPrefill (Lai et al., 2025) arXiv:2502.20766: a sparse pattern for each head.

    block: tokens of a block, of queries and keys; gamma: the share of the weights that
    is asked for (above 1: all); tau: up to which divergence a head is query-aware, 0
    for none; min_budget, max_budget: tokens of columns and of diagonals, at least and
    at most; vs_divisor: tokens that count as a block where numbers of tokens become
    numbers of blocks, 128 in the authors' code whatever the block.

    capacity: key blocks that a query block has room for (proposed, not published:
    shapes are static); where the data asks for more, the least are dropped, never the
    first and never the own one. None has room for all, and so takes time T^2 however
    few are asked for. `share` says what was asked for, read and capped.

    Prompts of at most two blocks or of min_budget tokens are read exactly, and so is
    everything in a stream but the piece that begins it. All queries follow the last
    ones: outputs depend on later tokens. Segments are refused: in the paper a prompt
    stands alone. Where the authors have 0 log 0, which is no number, 0 stands here.
    """

    block: int = 128
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    vs_divisor: int = 128
    capacity: int | None = 64
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    ahead = None  # the last queries choose for all
    row = TemplateRow(MASKED, "b L D + (L/b)^2 D + r b L D", 1)

    def __post_init__(self):
        check_fields(
            self, above={"gamma": 0},
            least={"block": 1, "tau": 0, "min_budget": 1, "max_budget": 1,
                   "vs_divisor": 1, "capacity": 2})

    @property
    def exact(self) -> Softmax:
        """What reads short prompts, and single tokens."""
        return Softmax(
            scale=self.scale, axis=self.axis, implementation=self.implementation)

    def dense_for(self, t: int) -> bool:
        """Whether a prompt of t tokens is read exactly."""
        least = -(-self.min_budget // self.block) * self.block
        return t <= max(2 * self.block, least)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        if segments is not None:
            raise NotImplementedError(
                "segments: the last queries of one prompt choose for all of it; packed "
                "and padded rows have several, or others"
            )
        if self.dense_for(q.shape[1]):
            return self.exact(q, k, v)
        return self._sparse(q, k, v)

    def _sparse(self, q, k, v) -> jax.Array:
        b, t, h, _ = q.shape
        devices_of(self.axis)  # says at once that there is no mesh
        n = -(-t // self.block)
        chosen = self._listed(self.pattern(q, k))  # [B,H,n,c]
        pad = lambda a: jnp.pad(a, ((0, 0), (0, n * self.block - t), (0, 0), (0, 0)))
        pos = jnp.arange(n * self.block, dtype=jnp.int32)[None]
        pos = jnp.where(pos < t, pos, -1)
        at = pos.reshape(1, n, -1)
        rows = at, (at >= 0).astype(jnp.int32)
        o = over_rows(
            self._local, self.axis, pad(q), rows, jnp.moveaxis(chosen, 2, 1), pad(k),
            pad(v), (pos, (pos >= 0).astype(jnp.int32)))
        return o[:, :t]

    def _local(self, q, rows, chosen, k, v, columns, head):
        b, n, size, h, _ = q.shape
        flat = lambda a: a.reshape(a.shape[0], -1)
        where = Where(flat(rows[0]), columns[0], flat(rows[1]), columns[1], head)
        o, _ = chosen_blocks.attend(
            q.reshape(b, n * size, h, -1), k, v, jnp.moveaxis(chosen, 1, 2),
            LogitSpec(Causal(), self.scale), where, block=self.block,
            implementation=self.implementation)
        return o.reshape(b, n, size, h, -1)

    def pattern(self, q, k) -> Pattern:
        """What the last queries of a prompt q [B,T,H,D], k [B,T,K,D] say, step by step
        as the authors have it; without gradients."""
        q, k = (jax.lax.stop_gradient(a) for a in (q, k))
        (b, t, h, d), size = q.shape, self.block
        n = -(-t // size)
        scale = d**-0.5 if self.scale is None else self.scale
        last = q[:, -size:]
        s = logits(last, k, scale)  # [B,H,I,S]
        i = jnp.arange(t - last.shape[1], t)[:, None]
        seen = jnp.arange(t)[None] <= i
        a = jax.nn.softmax(jnp.where(seen[None, None], s, -jnp.inf))
        # the mean weight of each column and of each diagonal [B,H,S]
        vertical, slash = a.mean(2), scores.diagonals(a) / a.shape[2]
        columns, diagonals = (
            scores.count_to(p, self.gamma) + 1 for p in (vertical, slash))
        per_block = scores.summed(vertical, size), scores.summed(slash, size)  # [B,H,n]
        # does the mean key of a block predict what is looked at?
        kv = scores.mean_keys(k, size)  # [B,n,K,D]
        guess = logits(last.astype(jnp.float32).mean(1, keepdims=True), kv, scale)
        guess = jax.nn.softmax(guess[:, :, 0])  # [B,H,n]
        divergence = scores.root_divergence(guess, per_block[0])
        # heads whose mean keys predict what is read are query-aware
        aware = divergence < self.tau
        least = min(-(-self.min_budget // size), n)
        limits = [jnp.where(aware, least, self._blocks(c, n))
                  for c in (columns, diagonals)]
        # the first block and the own one are always seen
        forced = (per_block[0].at[..., 0].set(jnp.inf),
                  per_block[1].at[..., -1].set(jnp.inf))
        kept = [scores.best(p, most) for p, most in zip(forced, limits)]
        # [B,H,n] and [B,H,n] -> pairs [B,H,n,n]
        active = scores.union(*kept)
        # mean queries against mean keys; the best pairs hold gamma of all n rows
        pooled = logits(scores.mean_keys(q, size), kv, scale)  # [B,H,n,n]
        tri = jnp.tril(jnp.ones((n, n), bool))[None, None]
        pooled = jax.nn.softmax(jnp.where(tri, pooled, -jnp.inf))
        pairs = scores.best_sum(pooled.reshape(b, h, n * n), self.gamma * n)
        active = active | (aware[..., None, None] & pairs.reshape(b, h, n, n) & tri)
        by_pair = scores.by_pair(*per_block)
        importance = jnp.where(aware[..., None, None], pooled, by_pair)
        return Pattern(vertical, slash, divergence, aware, columns, diagonals, active,
                       importance)

    def _blocks(self, tokens: jax.Array, n: int) -> jax.Array:
        """How many blocks stand for so many tokens, within the budgets."""
        most = n if self.max_budget is None else -(-self.max_budget // self.block)
        least = -(-self.min_budget // self.block)
        found = jnp.maximum(tokens // self.vs_divisor + 1, least)
        return jnp.minimum(found, min(most, n))

    def _listed(self, pattern: Pattern) -> jax.Array:
        """The active blocks of each row [B,H,n,c], -1 for none."""
        n = pattern.active.shape[-1]
        own = jnp.eye(n, dtype=bool) | (jnp.arange(n) == 0)[None]
        importance = jnp.where(own[None, None], jnp.inf, pattern.importance)
        importance = jnp.where(pattern.active, importance, -1)
        top, chosen = jax.lax.top_k(importance, min(self.capacity or n, n))
        return jnp.where(top < 0, -1, chosen)

    def share(self, q, k) -> Share:
        """What a prompt q [B,T,H,D], k [B,T,K,D] asks for, and what of it is read."""
        pattern = self.pattern(q, k)
        n = pattern.active.shape[-1]
        pairs = n * (n + 1) / 2
        asked = pattern.active.sum(-1)  # [B,H,n]
        room = jnp.minimum(asked, self.capacity or n)
        return Share(asked.sum(-1) / pairs, room.sum(-1) / pairs,
                     (asked > room).sum(-1).astype(jnp.float32))

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: all keys and values."""
        return self.exact.init_state(size, q, k, v)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]: a piece that begins a stream as a
        call, without segments; everything else exactly."""
        after, exact = None, self.exact
        if segments is not None or self.dense_for(q.shape[1]):
            return exact.step(state, q, k, v, segments=segments)
        check(q, k, v, aligned=True, piece=True)
        caches.check_fits(state, k, v)

        def first(state):
            # the exact step stores the tokens; what it would give is never computed
            return self._sparse(q, k, v)

        def later(state):
            return exact.step(state, q, k, v)[1]

        o = jax.lax.cond((state.end == 0).all(), first, later, state)
        after = exact.step(state, q, k, v)[0]
        return after, caches.poison(o, after.end, state.k.shape[1])
