"""Block pools: what the keys of each block are pooled to while blocks are filled.

Beside a cache of all tokens: the greatest and least value of each channel, and the sum,
of the keys so far. A block that no token has reached holds zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.contract.segments import TokenPositions


def added(
    pools: jax.Array, kinds: tuple[str, ...], k: jax.Array, now: TokenPositions,
    had: jax.Array, block: int,
) -> jax.Array:
    """pools [B,N,K,c D] float32, side by side as `kinds` says ("max", "min", and "avg",
    the sum), with new keys k [B,T,K,D] at `now`. had [B]: tokens of the sequence before
    them, 0 where a new one begins."""
    (b, _, heads, d), many = k.shape, pools.shape[1]
    number = jnp.arange(many, dtype=jnp.int32)[None]
    filled = (number * block < had[:, None])[..., None, None]
    old = jnp.moveaxis(pools.reshape(b, many, heads, -1, d), 3, 0)  # [c,B,N,K,D]
    at = jnp.where(caches.current(now), now.pos // block, many)  # outside: dropped
    row, k = jnp.arange(b)[:, None], k.astype(jnp.float32)

    def pooled(kind: str, a: jax.Array) -> jax.Array:
        start = {"max": -jnp.inf, "min": jnp.inf, "avg": 0}[kind]
        into = jnp.where(filled, a, start).at[row, at]
        if kind == "avg":
            return into.add(k, mode="drop")
        return (into.max if kind == "max" else into.min)(k, mode="drop")

    found = jnp.stack([pooled(*each) for each in zip(kinds, old)], 3)
    return jnp.where(jnp.isinf(found), 0, found).reshape(b, many, heads, -1)
