"""Factors: sums of values whose weights are products of features, and of the weights.

    sum_j (q'_t.k'_j) [v_j | 1],    q', k' features of q and k

over j <= t in causal order, else over all j. A column of ones beside v makes both sums
at once. `normalized` divides by the second one; what else papers do with it is theirs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn.recurrent.causal import linear_attention, linear_attention_step
from attn.recurrent.linear import LinearState
from attn.recurrent.noncausal import noncausal_attention


def beside_one(v: jax.Array) -> jax.Array:
    """[v | 1] [B,S,K,V+1] float32."""
    v = v.astype(jnp.float32)
    # the last channel of a sum of weights times [v | 1] is the sum of weights
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def factor_sums(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, chunk: int, **how: Any
) -> jax.Array:
    """The sums [B,T,H,V+1] float32 of features q [B,T,H,D] and k [B,S,K,D], and of v
    [B,S,K,V]. chunk: tokens of a block. how: segments, axis, scale and
    implementation."""
    if causal:
        return linear_attention(q, k, beside_one(v), chunk=chunk, **how)
    return noncausal_attention(q, k, beside_one(v), **how)


def factor_sums_step(
    state: LinearState, q: jax.Array, k: jax.Array, v: jax.Array, **how: Any
) -> tuple[LinearState, jax.Array]:
    """The next T tokens -> state, the sums [B,T,H,V+1] float32, in causal order. The
    state's memory [B,H,D,V+1] holds sums of k' v, and in the last column of k'."""
    return linear_attention_step(state, q, k, beside_one(v), **how)


def normalized(sums: jax.Array, eps: float) -> jax.Array:
    """The sums of values over (those of weights + eps) [B,T,H,V], of weights above 0;
    0 where no key is seen."""
    total = sums[..., -1:]  # sum_j q'_t.k'_j
    return sums[..., :-1] / jnp.where(total > 0, total + eps, 1)
