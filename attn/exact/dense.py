"""Softmax attention in three steps, for ideas that need the matrix of scores: logits of
all pairs, weights of those that are seen, weighted values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.masks import Mask
from pallas_kernels.tile import NEVER


def logits(q: jax.Array, k: jax.Array, scale: float | None = None) -> jax.Array:
    """scale * q.k as float32 [B,H,T,S]; query head h reads key head h // (H/K)."""
    b, t, h, d = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, d)
    s = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    return (s * (d**-0.5 if scale is None else scale)).reshape(b, h, t, -1)


def weights(s: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Softmax of logits [...,S] over the keys that are `seen`; all zero if none is."""
    s = s if seen is None else jnp.where(seen, s, NEVER)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True, initial=NEVER))
    p = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)


def values(p: jax.Array, v: jax.Array) -> jax.Array:
    """Weights p [B,H,T,S] times v [B,S,K,V] -> [B,T,H,V] in v's dtype."""
    b, h, t, s = p.shape
    grouped = p.astype(v.dtype).reshape(b, v.shape[2], -1, t, s)
    o = jnp.einsum(
        "bkgts,bskv->btkgv", grouped, v, preferred_element_type=jnp.float32
    )
    return o.reshape(b, t, h, -1).astype(v.dtype)


def allowed(
    mask: Mask,
    q_pos: jax.Array,
    kv_pos: jax.Array,
    q_run: jax.Array | None = None,
    kv_run: jax.Array | None = None,
    head: jax.Array | None = None,
) -> jax.Array:
    """The mask at given positions, as booleans that broadcast to [B,H,T,S].

    q_pos [B|1,T]; kv_pos [B|1,S] or, per head, [B,S,H]; -1 is an empty slot. Runs as
    in `attn.contract.segments`: a token sees its own run, and padding is run 0.
    head [H].
    """
    i = q_pos[:, None, :, None]
    per_head = kv_pos.ndim == 3
    j = jnp.moveaxis(kv_pos, 2, 1)[:, :, None] if per_head else kv_pos[:, None, None]
    h = None if head is None else head[None, :, None, None]
    seen = mask(h, i, j) & (j >= 0)
    if q_run is not None and kv_run is not None:
        q_r, k_r = q_run[:, None, :, None], kv_run[:, None, None, :]
        seen = seen & (q_r == k_r) & (k_r > 0)
    return seen
