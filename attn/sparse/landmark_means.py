"""Landmark means: a sequence cut into c spans of nearly one length, and their means.

Of n tokens, n = c s + r, the first c - r spans have s tokens and the last r have s + 1;
of fewer tokens than c each is a span of its own, and the other spans are empty.

Source: as in Comprehensive Attention Benchmarking (Zhang et al., 2022)
arXiv:2210.07661; the original of Nystromformer wants multiples of c.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spans(NamedTuple):
    """member [B,T,c] float32: 1 where a token belongs to a span; there [B,c] bool:
    spans that have tokens; whole [B] bool: each token is a span of its own."""

    member: jax.Array
    there: jax.Array
    whole: jax.Array

    def means(self, a: jax.Array) -> jax.Array:
        """The means of a [B,T,H,D] float32, [B,c,H,D]; 0 of empty spans."""
        count = self.member.sum(1)[..., None, None]
        # [c,T] [T,D]
        return jnp.einsum("btc,bthd->bchd", self.member, a) / jnp.maximum(count, 1)


def spans(real: jax.Array, c: int) -> Spans:
    """The c spans of the tokens that are `real` [B,T] bool."""
    n = real.sum(1, dtype=jnp.int32)[:, None]  # [B,1]
    rank = jnp.cumsum(real, 1, dtype=jnp.int32) - 1  # [B,T]
    short = n // c
    first = c - n % c  # spans of the shorter length
    behind = rank - first * short  # past them
    index = jnp.where(
        behind < 0, rank // jnp.maximum(short, 1), first + behind // (short + 1))
    index = jnp.where(n <= c, rank, index)
    landmark = jnp.arange(c, dtype=jnp.int32)[None, None]
    member = (index[..., None] == landmark) & real[..., None]
    return Spans(member.astype(jnp.float32), member.any(1), n[:, 0] <= c)
