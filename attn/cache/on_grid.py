"""On a grid: a piece of several tokens over a cache, both laid out in blocks.

Methods that choose blocks read a piece as they read a call: its tokens on a grid of
query blocks, and what they can see on a grid of key blocks (`attn/sparse/block_grid.py`
). A piece may begin inside of a block, so a row of queries may reach over two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.contract.segments import TokenPositions
from attn.sparse.block_grid import Grid, grid


class Piece(NamedTuple):
    """q [B,T,H,D] on the grid `rows`; k, v [B,S,K,.] with segment indices segment [B,S]
    on the grid `columns`, in a cache `held` of one type with q."""

    q: jax.Array
    held: Cache
    segment: jax.Array
    rows: Grid
    columns: Grid


def piece(
    before: Cache, after: Cache, q: jax.Array, k: jax.Array, v: jax.Array,
    now: TokenPositions, block: int, *, packed: bool,
) -> Piece:
    """Tokens q, k, v at `now` and a cache of all tokens, `before` and `after` them.
    packed: they may hold padding and several sequences, of which `after` has one."""
    # one sequence, the cache's: segment 1 where a slot holds a token
    both, segment = after, (after.pos[..., 0] >= 0).astype(jnp.int32)
    if packed:
        both, segment = caches.concat(before, k, v, now)
        segment = jnp.where(both.pos[..., 0] >= 0, segment, 0)
    rows = grid(now.pos, now.segment, min(block, q.shape[1]), packed=packed)
    columns = grid(both.pos[..., 0], segment, block, packed=packed,
                   spare=before.k.shape[1] // block)
    held, wide = caches.of_one_type(both, q)
    return Piece(wide, held, segment, rows, columns)
