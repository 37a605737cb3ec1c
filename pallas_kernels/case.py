"""A case of the compile matrix: one program with its arguments, none of them there."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp

BF16, F32 = jnp.bfloat16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. build(target) -> (f, arguments as ShapeDtypeStructs, trips on TPU by
    the start of a kernel's name: (passes of each tile region, lines, grid steps)).
    flops: of one run, for the share of the peak; moved: bytes that have to move; whole:
    XLA's own programs are of interest too; peer: not ours, beside which ours stand;
    kin: another case is so near that `--quick` leaves this one out."""

    build: Callable[[Any], tuple[Callable, tuple, dict[str, Any]]]
    flops: float = 0.0
    moved: float = 0.0
    whole: bool = False
    peer: bool = False
    kin: bool = False


def struct(*shape, dtype=BF16):
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype)


def with_gradients(f: Callable) -> Callable:
    """(args, cotangent) -> the gradients of f's first result."""
    def both(args, do):
        return jax.vjp(lambda *a: f(*a), *args)[1](do)

    return both
