"""Regions: what a stream remembers of tokens that are read as regions.

Of blocks, a region for each that is complete, and the tokens of the present one. Of
spans, all keys and values, and a span for each bit of their number
(`attn/sparse/regions.py`, `attn/sparse/spans.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.contract.segments import TokenPositions
from attn.contract.varying import varying
from attn.sparse import spans
from attn.sparse.regions import Regions, Tokens, compact


class BlocksState(NamedTuple):
    """Of complete blocks the regions k [B,N,K,D], v [B,N,H,V] and their numbers pos
    [B,N,1], -1 for none; the tokens of the present block own_q [B,s,H,D], own_k
    [B,s,K,D], own_v [B,s,K,V]; end [B] int32 the next token's position; segment [B]
    int32 the last token's segment, -1 before the first."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    own_q: jax.Array
    own_k: jax.Array
    own_v: jax.Array
    end: jax.Array
    segment: jax.Array


class SpansState(NamedTuple):
    """All keys k [B,C,K,D] and values v [B,C,K,V], and the spans of the bits of how
    many there are, `spans.Counter`; end, segment [B] int32 as in `BlocksState`."""

    k: jax.Array
    v: jax.Array
    counter: spans.Counter
    end: jax.Array
    segment: jax.Array


def empty_blocks(size: int, block: int, q, k, v) -> BlocksState:
    """A memory for `size` tokens, up to a whole block."""
    b, _, h, _ = q.shape

    def empty(a, slots, heads):
        return jnp.zeros((b, slots, heads, a.shape[3]), a.dtype)

    n, heads = -(-size // block), k.shape[2]
    return BlocksState(
        empty(k, n, heads), empty(v, n, h), jnp.full((b, n, 1), -1, jnp.int32),
        empty(q, block, h), empty(k, block, heads), empty(v, block, heads),
        jnp.zeros((b,), jnp.int32), jnp.full((b,), -1, jnp.int32))


def held(state: BlocksState) -> Regions:
    """The regions of the sequence that goes on, which has index 1."""
    pos = state.pos[..., 0]
    return Regions(state.k, state.v, pos, jnp.ones_like(pos))


def present(state: BlocksState, new: Tokens) -> Tokens:
    """The tokens of the present block, and new ones behind them, without gaps."""
    block = state.own_k.shape[1]
    # [B]: how many tokens the present block has
    used = state.end % block
    index = jnp.arange(block, dtype=jnp.int32)[None]
    own = Tokens(
        state.own_q, state.own_k, state.own_v, (state.end - used)[:, None] + index,
        (index < used[:, None]).astype(jnp.int32))
    q, k, v, pos, segment = (
        jnp.concatenate([a, jnp.asarray(c).astype(a.dtype)], 1)
        for a, c in zip(map(jnp.asarray, own), new))
    return compact(Tokens(q, k, v, pos, segment))


def after(
    state: BlocksState, row: Tokens, fresh: Regions, now: TokenPositions
) -> BlocksState:
    """The state after the tokens of `row`, whose complete blocks are `fresh`."""
    b, block = state.end.shape[0], state.own_k.shape[1]
    newest = now.segment.max(1, keepdims=True)
    newest = jnp.where(newest > 0, newest, 1)  # of padding alone nothing changes
    # a sequence that begins empties the memory
    pos = jnp.where((newest > 1)[..., None], -1, state.pos)
    cache = Cache(state.k, state.v, pos, state.end, state.segment)
    mine = (fresh.segment == newest) & (fresh.number >= 0)
    place = TokenPositions(
        fresh.number, jnp.where(mine, fresh.segment, 0), now.next_pos, now.last_segment)
    # the region of block n is in slot n
    cache = caches.append(
        cache, fresh.k, fresh.v, place, jnp.where(mine, fresh.number, -1))
    # the tokens of the block that is not complete yet
    stays = (row.segment == newest) & (
        row.pos // block == (now.next_pos // block)[:, None])
    slot = jnp.where(stays, row.pos % block, block)
    at = jnp.arange(b)[:, None]
    own_q, own_k, own_v = (
        jnp.zeros_like(a).at[at, slot].set(c, mode="drop")
        for a, c in zip((state.own_q, state.own_k, state.own_v), row))
    return BlocksState(cache.k, cache.v, cache.pos, own_q, own_k, own_v, now.next_pos,
                       now.last_segment)


def empty_spans(size: int, q, k, v) -> SpansState:
    """A memory for `size` tokens."""
    b, _, h, d = q.shape
    # floor(log2 T) + 1 spans, one for each bit of a length
    cache, high = caches.empty(k, v, size), max(size.bit_length(), 1)
    own_q, own_k, own_v = (
        jnp.zeros((b, high, *a), jnp.float32)
        for a in ((h, d), k.shape[2:], (h, v.shape[3])))
    return SpansState(cache.k, cache.v, spans.Counter(own_q, own_k, own_v), cache.end,
                      cache.segment)


def through(
    state: SpansState, q, k, v, now: TokenPositions, scale: float
) -> tuple[SpansState, jax.Array]:
    """The state after the tokens, one by one, and o [B,T,H,V] float32."""
    row, slots = jnp.arange(q.shape[0]), state.k.shape[1]

    def token(carry, given):
        k, v, counter = carry
        new_q, new_k, new_v, pos, segment = given
        real = segment > 0
        # padding is dropped
        slot = jnp.where(real, pos, slots)
        k = k.at[row, slot].set(new_k.astype(k.dtype), mode="drop")
        v = v.at[row, slot].set(new_v.astype(v.dtype), mode="drop")
        counter, o = spans.step(counter, k, v, new_q, pos, real, scale)
        return (k, v, counter), o

    # [B,T,...] -> [T,B,...]
    given = tuple(jnp.moveaxis(a, 1, 0) for a in (q, k, v, now.pos, now.segment))
    carry = state.k, state.v, state.counter
    (k, v, counter), o = jax.lax.scan(token, *varying((carry, given)))
    state = SpansState(k, v, counter, now.next_pos, now.last_segment)
    return state, jnp.moveaxis(o, 0, 1)  # [T,B,H,V] -> [B,T,H,V]
