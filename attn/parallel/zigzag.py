"""Zigzag: tokens laid out so that causal attention is the same work on every shard.

The tokens are cut into 2P pieces and shard p of P gets the p-th and the (2P-1-p)-th:
one that sees little and one that sees much. Zhu, zhuzilin/ring-flash-attention (2024)
and Llama 3 (Dubey et al., 2024, arXiv:2407.21783) balance causal rings so. Each half of
a shard has one destination that no other shard's has, so two permutations do it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


# P = 2: pieces 0 1 | 2 3 become 0 3 | 1 2; of a causal mask's 10 tiles each has 5


def to_zigzag(a: jax.Array, axis: str, dim: int = 1) -> jax.Array:
    """Natural order to zigzag, inside `shard_map`: shard p gets pieces p and 2P-1-p of
    2P along `dim`, whose length on a shard is even."""
    shards = jax.lax.axis_size(axis)
    # half n of shard p is piece 2p + n
    sent = [
        jax.lax.ppermute(half, axis, [(p, _owner(2 * p + n, shards))
                                      for p in range(shards)])
        for n, half in enumerate(jnp.split(a, 2, dim))
    ]
    return jnp.concatenate(_reordered(sent, axis), dim)


def from_zigzag(a: jax.Array, axis: str, dim: int = 1) -> jax.Array:
    """The inverse of `to_zigzag`."""
    shards = jax.lax.axis_size(axis)
    # undone in the other order: first which half is which, then where it came from
    halves = _reordered(jnp.split(a, 2, dim), axis)
    back = [
        jax.lax.ppermute(half, axis, [(_owner(2 * p + n, shards), p)
                                      for p in range(shards)])
        for n, half in enumerate(halves)
    ]
    return jnp.concatenate(back, dim)


def _owner(piece: int, shards: int) -> int:
    # pieces p and 2P-1-p are shard p's
    return min(piece, 2 * shards - 1 - piece)


def _reordered(pair: list[jax.Array], axis: str) -> tuple[jax.Array, jax.Array]:
    """A pair on shards of even number, else (b, a): even pieces are their early ones,
    and the late ones of the others."""
    a, b = pair
    even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.where(even, a, b), jnp.where(even, b, a)
