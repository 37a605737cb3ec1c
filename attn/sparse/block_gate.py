"""Block gate: pooled tokens, and what a gate of blocks is to say of an attention.

Source: Gao et al., 2024, arXiv:2410.13276, and the code that its authors published.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.exact.dense import logits, weights

POOLS = ("max", "min", "avg")


def check_pools(what: str, pools: Any) -> None:
    """Raises ValueError unless pools are some of POOLS, in their order."""
    right = isinstance(pools, tuple) and pools and all(p in POOLS for p in pools)
    if not right or list(pools) != sorted(pools, key=POOLS.index) or len(
            set(pools)) < len(pools):
        raise ValueError(
            f"{what}={pools!r}: expected a tuple of some of {POOLS}, in order")


def pooled(a: jax.Array, real: jax.Array, pools: tuple[str, ...]) -> jax.Array:
    """Tokens a [B,N I,H,D] on a grid, where real [B|1,N,I] -> [B,N,H,c D] float32, of c
    pools side by side; 0 in a block without tokens."""
    b, slots, h, d = a.shape
    n, size = real.shape[1:]
    a = a.astype(jnp.float32).reshape(b, n, size, h, d)
    real = real[..., None, None]
    some = real.any(2)
    found = {
        "max": lambda: jnp.where(real, a, -jnp.inf).max(2),
        "min": lambda: jnp.where(real, a, jnp.inf).min(2),
        "avg": lambda: jnp.where(real, a, 0).sum(2) / jnp.maximum(
            real.astype(jnp.float32).sum(2), 1),
    }
    return jnp.concatenate([jnp.where(some, found[p](), 0) for p in pools], -1)


def shares(s: jax.Array, seen: jax.Array) -> jax.Array:
    """The softmax of logits [...,n] over what is seen; 0 where nothing is."""
    return weights(s, seen)


def block_maxima(q, k, block: int, scale: float | None) -> jax.Array:
    """The largest weight of causal attention in each pair of blocks: q [B,T,H,D], k
    [B,T,K,D] -> [B,H,n,n] float32, a block of queries at a time."""
    return _maxima(q, k, block, scale, lambda p: p.max(2))


def token_maxima(q, k, block: int, scale: float | None) -> jax.Array:
    """The largest weight that each token gives in each block of keys, and the largest
    of a group: q [B,T,H,D], k [B,T,K,D] -> [B,K,T,n] float32."""
    (b, t, h, _), heads = q.shape, k.shape[2]

    def of_group(p):  # [B,H,I,n] -> [B,K,I,n]
        return p.reshape(b, heads, h // heads, *p.shape[2:]).max(2)

    found = _maxima(q, k, block, scale, of_group)  # [B,K,n,I,n]
    return found.reshape(b, heads, -1, found.shape[-1])[:, :, :t]


def _maxima(q, k, block: int, scale: float | None, pool: Callable) -> jax.Array:
    """`pool` of the largest weights [B,H,I,n] of each block of I queries, a block at a
    time: [B,.,n,...]."""
    b, t, h, d = q.shape
    n = -(-t // block)
    rows = jnp.pad(q, ((0, 0), (0, n * block - t), (0, 0), (0, 0)))
    rows = jnp.moveaxis(rows.reshape(b, n, block, h, d), 1, 0)
    j = jnp.arange(n * block, dtype=jnp.int32)
    k = jnp.pad(k, ((0, 0), (0, n * block - t), (0, 0), (0, 0)))

    def one(args):
        q, number = args
        i = number * block + jnp.arange(block, dtype=jnp.int32)
        seen = (j[None] <= i[:, None]) & (i < t)[:, None]  # [I,S]
        p = weights(logits(q, k, scale), seen[None, None])  # [B,H,I,S]
        # [B,H,I,n,I] -> [B,H,I,n]: of each query the largest weight in each block
        return pool(p.reshape(b, h, block, n, block).max(4))

    found = jax.lax.map(one, (rows, jnp.arange(n, dtype=jnp.int32)))
    return jnp.moveaxis(found, 0, 2)


def divergence(target: jax.Array, s: jax.Array) -> jax.Array:
    """The mean over all numbers of t (log t - log softmax(s)), t [...,n]; 0 log 0 is
    0."""
    some = target > 0
    # KL(target || softmax(s)), term by term
    gap = jnp.log(jnp.where(some, target, 1)) - jax.nn.log_softmax(s)
    return jnp.where(some, target * gap, 0).mean()
