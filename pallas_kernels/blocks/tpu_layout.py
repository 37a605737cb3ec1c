"""How the arrays of chosen blocks lie on TPU: a copy takes a block of queries or keys.

Queries are rows [B,C,N,R,...], R = heads * size: those of query block n for all the
heads that share what they chose. Keys are blocks [B,K,S/block,block,...].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tile import LOW


class Laid(NamedTuple):
    """What the kernels read. q [B,C,N,R,D], k and v [B,K,S/block,block,.]; rows
    [B,C,N,3,R]: position, segment and head of each query row; info [B,S/block,2,block]:
    position and segment of keys, or None where positions count in one segment;
    parts [B,C,N,2,R]: base, in the unit of logits, and delta; do [B,C,N,R,V]."""

    q: Any
    k: Any
    v: Any
    rows: Any
    info: Any
    parts: Any = None
    do: Any = None


def laid(static, side, q, k, v, base=None, delta=None, do=None) -> Laid:
    """The arrays of a call; base, delta [B,T,H] and do where it goes backward."""
    b, t, h, _ = q.shape
    parts = None
    if do is not None:
        # rows that only fill a block get weights 2^(s + LOW) = 0
        parts = jnp.stack([rows(static, base, -LOW), rows(static, delta)], 3)
        do = rows(static, do)
    count = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    q_pos = count if side.q_pos is None else side.q_pos
    q_segment = jnp.ones_like(q_pos) if side.q_segment is None else side.q_segment
    own = [jnp.broadcast_to(a[..., None], (b, t, h)) for a in (q_pos, q_segment)]
    own.append(jnp.broadcast_to(side.head, (b, t, h)))
    return Laid(
        rows(static, q), keys(static, k), keys(static, v),
        jnp.stack([rows(static, a) for a in own], 3), _info(static, side, b), parts, do,
    )


def _info(static, side, b: int):
    """Position and segment of keys [B,S/block,2,block], or None for neither."""
    if side.kv_pos is None and side.kv_segment is None:
        return None
    s, block = static.s, static.block
    count = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
    pos = count if side.kv_pos is None else side.kv_pos
    segments = jnp.ones_like(pos) if side.kv_segment is None else side.kv_segment

    def fill(a, value):
        a = jnp.pad(a, ((0, 0), (0, -s % block)), constant_values=value)
        return a.reshape(b, -1, block)

    return jnp.stack([fill(pos, -1), fill(segments, 0)], 2)


def rows(static, a: jax.Array, value: float = 0) -> jax.Array:
    """[B,T,H,...] -> [B,C,N,R,...], with `value` beyond T."""
    b, t, h = a.shape[:3]
    n, size, heads = static.n, static.size, static.heads
    a = jnp.pad(a, [(0, 0), (0, n * size - t)] + [(0, 0)] * (a.ndim - 2),
                constant_values=value)
    a = a.reshape(b, n, size, h // heads, heads, *a.shape[3:])  # [B,N,size,C,heads,.]
    order = (0, 3, 1, 4, 2, *range(5, a.ndim))  # B, C, N, heads, size
    return a.transpose(order).reshape(b, h // heads, n, heads * size, *a.shape[5:])


def unrows(static, a: jax.Array) -> jax.Array:
    """[B,C,N,R,...] -> [B,T,H,...]: the inverse of `rows`."""
    b, c, n, r = a.shape[:4]
    heads = static.heads
    a = a.reshape(b, c, n, heads, r // heads, *a.shape[4:])  # [B,C,N,heads,size,.]
    order = (0, 2, 4, 1, 3, *range(5, a.ndim))  # B, N, size, C, heads
    return a.transpose(order).reshape(b, -1, c * heads, *a.shape[5:])[:, :static.t]


def keys(static, a: jax.Array) -> jax.Array:
    """k or v [B,S,K,X] -> [B,K,S/block,block,X]."""
    b, s, heads, width = a.shape
    a = jnp.pad(a, ((0, 0), (0, -s % static.block), (0, 0), (0, 0)))
    return a.transpose(0, 2, 1, 3).reshape(b, heads, -1, static.block, width)


def unkeys(static, a: jax.Array) -> jax.Array:
    """[B,K,S/block,block,X] -> [B,S,K,X]: the inverse of `keys`."""
    b, heads = a.shape[:2]
    a = a.reshape(b, heads, -1, a.shape[-1])[:, :, :static.s]  # [B,K,S,X]
    return a.transpose(0, 2, 1, 3)
