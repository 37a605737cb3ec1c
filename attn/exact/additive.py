"""Additive scores (Bahdanau et al., 2014, arXiv:1409.0473): v.tanh(q_i + k_j).

q and k are projected already. Queries come one after the other, and the backward pass
computes tanh again, so that no array has tokens, keys and channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attn.exact import dense


def additive_scores(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [B,T,D], k [B,S,D], v [D] -> v.tanh(q_i + k_j) [B,T,S]."""
    one = jax.checkpoint(functools.partial(_of_one, k, v))
    return jax.lax.map(one, q.swapaxes(0, 1)).swapaxes(0, 1)


def _of_one(k, v, q) -> jax.Array:
    """One query [B,D] -> [B,S]."""
    return jnp.tanh(q[:, None] + k) @ v  # [B,S,D] [D]


def additive(q, k, v, values, seen=None) -> jax.Array:
    """Bahdanau's attention: sum_j softmax_j(v.tanh(q_i + k_j)) values_j [B,T,V].

    values [B,S,V]; seen [B,T|1,S]: the keys that may be read; 0 where there is none.
    """
    return dense.weights(additive_scores(q, k, v), seen) @ values
