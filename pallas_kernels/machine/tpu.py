"""Moves of vectors between lanes and sublanes of a TPU's registers."""

from __future__ import annotations

import jax.numpy as jnp


def column(row):
    """[1,n] -> [n,1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
