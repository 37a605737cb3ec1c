"""SeerAttention-R (Gao et al., 2025) arXiv:2506.08889: a gate of blocks for decoding.

What `Seer` is for prompts, for the tokens that are written one by one: the queries of a
group together, not pooled over time, are compared with pooled keys of the blocks that
are complete, and the group reads the best of these and the block that is being filled.
The gate learns from the attention as it is, of which it is told the largest weight of
each block; the network around it stays as it is. Prompts are read whole.

    g_tn = (R_t W_q [q_t1 .. q_tG]) . (R_(b n) W_k pool(k_n)) / sqrt(Dg),   n < own(t)
    loss = mean of y log(y / softmax_n(g)),   y_tn ~ max_(group, j in n) a_tj
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import block_pools, reading
from attn.cache import kv as caches
from attn.cache.few import at_slots, of_blocks
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.masks import Causal
from attn.parallel.sharding import Axis
from attn.positions import RoPE
from attn.softmax import Softmax
from attn.sparse import block_gate
from attn.sparse.token_gate import GROUPS, TokenGate
from pallas_kernels.logits import LogitSpec


@caches.of_cache
class SeerRState(NamedTuple):
    """A cache of all tokens, turned; pools [B,N,K,c D] float32 of the unturned keys of
    each block so far, side by side (of "avg" the sum); gates [B,N,K,Dg] float32 of the
    blocks that are complete."""

    cache: Cache
    pools: jax.Array
    gates: jax.Array


class SeerR(TokenGate, Attention):
    """SeerAttention-R (Gao et al., 2025) arXiv:2506.08889: a learned gate for decoding.

    block: tokens of a block; gate_dim Dg; pool_k: what keys are pooled by, some of
    "max", "min" and "avg"; group: what the queries of a group become, "proj" of all
    side by side, "avgproj" of their mean, or the mean itself, "avg" (Dg is D then).
    norm: an RMS norm of both sides of the gate. budget: tokens that a group reads, the
    block being filled among them (proposed here), of at least that one block;
    threshold: instead, the blocks with a larger probability, for which there is room up
    to `capacity` (proposed, not published: shapes are static), None for all. rope: q
    and k are turned here, as the gate wants them unturned; a layer does not turn them
    then. All keys stay in memory.

    Learning: a call under `mutable=["gate"]` keeps the loss of each layer there, whose
    gradients reach the gate alone. skip: the share of the first rows that is left out.
    """

    block: int = 64
    gate_dim: int = 128
    pool_k: tuple[str, ...] = ("max", "min", "avg")
    group: str = "proj"
    norm: bool = False
    budget: int = 4096
    threshold: float | None = None
    capacity: int | None = 64
    skip: float = 0.0
    rope: RoPE | None = RoPE()
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(MASKED, "L^2 D, then (L / b) Dg + r D a token", 2)
    parameter_axes = {"gate_q": "HDR", "gate_k": "HDR", "norm_?": "R"}

    def __post_init__(self):
        check_fields(
            self, least={"block": 1, "gate_dim": 2, "budget": 1, "capacity": 1,
                         "skip": 0}, choices={"group": GROUPS})
        if self.skip >= 1:
            raise ValueError(f"SeerR: skip={self.skip}: expected in [0, 1)")
        block_gate.check_pools("SeerR: pool_k", self.pool_k)
        super().__post_init__()

    @property
    def exact(self) -> Softmax:
        """What reads prompts."""
        return Softmax(
            scale=self.scale, axis=self.axis, implementation=self.implementation)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once, q and k unturned: exact attention. q [B,T,H,D], k
        [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        weights = self._weights(q, k)
        now = locate(segments, *q.shape[:2])
        if self.is_mutable_collection("gate") and not self.is_initializing():
            if segments is not None:
                raise NotImplementedError("segments: the gate learns from whole rows")
            self.sow("gate", "loss", self._loss(weights, q, k))
        return self.exact(
            self._turned(q, now.pos), self._turned(k, now.pos), v, segments=segments)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: keys, values, and what the gate reads."""
        caches.check_size(size)
        b, _, heads, d = k.shape
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        shape = b, -(-size // self.block), heads
        return SeerRState(caches.empty(k, v, size),
                          zeros((*shape, len(self.pool_k) * d)),
                          zeros((*shape, self.gate_dim)))

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens, unturned -> state, [B,T,H,V]: one reads some blocks, a
        piece all. Past the state's size: ValueError, and NaN inside a trace."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        weights, cache = self._weights(q, k), state.cache
        caches.check_fits(cache, k, v)
        (b, t), slots = q.shape[:2], cache.k.shape[1]
        now = locate(segments, b, t, cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        turned = self._turned(k, now.pos)
        after = SeerRState(caches.append(cache, turned, v, now, now.pos),
                           *self._gated(state, weights, k, now))
        asked = self._turned(q, now.pos)
        if t == 1:
            chosen = self._chosen(weights, after, q, now.pos[:, 0])
            # the tokens of the chosen blocks, of each key head
            few = at_slots(after.cache, of_blocks(chosen, self.block, now.pos[:, 0]))
            few, asked = caches.of_one_type(few, asked)  # k [B,n block,K,D]
            segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
            o = reading.read(few, segment, asked, now, LogitSpec(Causal(), self.scale),
                             implementation=self.implementation)[0]
        else:
            o = self.exact.read(*caches.concat(cache, turned, v, now), asked, now)
        return after, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def _gated(self, state: SeerRState, weights, k, now: TokenPositions) -> tuple:
        """pools with new unturned keys k [B,T,K,D], and gates of what they complete."""
        (b, t, _, d), many = k.shape, state.pools.shape[1]
        had = jnp.where((now.segment > 1).any(1), 0, state.cache.end)
        pools = block_pools.added(state.pools, self.pool_k, k, now, had, self.block)
        # the blocks that the piece may complete: [B,T/block+1]
        done = had[:, None] // self.block + jnp.arange(
            t // self.block + 1, dtype=jnp.int32)[None]
        whole = (done + 1) * self.block <= now.next_pos[:, None]
        # [B,N,K,c D] at [B,T/block+1,1,1]
        found = jnp.take_along_axis(pools, done[..., None, None], 1, mode="clip")
        if self.pool_k[-1] == "avg":  # the last one, in their order
            found = found.at[..., -d:].divide(self.block)
        gates = self._of_keys(weights, found, done * self.block)  # [B,T/block+1,K,Dg]
        done = jnp.where(whole, done, many)  # outside: dropped
        row = jnp.arange(b)[:, None]
        return pools, state.gates.at[row, done].set(gates, mode="drop")

    def _chosen(self, weights, state: SeerRState, q, pos) -> jax.Array:
        """The blocks [B,K,n] that q [B,1,H,D] at pos [B] reads, the own one first."""
        # the block of the token itself [B,1,1], which is always read
        own = (pos // self.block)[:, None, None]
        # [B,K,Dg]: one query for all heads of a group
        gate = self._of_queries(weights, q, pos[:, None], state.gates.shape[2])[:, 0]
        # [B,K,Dg] x [B,N,K,Dg] -> [B,K,N]
        s = jnp.einsum("bkd,bnkd->bkn", gate, state.gates) * self.gate_dim**-0.5
        s = jax.lax.stop_gradient(s)
        seen = jnp.arange(s.shape[2], dtype=jnp.int32)[None, None] < own
        if self.threshold is None:
            room, least = self.budget // self.block - 1, -jnp.inf  # beside its own
        else:
            s = block_gate.shares(s, seen)
            room, least = self.capacity or s.shape[2], self.threshold
        top, best = jax.lax.top_k(
            jnp.where(seen, s, -jnp.inf), min(max(room, 0), s.shape[2]))
        # -1: a block that is not seen, or too improbable
        best = jnp.where(top > least, best, -1).astype(jnp.int32)
        return jnp.concatenate([jnp.broadcast_to(own, (*s.shape[:2], 1)), best], 2)
