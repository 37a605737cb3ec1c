"""The clock of this machine's device, for `pallas_kernels.tune`: which target it is,
what candidates are timed on, and the table that a winner is written to."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tables
from pallas_kernels.matrix.targets import TARGETS, Gpu, Tpu
from pallas_kernels.tune.rows import Row

ROUNDS = 5


def drawn(args: Any) -> Any:
    """Arrays in place of ShapeDtypeStructs: short keys, and, in float32, decays below
    1, so that no recurrence grows without bound."""
    def draw(n, a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jax.random.randint(jax.random.key(n), a.shape, 0, 100, a.dtype)
        x = jax.random.normal(jax.random.key(n), a.shape) / a.shape[-1] ** 0.5
        return (x if a.dtype != np.float32 else -abs(x)).astype(a.dtype)

    leaves, tree = jax.tree.flatten(args)
    return jax.tree.unflatten(tree, [draw(n, a) for n, a in enumerate(leaves)])


def timed_cost(target, backend: str, row: Row, tile) -> float:
    """Seconds of a candidate on this machine's device, the median of some runs."""
    f, args, _ = row.program(target, backend)
    given = drawn(args)
    run = jax.jit(f).lower(*given).compile()
    jax.block_until_ready(run(*given))
    times = []
    for _ in range(ROUNDS):
        clock = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - clock)
    return float(np.median(times))


def write(kind: str, row: dict[str, Any]) -> None:
    """Puts a device's row into the table."""
    table = json.loads(tables.TABLE.read_text()) | {kind: row}
    tables.TABLE.write_text(tables.text(table))


def named(kind: str, capability: str = "") -> Tpu | Gpu | None:
    """The target that a device is, under the device's own name: one of its kind, or a
    GPU of its compute capability, as "9.0"; None if it is none of them."""
    own = next((t for t in TARGETS.values() if t.kind == kind), None)
    if own is not None or not capability:
        return own
    near = next((t for t in TARGETS.values() if isinstance(t, Gpu) and
                 capability == ".".join(map(str, t.capability))), None)
    return near and dataclasses.replace(near, kind=kind)


def here() -> Tpu | Gpu | None:
    """The target that this machine's own device is."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    return named(device.device_kind, device.compute_capability if gpu else "")
