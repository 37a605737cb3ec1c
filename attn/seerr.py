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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache import block_pools
from attn.cache import kv as caches
from attn.cache.few import at_slots, of_blocks
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.logits import LogitSpec
from attn.masks import Causal
from attn.parallel.sharding import Axis
from attn.positions import RoPE
from attn.softmax import Softmax
from attn.sparse import block_gate

GROUPS = ("proj", "avgproj", "avg")
HIDDEN = -1e20  # the logit of a block that is not the gate's


@caches.of_cache
class SeerRState(NamedTuple):
    """A cache of all tokens, turned; pools [B,N,K,c D] float32 of the unturned keys of
    each block so far, side by side (of "avg" the sum); gates [B,N,K,Dg] float32 of the
    blocks that are complete."""

    cache: Cache
    pools: jax.Array
    gates: jax.Array


class SeerR(nn.Module, Attention):
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
            few = at_slots(after.cache, of_blocks(chosen, self.block, now.pos[:, 0]))
            few, asked = caches.of_one_type(few, asked)
            segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
            o = caches.read(few, segment, asked, now, LogitSpec(Causal(), self.scale),
                            implementation=self.implementation)[0]
        else:
            o = self.exact.read(*caches.concat(cache, turned, v, now), asked, now)
        return after, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def _gated(self, state: SeerRState, weights, k, now: TokenPositions) -> tuple:
        """pools with new unturned keys k [B,T,K,D], and gates of what they complete."""
        (b, t, _, d), many = k.shape, state.pools.shape[1]
        had = jnp.where((now.segment > 1).any(1), 0, state.cache.end)
        pools = block_pools.added(state.pools, self.pool_k, k, now, had, self.block)
        done = had[:, None] // self.block + jnp.arange(
            t // self.block + 1, dtype=jnp.int32)[None]
        whole = (done + 1) * self.block <= now.next_pos[:, None]
        found = jnp.take_along_axis(pools, done[..., None, None], 1, mode="clip")
        if self.pool_k[-1] == "avg":  # the last one, in their order
            found = found.at[..., -d:].divide(self.block)
        gates = self._of_keys(weights, found, done * self.block)
        done = jnp.where(whole, done, many)  # outside: dropped
        row = jnp.arange(b)[:, None]
        return pools, state.gates.at[row, done].set(gates, mode="drop")

    def _chosen(self, weights, state: SeerRState, q, pos) -> jax.Array:
        """The blocks [B,K,n] that q [B,1,H,D] at pos [B] reads, the own one first."""
        own = (pos // self.block)[:, None, None]
        gate = self._of_queries(weights, q, pos[:, None], state.gates.shape[2])[:, 0]
        s = jnp.einsum("bkd,bnkd->bkn", gate, state.gates) * self.gate_dim**-0.5
        s = jax.lax.stop_gradient(s)
        seen = jnp.arange(s.shape[2], dtype=jnp.int32)[None, None] < own
        if self.threshold is None:
            room, least = self.budget // self.block - 1, -jnp.inf
        else:
            s = block_gate.shares(s, seen)
            room, least = self.capacity or s.shape[2], self.threshold
        top, best = jax.lax.top_k(
            jnp.where(seen, s, -jnp.inf), min(max(room, 0), s.shape[2]))
        best = jnp.where(top > least, best, -1).astype(jnp.int32)
        return jnp.concatenate([jnp.broadcast_to(own, (*s.shape[:2], 1)), best], 2)

    @nn.compact
    def _weights(self, q, k) -> dict[str, Any]:
        """The projections of the gate, of each key head, and its norms."""
        (h, d), heads = q.shape[2:], k.shape[2]
        widths = {"proj": h // heads * d, "avgproj": d}
        init = nn.initializers.glorot_uniform(batch_axis=(0,))
        found = {"k": self.param(
            "gate_k", init, (heads, len(self.pool_k) * d, self.gate_dim))}
        if self.group in widths:
            shape = heads, widths[self.group], self.gate_dim
            found["q"] = self.param("gate_q", init, shape)
        elif d != self.gate_dim:
            raise ValueError(f"SeerR: gate_dim={self.gate_dim}, group='avg': expected "
                             f"the D={d} of queries")
        if self.norm:
            one = nn.initializers.ones
            found |= {f"norm_{side}": self.param(f"norm_{side}", one, (self.gate_dim,))
                      for side in "qk"}
        return found

    def _of_keys(self, weights, pools, pos) -> jax.Array:
        """Pools [B,N,K,c D] of blocks that begin at pos [B|1,N] -> [B,N,K,Dg]."""
        gate = jnp.einsum("bnkc,kcd->bnkd", pools, weights["k"])
        return self._turned(self._normed(gate, weights.get("norm_k")), pos)

    def _of_queries(self, weights, q, pos, heads: int) -> jax.Array:
        """Unturned q [B,T,H,D] at pos [B|1,T] -> [B,T,K,Dg]."""
        b, t, h, d = q.shape
        q = q.astype(jnp.float32).reshape(b, t, heads, h // heads, d)
        q = q.reshape(b, t, heads, -1) if self.group == "proj" else q.mean(3)
        gate = q if self.group == "avg" else jnp.einsum(
            "btkc,kcd->btkd", q, weights["q"])
        return self._turned(self._normed(gate, weights.get("norm_q")), pos)

    def _normed(self, a, scale):
        if scale is None:
            return a
        return a * jax.lax.rsqrt((a * a).mean(-1, keepdims=True) + 1e-6) * scale[
            None, None, None]

    def _turned(self, a, pos):
        return a if self.rope is None else self.rope.rotate(a, pos)

    def logits(self, q, k) -> jax.Array:
        """The gate's logits [B,K,T,n] of unturned q [B,T,H,D] and k [B,T,K,D]; -1e20
        for the own block and later ones."""
        return self._logits(self._weights(q, k), q, k)

    def _logits(self, weights, q, k):
        t, heads, block = q.shape[1], k.shape[2], self.block
        n = -(-t // block)
        pos = jnp.arange(n * block, dtype=jnp.int32)
        k = jnp.pad(k, ((0, 0), (0, n * block - t), (0, 0), (0, 0)))
        pools = block_gate.pooled(k, (pos < t).reshape(1, n, block), self.pool_k)
        of_k = self._of_keys(weights, pools, pos[None, ::block])
        of_q = self._of_queries(weights, q, pos[None, :t], heads)
        s = jnp.einsum("btkd,bnkd->bktn", of_q, of_k) * self.gate_dim**-0.5
        past = jnp.arange(n)[None] < (pos[:t] // block)[:, None]
        return jnp.where(past[None, None], s, HIDDEN)

    def target(self, q, k) -> jax.Array:
        """What the gate should say [B,K,T,n]: the largest weight that a token and a
        group give in each earlier block, as a share of the row's, 0 in the first block;
        of unturned q and k, without gradient. Time T^2."""
        pos = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        q, k = (jax.lax.stop_gradient(self._turned(a, pos)) for a in (q, k))
        p = block_gate.token_maxima(q, k, self.block, self.scale)
        past = jnp.arange(p.shape[3])[None] < (pos[0] // self.block)[:, None]
        p = jnp.where(past[None, None], p, 0)
        return p / (p.sum(-1, keepdims=True) + 1e-9)

    def loss(self, q, k) -> jax.Array:
        """The divergence of the gate from `target`, a number: the mean over all tokens
        and blocks, the first `skip` of the rows left out."""
        return self._loss(self._weights(q, k), q, k)

    def _loss(self, weights, q, k):
        # the network around the gate stays as it is
        q, k = (jax.lax.stop_gradient(a) for a in (q, k))
        rows = slice(int(self.skip * q.shape[1]), None)
        target, s = self.target(q, k), self._logits(weights, q, k)
        return block_gate.divergence(target[:, :, rows], s[:, :, rows])
