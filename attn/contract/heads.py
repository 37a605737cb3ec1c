"""Heads: some of them, named by number."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def check_rows(name: str, heads: jax.Array, layers: int) -> None:
    """ValueError unless there is a row of heads [L,H] for each of `layers`."""
    if heads.ndim != 2 or heads.shape[0] != layers:
        raise ValueError(f"{name} has shape {heads.shape}: expected [L,H] with "
                         f"L={layers}, a row for each layer")


def chosen(heads: Sequence[int] | None, count: int) -> jax.Array:
    """[H] float32: 1 for heads of these numbers, all for None, else 0. ValueError for a
    number that is not one of H = `count`."""
    if heads is None:
        return jnp.ones((count,), jnp.float32)
    for head in heads:
        if not 0 <= head < count:
            raise ValueError(f"heads={tuple(heads)}: expected numbers from 0, below "
                             f"H={count}")
    return jnp.zeros((count,), jnp.float32).at[jnp.array(heads, int)].set(1)
