"""Dense softmax attention, for ideas that need the matrix: logits of all pairs, weights
of those that are seen, weighted values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.contract.shapes import check
from attn.exact.logits import LogitSpec, Where
from attn.exact.online import EMPTY, OnlineSoftmax
from attn.masks import Mask
from pallas_kernels.tile import NEVER


def logits(q: jax.Array, k: jax.Array, scale: float | None = None) -> jax.Array:
    """scale * q.k as float32 [B,H,T,S]; query head h reads key head h // (H/K)."""
    b, t, h, d = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, d)
    # [B,T,K,G,D] x [B,S,K,D] -> [B,K,G,T,S]
    s = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    return (s * (d**-0.5 if scale is None else scale)).reshape(b, h, t, -1)


def weights(s: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """Softmax of logits [...,S] over the keys that are `seen`; all zero if none is."""
    s = s if seen is None else jnp.where(seen, s, NEVER)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True, initial=NEVER))
    # where no key is seen, top is -inf, and exp(-inf - 0) = 0
    p = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)


def values(p: jax.Array, v: jax.Array) -> jax.Array:
    """Weights p [B,H,T,S] times v [B,S,K,V] -> [B,T,H,V] in v's dtype."""
    b, h, t, s = p.shape
    grouped = p.astype(v.dtype).reshape(b, v.shape[2], -1, t, s)  # [B,K,G,T,S]
    # [B,K,G,T,S] x [B,S,K,V] -> [B,T,K,G,V]
    o = jnp.einsum(
        "bkgts,bskv->btkgv", grouped, v, preferred_element_type=jnp.float32
    )
    return o.reshape(b, t, h, -1).astype(v.dtype)


def allowed(mask: Mask, where: Where) -> jax.Array:
    """The mask at given positions, as booleans that broadcast to [B,H,T,S].

    A kv_pos [B,S,H] of `where` has one position a head.
    """
    # queries along T, keys along S: [B,1,T,1] and [B,1|H,1,S]
    i = where.q_pos[:, None, :, None]
    kv_pos = where.kv_pos[..., None] if where.kv_pos.ndim == 2 else where.kv_pos
    j = jnp.moveaxis(kv_pos, 2, 1)[:, :, None]
    h = None if where.head is None else where.head[None, :, None, None]
    seen = mask(h, i, j) & (j >= 0)
    if where.q_segment is None or where.kv_segment is None:
        return seen
    own = where.q_segment[:, None, :, None]
    other = where.kv_segment[:, None, None, :]
    return seen & (own == other) & (other > 0)


def partial(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(),
    where: Where = Where(),
) -> OnlineSoftmax:
    """The online softmax state [B,T,H] of these keys, whose logits are one array.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]. Of `spec` mask and scale count.
    """
    check(q, k, v)
    t, s = q.shape[1], k.shape[1]
    q_pos, kv_pos = where.q_pos, where.kv_pos
    if where.counted:
        q_pos = jnp.arange(s - t, s, dtype=jnp.int32)[None]
        kv_pos = jnp.arange(s, dtype=jnp.int32)[None]
    head = jnp.arange(q.shape[2], dtype=jnp.int32)
    seen = allowed(
        spec.mask, Where(q_pos, kv_pos, where.q_segment, where.kv_segment, head)
    )
    x = jnp.where(seen, logits(q, k, spec.scale), EMPTY)  # [B,H,T,S]
    m = jax.lax.stop_gradient(x.max(-1))  # o does not depend on it
    # where nothing is seen exp(EMPTY - EMPTY) is 1: the mask acts again
    p = jnp.where(seen, jnp.exp(x - m[..., None]), 0)
    l, acc = p.sum(-1), values(p, v.astype(jnp.float32))
    return OnlineSoftmax(m.swapaxes(1, 2), l.swapaxes(1, 2), acc)
