"""Additive scores (Bahdanau et al., 2014, arXiv:1409.0473): v.tanh(q_i + k_j).

q and k are projected already. The sum over channels runs while tanh is computed, and
the backward pass computes tanh again, so that no array has tokens, keys and channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.exact import dense


@jax.checkpoint
def additive_scores(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [B,T,D], k [B,S,D], v [D] -> v.tanh(q_i + k_j) [B,T,S], in q's type or
    better."""
    # a product and a sum, not a matrix product, whose operand would be written out
    return (v * jnp.tanh(q[:, :, None] + k[:, None])).sum(-1)


def additive(q, k, v, values, seen=None) -> jax.Array:
    """Bahdanau's attention: sum_j softmax_j(v.tanh(q_i + k_j)) values_j [B,T,V].

    values [B,S,V]; seen [B,T|1,S]: the keys that may be read; 0 where there is none.
    """
    return dense.weights(additive_scores(q, k, v), seen) @ values
