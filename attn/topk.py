"""Kinetics (Sadhukhan et al., 2025) arXiv:2506.05333: a token reads its top-k blocks.

Generating long answers is bound by the bytes of the cache, not by arithmetic, so each
token had better read few keys. It always reads the first `sink` and the last `local`
ones; of those between, cut into blocks, it reads the `top_k` blocks whose logits are
largest in the mean over the block and over the query heads of its group. The mean of
logits is the product with the mean key, so one mean key a block is all that is asked.

    middle = [sink, sink + nb block),  nb = floor((length - sink - local) / block)
    score_c = mean_(h in group) q_h . mean_(j in block c) k_j
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import block_sums, reading
from attn.cache import kv as caches
from attn.cache.few import at_slots
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.dense import weights
from attn.masks import Causal
from attn.parallel.query_blocks import over_rows
from attn.parallel.sharding import Axis, check_groups
from attn.softmax import Softmax
from attn.sparse.block_grid import grid
from attn.sparse.block_scores import named
from pallas_kernels.logits import LogitSpec

PREFILLS = ("dense", "sparse")
TILE = 64  # queries at once, in a sparse call


@caches.of_cache
class TopKState(NamedTuple):
    """A cache of all tokens, and the sums [B,N,K,D] float32 of the keys of each block
    behind the first `sink` tokens; None for blocks of one token."""

    cache: Cache
    sums: Any


@dataclasses.dataclass(frozen=True)
class TopK(Attention):
    """Kinetics (Sadhukhan et al., 2025) arXiv:2506.05333: top-k and block top-k.

    top_k blocks of `block` tokens (1: top-k of single tokens), chosen by a key head's
    whole group, beside the first `sink` and the last `local` tokens; what is left of
    the middle behind whole blocks counts as local. With 16 and 60 a token reads 1,024
    to 1,043. It is a rule for decoding: a prompt is read exactly. prefill="sparse"
    (proposed here, for measuring) applies it to every token of a call or piece, too, at
    the cost of all logits. All keys stay in memory.
    """

    top_k: int = 60
    block: int = 16
    sink: int = 4
    local: int = 64
    prefill: str = "dense"
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    part = "reading"
    row = TemplateRow(MASKED, "L^2 D, then (L / b + r b) D a token", 2)

    def __post_init__(self):
        check_fields(
            self, least={"top_k": 1, "block": 1, "sink": 0, "local": 1},
            choices={"prefill": PREFILLS})

    @property
    def exact(self) -> Softmax:
        """What reads a prompt."""
        return Softmax(
            scale=self.scale, axis=self.axis, implementation=self.implementation)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]."""
        if self.prefill == "dense":
            return self.exact(q, k, v, segments=segments)
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, *q.shape[:2])
        packed = segments is not None
        return self._sparse(q, k, v, now, now.pos, now.segment, packed, 0)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: keys, values, and sums of blocks."""
        caches.check_size(size)
        return TopKState(caches.empty(k, v, size), self.marks(size, k))

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        cache, slots = state.cache, state.cache.k.shape[1]
        caches.check_fits(cache, k, v)
        b, t = q.shape[:2]
        now = locate(segments, b, t, cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        after = TopKState(
            caches.append(cache, k, v, now, now.pos), self.marked(state.sums, k, now))
        if t == 1:
            o = self._decode(after, q, now)
        else:
            both, segment = caches.concat(cache, k, v, now)
            if self.prefill == "dense":
                o = self.exact.read(both, segment, q, now)
            else:
                both, wide = caches.of_one_type(both, q)
                pos = both.pos[..., 0]
                segment = jnp.where(pos < 0, 0, segment)
                o = self._sparse(wide, both.k, both.v, now, pos, segment, True, slots)
        return after, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def marks(self, slots: int, k) -> Any:
        """Sums of the empty blocks of `slots` slots, for keys like k [B,.,K,D]."""
        if self.block == 1:
            return None
        return block_sums.empty(k, slots, self.block, self.sink)

    def marked(self, sums: Any, k, now: TokenPositions, end=None) -> Any:
        """The sums of blocks with new keys k [B,T,K,D] at slots `now`."""
        if sums is None:
            return None
        return block_sums.added(sums, k, now, self.block, self.sink)

    def picked(self, sums: Any, cache: Cache, q, now: TokenPositions) -> jax.Array:
        """The slots [B,N,K] that one token q [B,1,H,D] at slot `now` reads."""
        return self.chosen_slots(
            TopKState(cache, sums), q[:, 0], now.pos[:, 0] + 1)

    def _decode(self, state: TopKState, q, now: TokenPositions):
        """What one token q [B,1,H,D] reads of the memory that holds it."""
        slots = self.chosen_slots(state, q[:, 0], now.pos[:, 0] + 1)
        few = at_slots(state.cache, slots)
        segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
        few, q = caches.of_one_type(few, q)
        spec = LogitSpec(Causal(), self.scale)
        return reading.read(
            few, segment, q, now, spec, implementation=self.implementation)[0]

    def chosen_slots(self, state: TopKState, q, length) -> jax.Array:
        """The slots [B,N,K] that q [B,H,D] reads of `length` [B] tokens, -1 for none:
        N = sink + top_k block + local + block - 1."""
        b, h, d = q.shape
        heads = state.cache.k.shape[2]
        # the mean of q.k over the group is that of its mean query
        asked = q.astype(jnp.float32).reshape(b, heads, h // heads, d).mean(2)
        keys, shift = state.sums, 0
        if keys is None:
            keys, shift = state.cache.k, self.sink
        # [B,K,D] x [B,N,K,D] -> [B,K,N]
        score = jnp.einsum("bkd,bnkd->bkn", asked, keys.astype(jnp.float32))
        score = jax.lax.stop_gradient(score)[:, :, min(shift, keys.shape[1] - 1):]
        # whole blocks between the first tokens and the local ones
        many = jnp.maximum(length - self.sink - self.local, 0) // self.block  # [B]
        many = many[:, None, None]
        number = jnp.arange(score.shape[2], dtype=jnp.int32)[None, None]
        top = min(self.top_k, score.shape[2])
        _, best = jax.lax.top_k(jnp.where(number < many, score, -jnp.inf), top)
        inside = jnp.arange(self.block, dtype=jnp.int32).reshape(1, 1, 1, -1)
        middle = self.sink + best[..., None] * self.block + inside  # [B,K,top,block]
        middle = jnp.where((best < many)[..., None], middle, -1).reshape(b, heads, -1)
        first = jnp.arange(self.sink, dtype=jnp.int32)[None, None]
        length = length[:, None, None]
        first = jnp.where(first < length, first, -1)
        # the local tokens, and those that fill no block
        back = jnp.arange(self.local + self.block - 1, dtype=jnp.int32)[None, None]
        last = length - 1 - back
        last = jnp.where(last >= self.sink + many * self.block, last, -1)
        both = jnp.concatenate([first, last], -1)
        both = jnp.broadcast_to(both, (b, heads, both.shape[2]))
        return jnp.moveaxis(jnp.concatenate([middle, both], -1), 1, 2)

    def _sparse(self, q, k, v, now, pos, segment, packed: bool, spare: int):
        """The rule for each token of q at `now`, over keys at pos and segment [B,S]."""
        check_groups(k.shape[2], self.axis)
        lead = -self.sink % self.block  # so that blocks begin behind the sinks
        columns = grid(pos, segment, self.block, packed=packed, lead=lead,
                       spare=spare // self.block)
        t = q.shape[1]
        rows = grid(now.pos, now.segment, min(TILE, t), packed=False)
        at = [(g.pos, g.segment) for g in (rows, columns)]
        args = rows.put(q), at[0], None, columns.put(k), columns.put(v), at[1]

        def xla():
            return over_rows(self._local, self.axis, *args)

        return columns.poison(rows.take(pick(self.implementation, xla=xla), t))

    def _local(self, q, rows, _, k, v, columns, head):
        """q [B,N,I,H,D] of tiles of queries, k and v [B,S,K,.] -> [B,N,I,H,V]."""

        @jax.checkpoint
        def one(args):
            q, pos, segment = args
            return self._tile(q, pos, segment, k, v, *columns)

        first = lambda a: jnp.moveaxis(a, 1, 0)
        return jnp.moveaxis(jax.lax.map(one, jax.tree.map(first, (q, *rows))), 0, 1)

    def _tile(self, q, pos, segment, k, v, kv_pos, kv_segment):
        """q [B,I,H,D] at pos and segment [B|1,I], kv_pos, kv_segment [B|1,N,block]."""
        b, i, h, d = q.shape
        heads = k.shape[2]
        queries = q.reshape(b, i, heads, h // heads, d)
        # [B,I,K,G,D] x [B,S,K,D] -> [B,K,G,I,S]
        s = jnp.einsum("bikgd,bjkd->bkgij", queries, k,
                       preferred_element_type=jnp.float32)
        s = s * (d**-0.5 if self.scale is None else self.scale)
        own = (segment[:, :, None, None] == kv_segment[:, None]) & (
            kv_segment[:, None] > 0)
        seen = own & (kv_pos[:, None] <= pos[:, :, None, None])  # [B|1,I,N,block]
        many = jnp.maximum(pos + 1 - self.sink - self.local, 0) // self.block
        begin, end = kv_pos[:, None, :, 0], kv_pos[:, None, :, -1]  # [B|1,1,N]
        stop = self.sink + (many * self.block)[..., None]
        whole = (begin >= self.sink) & (end < stop)
        # a block of the middle [B|1,I,N]; its last slot is empty if it is not whole
        middle = whole & (end >= 0) & own[..., 0]
        score = jax.lax.stop_gradient(s).mean(2)  # over the group: [B,K,I,S]
        score = score.reshape(b, heads, i, -1, self.block).mean(-1)  # [B,K,I,N]
        score = jnp.where(middle[:, None], score, -jnp.inf)
        _, best = jax.lax.top_k(score, min(self.top_k, score.shape[-1]))
        kept = named(best, score.shape[-1]) | ~middle[:, None]
        seen = seen[:, None] & kept[..., None]  # [B,K,I,N,block]
        p = weights(s, seen.reshape(b, heads, 1, i, -1))
        # [B,K,G,I,S] x [B,S,K,V] -> [B,I,K,G,V]
        o = jnp.einsum("bkgij,bjkv->bikgv", p.astype(v.dtype), v,
                       preferred_element_type=jnp.float32)
        return o.reshape(b, i, h, -1).astype(v.dtype)
