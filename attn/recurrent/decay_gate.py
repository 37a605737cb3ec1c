"""What gates of decay begin with, as Mamba2 has them (Dao & Gu, 2024,
arXiv:2405.21060): the log of a decay is -exp(A) softplus(x W + b).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def log_rates(key, shape):
    """log A, A uniform in (0,16)."""
    # not from 0, whose log is -inf
    return jnp.log(jax.random.uniform(key, shape, minval=1e-4, maxval=16.0))


def small_steps(key, shape):
    """The inverse softplus of steps that are log uniform between 0.001 and 0.1."""
    low, high = jnp.log(0.001), jnp.log(0.1)
    step = jnp.exp(jax.random.uniform(key, shape) * (high - low) + low)
    # log(e^y - 1) as y + log(1 - e^-y): exact for small y too
    return step + jnp.log(-jnp.expm1(-step))
