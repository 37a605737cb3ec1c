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
