"""Padding: tokens of run 0 may hold anything, NaN included, and are never read.

A product with 0 does not remove a NaN, so what kernels are given is replaced by 0 there
before they see it. Where no runs are given nothing is done.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def blank(run: Any, *arrays: Any) -> tuple[Any, ...]:
    """Arrays [B,T,...] with 0 where run [B,T] is 0; None stays None."""
    if run is None:
        return arrays

    def real(a):
        return (run > 0).reshape(run.shape + (1,) * (a.ndim - 2))

    return tuple(
        a if a is None else jnp.where(real(a), a, jnp.zeros((), a.dtype))
        for a in arrays)
