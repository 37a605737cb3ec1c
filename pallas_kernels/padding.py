"""Padding: tokens of segment 0 may hold anything, NaN included, and are never read.

A product with 0 does not remove a NaN, so what kernels are given is replaced by 0 there
before they see it. Where no segments are given nothing is done.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def blank(segment: Any, *arrays: Any) -> tuple[Any, ...]:
    """Arrays [B,T,...] with 0 where segment [B,T] is 0; None stays None."""
    if segment is None:
        return arrays

    def real(a):
        return (segment > 0).reshape(segment.shape + (1,) * (a.ndim - 2))

    return tuple(
        a if a is None else jnp.where(real(a), a, jnp.zeros((), a.dtype))
        for a in arrays)
