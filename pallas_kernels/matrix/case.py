"""A case of the compile matrix: one program with its arguments, none of them there."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

BF16, F32 = jnp.bfloat16, jnp.float32


class TripCounts(NamedTuple):
    """How often a TPU kernel's regions run: each tile region, what opens and closes a
    line, and the grid's step; flops: of the kernel's matrix products, padding and all,
    by how its name goes on ("": in any other way), 0 where nobody counted them."""

    tiles: tuple[int, ...]
    lines: int
    steps: int
    flops: dict[str, float] = {}

    def products(self, rest: str) -> float:
        """Flops of the kernel whose name goes on with `rest`."""
        ends = (n for end, n in self.flops.items() if end and rest.startswith(end))
        return next(ends, self.flops.get("", 0.0))


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. build(target) -> (f, arguments as ShapeDtypeStructs, `TripCounts` on
    TPU by what a kernel's name holds).
    flops: of one run, for the share of the peak; moved: bytes that have to move; whole:
    XLA's own programs are of interest too; peer: not ours, beside which ours stand;
    near_duplicate: another case is so near that `--quick` leaves this one out."""

    build: Callable[[Any], tuple[Callable, tuple, dict[str, TripCounts]]]
    flops: float = 0.0
    moved: float = 0.0
    whole: bool = False
    peer: bool = False
    near_duplicate: bool = False


def struct(*shape, dtype=BF16):
    """An array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype)


def with_gradients(f: Callable) -> Callable:
    """(args, cotangent) -> the gradients of f's first result."""
    def both(args, do):
        return jax.vjp(lambda *a: f(*a), *args)[1](do)

    return both
