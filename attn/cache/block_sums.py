"""Block sums: the sums of the keys of each block, kept beside a cache of all tokens.

The mean of a block's logits is the product with its mean key: what chooses blocks by it
needs one key a block, however long it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.contract.segments import TokenPositions


def empty(k, size: int, block: int, skip: int = 0) -> jax.Array:
    """Sums [B,N,K,D] float32 of no keys like k [B,.,K,D], for `size` tokens of which
    the first `skip` are in no block."""
    b, _, heads, d = k.shape
    return jnp.zeros((b, max(-(-(size - skip) // block), 1), heads, d), jnp.float32)


def added(
    sums: jax.Array, k: jax.Array, now: TokenPositions, block: int, skip: int = 0
) -> jax.Array:
    """The sums with new keys k [B,T,K,D] at `now`; a new sequence begins with 0."""
    began = (now.segment > 1).any(1)[:, None, None, None]
    at = (now.pos - skip) // block
    there = caches.current(now) & (now.pos >= skip)
    at = jnp.where(there, at, sums.shape[1])  # outside: dropped

    def add(sums, at, k):
        return sums.at[at].add(k.astype(jnp.float32), mode="drop")

    return jax.vmap(add)(jnp.where(began, 0, sums), at, k)
