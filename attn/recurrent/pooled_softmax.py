"""Pooled softmax: the answer over all keys of each token's segment, without an order.

Sorting by segment puts the keys of each in front of its queries, and the prefix softmax
of `attn/recurrent/scan.py` then gives a query the pool of all of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.parallel.sharding import Axis, gather
from attn.recurrent.noncausal import by_segment
from attn.recurrent.scan import prefix_softmax


def pooled_softmax(
    scores: jax.Array,
    v: jax.Array,
    q_segment: jax.Array,
    kv_segment: jax.Array,
    *,
    chunk: int = 16,
    axis: Axis | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o [B,T,H,V] in v's dtype of keys with scores [B,S,H] and v [B,S,K,V], one pool
    for each segment of q_segment [B,T] and kv_segment [B,S]; 0 is padding. axis: the
    mesh axis that T and S are split over, inside `shard_map`; keys are gathered."""
    scores, v, kv_segment = (gather(a, axis) for a in (scores, v, kv_segment))
    # a query stands behind the keys of its segment, as a token that weighs nothing
    keys = jnp.stack([scores, jnp.ones_like(scores)], -1)  # [B,S,H,2], 0 at queries

    def read(q, keys, v, segment):
        s = jnp.where(keys[..., 1] > 0, keys[..., 0], -jnp.inf)
        return prefix_softmax(
            s, v, segment=segment, chunk=chunk, dtype=v.dtype,
            implementation=implementation)[1]

    nobody = jnp.zeros((*q_segment.shape, 1, 1), v.dtype)  # queries bring no numbers
    return by_segment(read, nobody, keys, v, q_segment, kv_segment)
