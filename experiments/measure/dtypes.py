"""Dtypes: the element types that a command computes in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checked_dtype(name: str, value: Any) -> None:
    """ValueError unless `value` is an element type of real numbers that jax has."""
    wanted = "expected jnp.float32, jnp.bfloat16 or jnp.float16"
    try:
        if not isinstance(value, np.dtype) and not hasattr(value, "dtype"):
            raise TypeError
        kind = jnp.dtype(value)
    except TypeError:
        raise ValueError(f"{name}={value}: {wanted}") from None
    if not jnp.issubdtype(kind, jnp.floating) or kind.itemsize < 2:
        raise ValueError(f"{name}={kind}: {wanted}")
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        raise ValueError(f"{name}={kind}: {wanted}; float64 is there with "
                         "JAX_ENABLE_X64=1")
