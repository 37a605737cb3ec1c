"""Cases of the linear memory: shapes and options that are compiled for every target."""

from __future__ import annotations

import functools
from typing import Any

import jax

from pallas_kernels.matrix.case import BF16, F32, Case, TripCounts, struct
from pallas_kernels.memory.api import STEP, memory
from pallas_kernels.memory.chunk import Numbers

MEMORY: dict[str, dict[str, Any]] = {
    "chunk 16 T8192 D64 H16": {"t": 8192, "d": 64},
    "chunk 64 T8192 D128 H16": {"t": 8192, "d": 128, "c": 64},
    "chunk 32 T4096 D256 H4": {"t": 4096, "d": 256, "c": 32, "h": 4},
    "odd chunk 16 T1000 D24 V40 H4 float32": {
        "t": 1000, "d": 24, "v": 40, "h": 4, "dtype": F32},
}
NEAR_DUPLICATES = "chunk 32",


def learned(target, *, backend, backward, t, d, v=None, c=16, h=16, dtype=BF16):
    """memory, forward or forward and backward."""
    n, width = -(-t // c), v or d
    arrays = [struct(1, t, h, size, dtype=dtype) for size in (d, d, width)]
    numbers = Numbers(*(struct(1, h, n, *shape, dtype=F32) for shape in (
        (c + 1,), (c + 1,), (c + 1, c), (), (c,))))
    states = [struct(1, h, d, width, dtype=F32)] * 2
    steps = h * -(-t // STEP)
    trips = {f"memory_{way}": TripCounts((steps,), h, steps)
             for way in ("forward", "backward")[:1 + backward] if backend == "tpu"}

    def f(arrays, numbers, states):
        q, k, v = arrays
        return memory(q, k, v, numbers, *states, backend=backend)[2]

    if not backward:
        return f, (arrays, numbers, states), trips

    def both(arrays, numbers, states, do):
        return jax.vjp(f, arrays, numbers, states)[1](do)

    return both, (arrays, numbers, states, arrays[2]), trips


def work(t, d, v=None, c=16, h=16, backward=False, **options) -> float:
    """Flops of the chunks' products, forward, and 2.5 times that backward."""
    width = v or d
    each = 10 * c * d * width + 2 * c * c * (d + width)
    return h * -(-t // c) * each * (3.5 if backward else 1)


def memories(backend: str, way: str, label: str) -> dict[str, Case]:
    """The cases of a backend; way: "forward" or "backward"."""
    backward, found = way == "backward", {}
    for name, options in MEMORY.items():
        found[f"memory {way}{label} {name}"] = Case(
            functools.partial(learned, backend=backend, backward=backward, **options),
            work(backward=backward, **options),
            near_duplicate=name.startswith(NEAR_DUPLICATES))
    return found
