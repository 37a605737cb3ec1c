"""Few of many slots: what one token reads of a long cache, as a small cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.cache.kv import Cache


def at_slots(cache: Cache, at: jax.Array) -> Cache:
    """The slots `at` [B,N,H], -1 for none, of a cache whose heads hold the same tokens:
    a cache of N slots and H heads; head h reads key head h // (H/K)."""
    h, heads = at.shape[2], cache.k.shape[2]
    of = jnp.arange(h)[None] // (h // heads)

    def row(a, at):  # [C,K,X], [N,H] -> [N,H,X], with one index a slot and head
        return a.at[jnp.maximum(at, 0), of].get(mode="clip")

    pos = jax.vmap(lambda a, at: a.at[jnp.maximum(at, 0)].get(mode="clip"))(
        cache.pos[..., 0], at)
    return cache._replace(
        k=jax.vmap(row)(cache.k, at), v=jax.vmap(row)(cache.v, at),
        pos=jnp.where(at < 0, -1, pos),
    )


def of_blocks(chosen: jax.Array, block: int, pos: jax.Array) -> jax.Array:
    """The slots [B,n block,H] of chosen blocks [B,H,n], -1 for none, of a cache whose
    slots are positions; of the tokens up to pos [B]."""
    b, h = chosen.shape[:2]
    inside = jnp.arange(block, dtype=jnp.int32).reshape(1, 1, 1, -1)
    slot = chosen[..., None] * block + inside
    there = (chosen >= 0)[..., None] & (slot <= pos[:, None, None, None])
    return jnp.moveaxis(jnp.where(there, slot, -1).reshape(b, h, -1), 1, 2)
