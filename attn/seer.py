"""SeerAttention (Gao et al., 2024) arXiv:2410.13276: a gate says which blocks count.

Queries and keys are pooled over blocks, before any rotation, and projected; the product
of a pooled query and a pooled key says how much the block of queries will look at the
block of keys. The gate learns from the attention itself, whose largest weight in each
pair of blocks is what it should say; the network around it stays as it is. Then only
the blocks that it names are read.

    g_mn = (R_m W_q pool(q_m)) . (R_n W_k pool(k_n)) / sqrt(Dg),   n <= m
    loss = mean of t log(t / softmax_n(g)),  t_mn ~ max_(i in m, j in n) a_ij
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.masks import Causal
from attn.parallel.query_blocks import over_rows
from attn.parallel.sharding import Axis, devices_of
from attn.positions import RoPE
from attn.softmax import Softmax
from attn.sparse import block_gate, chosen_blocks
from attn.sparse.block_grid import grid
from attn.sparse.prompt_gate import PromptGate
from pallas_kernels.logits import LogitSpec, Where


class Seer(PromptGate, Attention):
    """SeerAttention (Gao et al., 2024) arXiv:2410.13276: a learned gate of blocks.

    block: tokens of a block; gate_dim Dg; pool_q, pool_k: what blocks are pooled by,
    some of "max", "min" and "avg". Keys have a projection [H,D',Dg]; queries one of
    their own if `double`, or if Dg is not D or pool_q has several, and the keys' is
    then of K heads. threshold: blocks with a larger probability are read; None reads
    the best of each row, so many that `ratio` of all causal pairs are read. last_dense:
    the last two blocks of queries read everything. diagonal: a block of queries always
    reads its own (False as in the authors' code, True is what they recommend: without
    it a token may read nothing). rope: q and k are turned here, as the gate wants them
    unturned; a layer does not turn them then.

    capacity: key blocks that a query block has room for under a threshold (proposed,
    not published: shapes are static): the least probable ones beyond are dropped; None
    has room for all. `share` says what is asked for and read.

    Learning: a call under `mutable=["gate"]` is exact and keeps the loss of each layer
    there, whose gradients reach the gate alone (the authors multiply it by 10).

    Outputs depend on later queries of their own block, and with last_dense on how many
    follow. In a stream the piece that begins it is read as a call, without segments;
    everything else exactly. Segments together with last_dense are refused.
    """

    block: int = 64
    gate_dim: int = 128
    pool_q: tuple[str, ...] = ("avg",)
    pool_k: tuple[str, ...] = ("max", "min")
    double: bool = False
    threshold: float | None = None
    ratio: float = 0.1
    last_dense: bool = True
    diagonal: bool = False
    capacity: int | None = 32
    rope: RoPE | None = RoPE()
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(MASKED, "(L/b)^2 Dg + r b L D", 1)
    parameter_axes = {"gate_q": "HDR", "gate_k": "HDR"}

    def __post_init__(self):
        check_fields(
            self, least={"block": 1, "gate_dim": 2, "capacity": 1}, above={"ratio": 0})
        if self.ratio > 1:
            raise ValueError(f"Seer: ratio={self.ratio}: expected in (0, 1]")
        for name in ("pool_q", "pool_k"):
            block_gate.check_pools(f"Seer: {name}", getattr(self, name))
        super().__post_init__()

    @property
    def ahead(self) -> Any:
        """Queries up to the end of the own block lead it; all of a row if its last ones
        read more."""
        return None if self.last_dense else self.block

    @property
    def exact(self) -> Softmax:
        """What reads single tokens and the last blocks."""
        return Softmax(
            scale=self.scale, axis=self.axis, implementation=self.implementation)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once, q and k unturned. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V]
        -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        if segments is not None and self.last_dense:
            raise NotImplementedError(
                "segments: last_dense=True reads the last two blocks of one sequence "
                "exactly; expected last_dense=False"
            )
        weights = self._weights(q.shape[3], q.shape[2], k.shape[2])
        now = locate(segments, *q.shape[:2])
        turned = self._turned(q, now.pos), self._turned(k, now.pos)
        if self.is_mutable_collection("gate") and not self.is_initializing():
            if segments is not None:
                raise NotImplementedError("segments: the gate learns from whole rows")
            # the network around the gate stays as it is
            fixed = (jax.lax.stop_gradient(a) for a in (q, k))
            self.sow("gate", "loss", self._loss(weights, *fixed))
            return self.exact(*turned, v)
        return self._sparse(weights, (q, k), *turned, v, now, segments is not None)

    def _sparse(self, weights, plain, q, k, v, now, packed: bool) -> jax.Array:
        """plain: q and k as the gate reads them; q, k: turned."""
        devices_of(self.axis)  # says at once that there is no mesh
        t, tail = q.shape[1], 0
        if self.last_dense:
            # of the last two rows of blocks, the last one perhaps not full
            tail = min(t, t - (-(-t // self.block) - 2) * self.block)
        on = grid(now.pos, now.segment, self.block, packed=packed)
        # what it names has no gradient
        q_gate, k_gate = jax.lax.stop_gradient(
            self._gates(weights, on.put(plain[0]), on.put(plain[1]), on))
        told = on.pos, on.segment, jnp.arange(on.pos.shape[1], dtype=jnp.int32)[None]
        columns = on.pos, on.segment, k_gate
        o = over_rows(self._local, self.axis, on.put(q), told, q_gate, on.put(k),
                      on.put(v), columns)
        o = on.poison(on.take(o, t))
        if tail == 0:
            return o
        # the last queries stand at the last keys
        last = Softmax(scale=self.scale, implementation=self.implementation)
        return jnp.concatenate([o[:, :t - tail], last(q[:, t - tail:], k, v)], 1)

    def _local(self, q, rows, q_gate, k, v, columns, head):
        """q [B,N,I,H,D] and q_gate [B,N,H,Dg] of query blocks -> [B,N,I,H,V]."""
        (pos, segment, number), (kv_pos, kv_segment, k_gate) = rows, columns
        b, n, size, h, _ = q.shape
        # of the heads of this device: [B,M,H,Dg]
        k_gate = k_gate[:, :, head]
        owner = kv_segment.max(2)
        pick = functools.partial(self._picked, k_gate, owner)
        first = lambda a: jnp.moveaxis(jnp.broadcast_to(a, (b, *a.shape[1:])), 1, 0)
        # a row of blocks at a time: [N,B,H,c]
        chosen = jax.lax.map(
            pick, jax.tree.map(first, (q_gate, segment.max(2), number)),
            batch_size=min(n, 64))
        flat = lambda a: a.reshape(a.shape[0], -1)
        where = Where(flat(pos), flat(kv_pos), flat(segment), flat(kv_segment), head)
        # [N,B,H,c] -> [B,H,N,c]
        o, _ = chosen_blocks.attend(
            q.reshape(b, n * size, h, -1), k, v, chosen.transpose(1, 2, 0, 3),
            LogitSpec(Causal(), self.scale), where, block=self.block,
            implementation=self.implementation)
        return o.reshape(b, n, size, h, -1)

    def _picked(self, k_gate, owner, row) -> jax.Array:
        """The blocks that one row of blocks reads: [B,H,c], -1 for none. row: its gate
        [B,H,Dg], its segment index [B] and its number [B]."""
        gate, segment, number = row
        # [B,H,Dg] x [B,M,H,Dg] -> [B,H,M]
        s = jnp.einsum("bhd,bmhd->bhm", gate, k_gate) * self.gate_dim**-0.5
        m = jnp.arange(s.shape[-1], dtype=jnp.int32)[None]
        seen = (owner == segment[:, None]) & (owner > 0) & (m <= number[:, None])
        seen = seen[:, None]  # [B,1,M]
        if self.threshold is None:
            # so many of the columns of the own sequence
            many = (owner == segment[:, None]).sum(-1)
            most = self._most(s.shape[-1])
            top, chosen = jax.lax.top_k(jnp.where(seen, s, -jnp.inf), int(most[-1]))
            number_of = jnp.arange(chosen.shape[-1])[None, None]
            kept = (number_of < jnp.asarray(most)[many][:, None, None]) & (
                top > -jnp.inf)
        else:
            p = block_gate.shares(s, seen)
            room = min(self.capacity or s.shape[-1], s.shape[-1])
            top, chosen = jax.lax.top_k(jnp.where(seen, p, -1), room)
            kept = (top > self.threshold) & (top >= 0)
        chosen = jnp.where(kept, chosen, -1)
        if not self.diagonal:
            return chosen
        # the row's own block last, and once: [B,H,c] and [B,H,1]
        own = jnp.broadcast_to(number[:, None, None], (*chosen.shape[:2], 1))
        return jnp.concatenate([jnp.where(chosen == own, -1, chosen), own], -1)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: all keys, turned, and values."""
        return self.exact.init_state(size, q, k, v)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens, unturned -> state, [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        caches.check_fits(state, k, v)
        b, t = q.shape[:2]
        now = locate(segments, b, t, state.end, state.segment)
        turned = self._turned(q, now.pos), self._turned(k, now.pos)
        if segments is not None or q.shape[1] == 1:
            return self.exact.step(state, *turned, v, segments=segments)
        weights = self._weights(q.shape[3], q.shape[2], k.shape[2])

        def first(state):
            return self._sparse(weights, (q, k), *turned, v, now, False)

        def later(state):
            return self.exact.step(state, *turned, v)[1]

        o = jax.lax.cond((state.end == 0).all(), first, later, state)
        after = self.exact.step(state, *turned, v)[0]
        return after, caches.poison(o, after.end, state.k.shape[1])
