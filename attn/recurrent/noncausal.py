"""Noncausal: linear attention in which every query sees every key of its segment.

Without an order there is no recurrence: the sum over all keys comes first, and a mesh
adds up one state. Where a row holds several segments, sorting by them makes an order
that the recurrences of this library can read.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.dispatch import pick
from attn.contract.segments import segment_indices
from attn.parallel.sharding import Axis, gather, over_mesh, spread_heads
from attn.recurrent.linear import recurrence


def noncausal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: Any = None,
    axis: Axis | None = None,
    scale: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """scale o [B,T,H,V] float32, o of `noncausal`, over a mesh if there is an axis.
    segments [B,T], or a pair of [B,T] and [B,S]. There is XLA for it, and no kernel."""
    where = segment_indices(segments, q, ordered=False)
    k, v = (spread_heads(a, q.shape[2], axis) for a in (k, v))

    def local(q, k, v, q_segment, kv_segment):
        return noncausal(
            q, k, v, q_segment=q_segment, kv_segment=kv_segment, axis=axis)

    f = over_mesh(local, "BTHD BSKD BSKV BT BS -> BTHV", axis)
    o = pick(implementation, xla=functools.partial(f, q, k, v, *where))
    return o if scale == 1 else scale * o


def noncausal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment: jax.Array | None = None,
    kv_segment: jax.Array | None = None,
    axis: Axis | None = None,
) -> jax.Array:
    """o = q (K^T V) [B,T,H,V] float32: every query sees every key of its segment,
    whatever their order. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V], segments [B,T] and
    [B,S], 0 is padding. With `axis`, T and S are split over that mesh axis: one state
    is summed by an all-reduce, forward and backward, which moves about 2/W of the bytes
    of LASP-2's all-gather; or, with segments, the keys and values are gathered."""
    if kv_segment is not None:
        keys, values, segments = (gather(a, axis) for a in (k, v, kv_segment))
        return by_segment(_sums, q, keys, values, q_segment, segments)
    b, t, h, d = q.shape
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    state = jnp.einsum("bskd,bskv->bkdv", k, v)  # K^T V: [D,S] [S,V]
    state = state if axis is None else jax.lax.psum(state, axis)
    q = q.reshape(b, t, k.shape[2], -1, d)  # [B,T,K,G,D]
    return jnp.einsum("btkgd,bkdv->btkgv", q, state).reshape(b, t, h, -1)  # [T,D] [D,V]


def _sums(q, k, v, segment) -> jax.Array:
    return recurrence(q, k, v, segment=segment)[1]


def by_segment(causal: Callable, q, k, v, q_segment, kv_segment) -> jax.Array:
    """What causal(q, k, v, segment) -> o [B,T,H,V] gives without an order:
    keys and queries are sorted by segment, the keys of each in front of its queries."""
    t, s = q_segment.shape[1], k.shape[1]
    segments = jnp.concatenate([kv_segment, q_segment], 1)  # [B,S+T]
    order = jnp.argsort(segments, axis=1, stable=True)
    # where each query went
    back = jnp.argsort(order, axis=1)[:, s:]

    def take(a, at):
        return jnp.take_along_axis(a, at.reshape(at.shape + (1,) * (a.ndim - 2)), 1)

    def widen(a, before, after):
        return jnp.pad(a, ((0, 0), (before, after), (0, 0), (0, 0)))

    q, k, v = widen(q, s, 0), widen(k, 0, t), widen(v, 0, t)  # [B,S+T,H,.]
    o = causal(*(take(a, order) for a in (q, k, v)), take(segments, order))
    return take(o, back)
