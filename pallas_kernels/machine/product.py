"""Matrix products of tiles, the same in every kernel: into float32, and named after
what they do to two matrices [rows,columns], as BLAS does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

F32 = jnp.float32
Contract = tuple[tuple[int], tuple[int]]  # the axis of a and that of b summed over
NN: Contract = (1,), (0,)  # a b
NT: Contract = (1,), (1,)  # a b^T
TN: Contract = (0,), (0,)  # a^T b


def dot(a, b, contract: Contract):
    """A matrix product into float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=F32)
