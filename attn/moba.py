"""MoBA (Lu et al., 2025) arXiv:2502.13189: a mixture of blocks, routed by mean keys.

Keys are cut into blocks, and every token of every query head goes to its own block and
to the earlier ones whose mean key its query likes best, as a token goes to experts.
Nothing is learned: a model of exact attention can be trained on with it, or layers can
change between the two.

    s_b = q_t . mean_(j in b) k_j,   b < own(t) = floor(t / block)
    read: own(t), up to t, and the top_k - 1 blocks b with the greatest s_b
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import block_sums, reading
from attn.cache import kv as caches
from attn.cache.few import at_slots, of_blocks
from attn.cache.kv import Cache
from attn.cache.on_grid import piece
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.masks import Causal
from attn.parallel.query_blocks import over_rows
from attn.parallel.sharding import Axis
from attn.sparse import by_block
from attn.sparse.block_gate import pooled
from attn.sparse.block_grid import Grid, grid
from pallas_kernels.logits import LogitSpec

SCORES = 2**19  # of tokens and blocks of a row of the batch, at once


@caches.of_cache
class MoBAState(NamedTuple):
    """A cache of all tokens, and the sums [B,N,K,D] float32 of the keys of each block.
    """

    cache: Cache
    sums: jax.Array


@dataclasses.dataclass(frozen=True)
class MoBA(Attention):
    """MoBA (Lu et al., 2025) arXiv:2502.13189: mixture of block attention.

    block: tokens of a block; top_k: blocks that a token reads, its own one among them,
    as in the authors' code. The paper has 512 and 3 in its scaling laws, 4096 and 12
    for a million tokens. Blocks before the own one are chosen by each query head for
    itself, also where heads share keys; a choice has no gradient. Equal scores: the
    first block. All keys stay in memory.

    As proposed here, not published: packed sequences, each on blocks of its own; over
    an `axis`, query blocks are split and keys are whole on every device.
    """

    block: int = 512
    top_k: int = 3
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(MASKED, "L^2 D / b + r b L D", 1)

    def __post_init__(self):
        check_fields(self, least={"block": 1, "top_k": 1})

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, *q.shape[:2])
        packed = segments is not None
        if not packed:  # one row stands for all
            now = TokenPositions(*(a[:1] for a in now))
        on = grid(now.pos, now.segment, self.block, packed=packed)
        return self._read(q, k, v, on, on, aligned=True)

    def _read(self, q, k, v, rows: Grid, columns: Grid, aligned: bool) -> jax.Array:
        """What tokens on the grid `rows` find among those on the grid `columns`."""
        h, heads = q.shape[2], k.shape[2]
        first, own = columns.blocks_of(rows)
        keys = columns.put(k)
        # [B,M,K,D] -> [B,M,H,D]; what it names has no gradient
        means = pooled(jax.lax.stop_gradient(keys), columns.segment > 0, ("avg",))
        means = jnp.repeat(means, h // heads, 2)
        flat = [a.reshape(a.shape[0], -1) for a in (columns.pos, columns.segment)]

        def local(q, told, _, k, v, at, head):
            return self._local(q, told, k, v, at, head, aligned)

        o = over_rows(
            local, self.axis, rows.put(q), (rows.pos, own, first), None, keys,
            columns.put(v), (means, *flat))
        return columns.poison(rows.poison(rows.take(o, q.shape[1]))).astype(v.dtype)

    def _local(self, q, told, k, v, at, head, aligned: bool) -> jax.Array:
        """q [B,N,I,H,D] of query blocks, k and v [B,S,K,.] -> [B,N,I,H,V]."""
        (pos, own, first), (means, kv_pos, kv_segment) = told, at
        b, n, size, h, _ = q.shape
        flat = lambda a: a.reshape(a.shape[0], -1)  # [B,N,I] -> [B,N I]
        tokens = q.reshape(b, n * size, h, -1)  # [B,N I,H,D]
        chosen = None
        if self.top_k > 1:
            chosen = self._chosen(q, own, first, means[:, :, head])
        o = by_block.read(
            tokens, k, v, chosen, flat(pos), flat(own), kv_pos, kv_segment, rows=n,
            aligned=aligned, block=self.block, head=head, scale=self.scale,
            implementation=self.implementation)
        return o.reshape(b, n, size, h, -1).astype(v.dtype)

    def _chosen(self, q, own, first, means) -> jax.Array:
        """The earlier blocks [B,H,N I,n] that tokens q [B,N,I,H,D] read, -1 for none;
        means [B,M,H,D]."""
        b, n, size, h, _ = q.shape
        at_once = SCORES // (h * size * means.shape[1])

        def row(args):
            q, own, first = args  # [B,I,H,D], [B|1,I] each
            # [B,I,H,D] x [B,M,H,D] -> [B,H,I,M]: q.mean of the block's keys
            s = jnp.einsum("bihd,bmhd->bhim", q.astype(jnp.float32), means)
            return self._best(s, first[:, None, :, None], own[:, None, :, None])

        rows = jax.tree.map(
            lambda a: jnp.moveaxis(a, 1, 0), (jax.lax.stop_gradient(q), own, first))
        found = jax.lax.map(row, rows, batch_size=max(1, min(n, at_once)))
        # [N,B,H,I,n] -> [B,H,N I,n]
        return found.transpose(1, 2, 0, 3, 4).reshape(b, h, n * size, -1)

    def _best(self, s, first, own) -> jax.Array:
        """The best blocks [...,n] of scores s [...,M], from `first` on up to the one
        before `own`; -1 for none."""
        number = jnp.arange(s.shape[-1], dtype=jnp.int32)
        number = number.reshape((1,) * (s.ndim - 1) + (-1,))
        s = jnp.where((number >= first) & (number < own), s, -jnp.inf)
        top, best = jax.lax.top_k(s, min(self.top_k - 1, s.shape[-1]))
        return jnp.where(top > -jnp.inf, best, -1).astype(jnp.int32)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: keys, values, and sums of blocks."""
        caches.check_size(size)
        return MoBAState(
            caches.empty(k, v, size), block_sums.empty(k, size, self.block))

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        cache = state.cache
        caches.check_fits(cache, k, v)
        (b, t), slots = q.shape[:2], cache.k.shape[1]
        now = locate(segments, b, t, cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        after = MoBAState(
            caches.append(cache, k, v, now, now.pos),
            block_sums.added(state.sums, k, now, self.block))
        if t == 1:
            o = self._decode(after, q, now)
        else:
            on = piece(cache, after.cache, q, k, v, now, self.block,
                       packed=segments is not None)
            o = self._read(on.q, on.held.k, on.held.v, on.rows, on.columns,
                           aligned=False)
        return after, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def _decode(self, state: MoBAState, q, now: TokenPositions):
        """What one token q [B,1,H,D] reads of the memory that holds it."""
        few = at_slots(state.cache, self.chosen_slots(state, q[:, 0], now.pos[:, 0]))
        segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
        few, q = caches.of_one_type(few, q)
        return reading.read(few, segment, q, now, LogitSpec(Causal(), self.scale),
                            implementation=self.implementation)[0]

    def chosen_slots(self, state: MoBAState, q, pos) -> jax.Array:
        """The slots [B,top_k block,H] that q [B,H,D] at pos [B] reads, -1 for none."""
        b, h, d = q.shape
        heads = state.sums.shape[2]
        asked = q.astype(jnp.float32).reshape(b, heads, h // heads, d)
        # [B,K,G,D] x [B,M,K,D] -> [B,K,G,M]
        # blocks before the own one are whole: their sum over `block` is their mean
        s = jnp.einsum("bkgd,bmkd->bkgm", asked, state.sums / self.block)
        own = jnp.broadcast_to((pos // self.block)[:, None, None], (b, h, 1))
        found = own
        if self.top_k > 1:
            s = jax.lax.stop_gradient(s).reshape(b, h, -1)  # [B,H,M]
            # the own block, and the best before it: [B,H,top_k]
            found = jnp.concatenate([own, self._best(s, 0, own)], -1)
        return of_blocks(found, self.block, pos)

    def share(self, length: int) -> float:
        """The share of the causal pairs of `length` tokens that each head reads."""
        read = sum(
            min(t // self.block, self.top_k - 1) * self.block + t % self.block + 1
            for t in range(length))
        return read / (length * (length + 1) / 2)
