"""By block: tokens that choose blocks one by one, sorted by the blocks they chose.

If each token fetched its own blocks, a block would be fetched as often as it is chosen,
for one query at a time. So the pairs of a token and a block are sorted by block, and
the queries of each block are laid in tiles: a row of `chosen_blocks.attend` with one
block. What a token gets from its blocks is merged as an online softmax.

    pairs of block b, in tiles of I:   o_p, lse_p = attend(q_p, block b)
    o_t = sum_p exp(lse_p - lse) o_p,  lse = log sum_p exp(lse_p),  p the pairs of t

Memory grows with the number of pairs, not with the keys that they read.

Source: Lu et al., 2025, arXiv:2502.13189, algorithm 1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.online import OnlineSoftmax, join, merge, output, state_of
from attn.masks import Causal, Full
from attn.sparse import chosen_blocks
from pallas_kernels.logits import LogitSpec, Where
from pallas_kernels.tile import NEVER

TILE = 128  # queries of a tile, where a block has as many


class Tiles(NamedTuple):
    """Pairs on tiles: slot [P] of each pair, I L for a pair of no block; pair [I L] in
    each slot, P in an empty one; block [L] of each tile, -1 for none."""

    slot: jax.Array
    pair: jax.Array
    block: jax.Array


def read(
    q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array | None, pos: jax.Array,
    own: jax.Array, kv_pos: jax.Array, kv_segment: jax.Array, *, rows: int,
    aligned: bool, **how: Any,
) -> jax.Array:
    """What every token gets from its own block, up to itself, and from all of those
    that it chose before it, None for none: [B,T,H,V] float32. See `own_block` and
    `attend`."""
    state = own_block(
        q, k, v, pos, own, kv_pos, kv_segment, rows=rows, aligned=aligned, **how)
    if chosen is not None:
        state = join(state, attend(q, k, v, chosen, kv_pos, **how))
    return output(state)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array, kv_pos: jax.Array, *,
    block: int, head: jax.Array | None = None, scale: float | None = None,
    implementation: str | None = None,
) -> OnlineSoftmax:
    """What every token gets from the blocks that it chose, all of each.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; chosen [B,H|K,T,n] int32, -1 for none, and no
    block twice; kv_pos [B|1,S]: -1 hides what is in an empty slot.
    """
    b, t, h, _ = q.shape
    c, n = chosen.shape[1], chosen.shape[3]
    o, lse = _of_pairs(
        q, k, v, chosen, kv_pos, n, block=block, head=head, scale=scale,
        implementation=implementation)
    # [B,C,T n,G,V] -> [n,B,T,H,V], [B,C,T n,G] -> [n,B,H,T]
    o = o.reshape(b, c, t, n, h // c, -1).transpose(3, 0, 2, 1, 4, 5)
    lse = lse.reshape(b, c, t, n, h // c).transpose(3, 0, 1, 4, 2)
    parts = jax.vmap(state_of)(o.reshape(n, b, t, h, -1), lse.reshape(n, b, h, t))
    return merge(parts)


def each(
    q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array, kv_pos: jax.Array,
    **how: Any,
) -> jax.Array:
    """What every pair gets from its block alone, by a query of its own [B,H,T,n,V], 0
    for none: q [B,H,T,n,D], chosen [B,H,T,n]; see `attend`."""
    b, h, t, n, d = q.shape
    rows = q.reshape(b, h, t * n, d).swapaxes(1, 2)
    o, _ = _of_pairs(rows, k, v, chosen, kv_pos, 1, **how)
    return o.reshape(b, h, t, n, -1)


def _of_pairs(
    q, k, v, chosen, kv_pos, same: int, *, block: int, head=None, scale=None,
    implementation=None,
) -> tuple[jax.Array, jax.Array]:
    """o [B,C,P,G,V] and lse [B,C,P,G] of the P = T n pairs of chosen [B,C,T,n], where
    `same` pairs that follow each other have one query of q [B,P/same,H,D]."""
    b, _, h, _ = q.shape
    c, blocks = chosen.shape[1], -(-k.shape[1] // block)
    flat = chosen.reshape(b, c, -1).astype(jnp.int32)
    size = tile_of(block, chosen.shape[3], flat.shape[2] // chosen.shape[3])
    cut = functools.partial(tiled, blocks=blocks, size=size)
    tiles = jax.vmap(jax.vmap(cut))(flat)
    # [B,X,H,D] -> [B,C,X,G,D] -> [B,C,I L,G,D] -> [B,I L,H,D]
    rows = jnp.moveaxis(q.reshape(*q.shape[:2], c, h // c, -1), 2, 1)
    rows = _at(rows, tiles.pair // same, 0)  # behind the last where there is none
    rows = jnp.moveaxis(rows, 1, 2).reshape(b, -1, h, q.shape[3])
    # a block holds tokens of one sequence, all of them before the token
    where = Where(
        jnp.zeros((1, rows.shape[1]), jnp.int32), kv_pos.astype(jnp.int32), head=head)
    o, lse = chosen_blocks.attend(
        rows, k, v, tiles.block[..., None], LogitSpec(Full(), scale), where,
        block=block, implementation=implementation)
    # back to the pairs: [B,I L,H,V] -> [B,C,P,G,V]
    o = jnp.moveaxis(o.reshape(b, -1, c, h // c, v.shape[3]), 2, 1)
    lse = jnp.moveaxis(lse.reshape(b, c, h // c, -1), 3, 2)
    return _at(o, tiles.slot, 0), _at(lse, tiles.slot, NEVER)


def own_block(
    q: jax.Array, k: jax.Array, v: jax.Array, pos: jax.Array, own: jax.Array,
    kv_pos: jax.Array, kv_segment: jax.Array, *, block: int, rows: int,
    aligned: bool = False, head: jax.Array | None = None, scale: float | None = None,
    implementation: str | None = None,
) -> OnlineSoftmax:
    """What every token gets from its own block, up to itself.

    q [B,T,H,D] at pos and in the blocks own [B|1,T], -1 for what is no token; k, v
    [B,S,K,.] at kv_pos and kv_segment [B|1,S]. Queries are read in `rows` rows of as
    many tokens, at most `block`, of one sequence; aligned: each row lies in one block.
    """
    b, t = q.shape[:2]
    at = jnp.broadcast_to(own, (b, t)).reshape(b, rows, -1)
    chosen = at.max(2, keepdims=True)  # [B,N,1]
    if not aligned:
        # as long as a block, a row may reach over the end of one
        first = jnp.where(at < 0, 2**30, at).min(2, keepdims=True)
        chosen = jnp.concatenate(
            [chosen, jnp.where(first < chosen, first, -1)], 2)
    chosen = jnp.broadcast_to(chosen[:, None], (b, k.shape[2], *chosen.shape[1:]))
    number = jnp.arange(kv_pos.shape[1], dtype=jnp.int32)[None] // block
    # tokens of one block are one sequence: they see nothing outside of it
    where = Where(
        pos.astype(jnp.int32), kv_pos.astype(jnp.int32), own + 1,
        jnp.where(kv_segment > 0, number + 1, 0), head)
    return state_of(*chosen_blocks.attend(
        q, k, v, chosen, LogitSpec(Causal(), scale), where, block=block,
        implementation=implementation))


def tile_of(block: int, n: int, t: int) -> int:
    """How many queries a tile has: about as many as choose a block, where each of t
    tokens chooses n of them, and at most TILE."""
    return max(1, min(TILE, max(block * n, 8), t))


def tiled(chosen: jax.Array, *, blocks: int, size: int) -> Tiles:
    """The pairs chosen [P], each of a block or -1, on tiles of `size` pairs that are of
    one block: P / size of them and one more for each of `blocks`, at most P."""
    pairs = len(chosen)
    many = min(pairs // size + blocks, pairs)
    key = jnp.where(chosen < 0, blocks, chosen)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    ordered = key[order]
    numbers = jnp.arange(blocks + 1, dtype=jnp.int32)
    start = jnp.searchsorted(ordered, numbers).astype(jnp.int32)
    # how many tiles the blocks up to each one have
    ends = jnp.cumsum(-(-(start[1:] - start[:-1]) // size), dtype=jnp.int32)
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])  # [blocks+1]
    at = jnp.arange(pairs, dtype=jnp.int32)
    slot = begin[ordered] * size + at - start[ordered]
    slot = jnp.where(ordered < blocks, slot, many * size)
    tiles = jnp.arange(many, dtype=jnp.int32)
    block = jnp.searchsorted(ends, tiles, side="right").astype(jnp.int32)
    return Tiles(
        jnp.zeros_like(at).at[order].set(slot),
        jnp.full((many * size,), pairs, jnp.int32).at[slot].set(order, mode="drop"),
        jnp.where(block < blocks, block, -1),
    )


def _at(a: jax.Array, index: jax.Array, empty: float) -> jax.Array:
    """a [B,C,N,...] at index [B,C,M] -> [B,C,M,...], `empty` outside of it."""
    take = lambda a, index: a.at[index].get(mode="fill", fill_value=empty)
    return jax.vmap(jax.vmap(take))(a, index)
