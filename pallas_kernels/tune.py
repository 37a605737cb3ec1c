"""Fills the tile tables: tries candidates for a target and keeps the best.

    python -m pallas_kernels.tune --targets v5e,v6e       # by what the compiler says
    python -m pallas_kernels.tune --timed                 # by the clock of this device
    python -m pallas_kernels.tune --kernels linear,delta  # not all of them

Without the accelerator, a TPU candidate costs its bundles times their trips (see
`pallas_kernels/readings.py`), which is exact for what the compiler scheduled and knows
nothing of the memory system. A GPU has no such schedule to read: a candidate that
spills registers is dropped, and what is left is ranked, for flash, blocks and decode,
by the time of the busiest loop's pass for each logit (`pallas_kernels/passes_gpu.py`),
among equals by a warp's own; for recurrences, whose loops are not alike, by how much of
a chunk a multiprocessor keeps in flight, among equals by registers. The kernels of
Mosaic GPU, which share out registers themselves, keep their tiles. Kernels of one
program are tried one by one, as far as each has a row of its own. Where the device is
there, --timed runs every candidate instead, and its row is written under the device's
own name. What does not compile, because it asks for more fast memory than there is, is
passed over. About ten minutes a target and family of kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys
import tempfile
import time
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    figures, readings, readings_gpu, tables, tune_exact, tune_recurrent
)
from pallas_kernels.targets import TARGETS, Gpu, Tpu, compiled, missing, worker

WIDTHS = {"d128": 128, "d256": 256}
FAMILIES = (*tune_exact.ROWS, "linear", "delta", "scan")
SUMS = ("merge", "_sum")  # kernels that add up parts, whatever the tile
ROUNDS = 5
Tile = tuple[int, ...]


class Row(NamedTuple):
    """A row of the table: a kernel, the class of its widths, and what else it is of."""

    which: str
    label: str
    kind: str

    @property
    def width(self) -> int:
        """The width that is tried."""
        return WIDTHS[self.label]

    @property
    def recurrent(self) -> bool:
        """Whether it is of a recurrence."""
        return self.which.split("_")[0].split()[0] not in tune_exact.ROWS

    def place(self, backend: str) -> tuple[str, str]:
        """The row's name in the table, and the class of shapes in it."""
        kernel, *channels = self.which.split()
        name = kernel if backend == "tpu" else f"{backend}_{kernel}"
        known = backend in tables.PADDED
        padded = tables.padded(self.width, self.width, backend) if known else None
        return name, padded or " ".join([self.label, self.kind, *channels])

    def candidates(self, backend: str) -> Iterator[Tile]:
        """The numbers that are tried."""
        if self.recurrent:
            return tune_recurrent.candidates(backend, self.which)
        return tune_exact.candidates(backend, self.width, self.which, self.kind)

    def program(self, target: Tpu | Gpu, backend: str, tile: Tile) -> Any:
        """The function of a candidate, its arguments and its trips."""
        if self.recurrent:
            return tune_recurrent.program(target, backend, self.which,
                                          tune_exact.LENGTH, self.width)
        return tune_exact.program(
            target, backend, self.which, self.width, self.kind, tile)

    def reads(self, backend: str, kernel: str) -> bool:
        """Whether a kernel is one of the row's."""
        name = self.which
        if self.recurrent:
            name = tune_recurrent.read(name, backend)
        return name in kernel and not any(part in kernel for part in SUMS)


def static_cost(folder: pathlib.Path, target, backend: str, row: Row, tile) -> Any:
    """What ranks a candidate by what the compiler says; None to drop it."""
    for path in folder.iterdir():
        path.unlink()
    f, args, trips = row.program(target, backend, tile)
    compiled(target, f, *args)
    if isinstance(target, Gpu):
        found = [k for n, k in readings_gpu.programs(folder).items()
                 if row.reads(backend, n)]
        if not found or any(k.spills for k in found):
            return None
        area = math.prod(tile[:2])
        if not row.recurrent:
            each = [k.cycles(target, row.which == "decode") for k in found]
            return tuple(sum(cycles) / area for cycles in zip(*each))
        flight = min(k.blocks(target) for k in found) * area
        return -flight, max(k.registers for k in found)
    counts = [figures.cycles(target, p, start, own)
              for n, p in readings.programs(folder).items()
              for start, own in trips.items() if row.reads(backend, n) and start in n]
    known = [n for n in counts if n is not None]
    return sum(known) / target.clock / target.cores if known else None


def timed_cost(target, backend: str, row: Row, tile) -> float:
    """Seconds of a candidate on this machine's device, the median of some runs."""
    f, args, _ = row.program(target, backend, tile)

    def draw(n, a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jax.random.randint(jax.random.key(n), a.shape, 0, 100, a.dtype)
        # short keys, and decays below 1, so that no recurrence grows without bound
        x = jax.random.normal(jax.random.key(n), a.shape) / a.shape[-1] ** 0.5
        return (x if a.dtype != np.float32 else -abs(x)).astype(a.dtype)

    leaves, tree = jax.tree.flatten(args)
    given = jax.tree.unflatten(tree, [draw(n, a) for n, a in enumerate(leaves)])
    run = jax.jit(f).lower(*given).compile()
    jax.block_until_ready(run(*given))
    times = []
    for _ in range(ROUNDS):
        clock = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - clock)
    return float(np.median(times))


def rows(families: Sequence[str], backend: str) -> Iterator[Row]:
    """The rows of the table that are tuned, by the kernels that they are of."""
    for family, label in itertools.product(families, WIDTHS):
        if family in tune_exact.ROWS:
            for which in tune_exact.rows(family, backend):
                for kind in tune_exact.kinds(which, backend):
                    yield Row(which, label, kind)
        else:
            for which in tune_recurrent.rows(family, backend):
                yield Row(which, label, "f16")


def tuned(target: Tpu | Gpu, cost: Callable, backends: Sequence[str],
          families: Sequence[str] = FAMILIES) -> dict[str, Any]:
    """The target's block of the table: the best tile of each row."""
    block: dict[str, Any] = json.loads(json.dumps(
        tables.row(target.kind, target.backends[0])))
    for backend in backends:
        for row in rows(families, backend):
            name, kind = row.place(backend)
            costs: dict[Tile, Any] = {}
            plain = isinstance(block[name].get(kind), int)
            numbers = lambda tile: tile[0] if plain else list(tile)
            for tile in row.candidates(backend):
                said = f"{target.name} {backend} {' '.join(row)} {tile}"
                try:
                    with tables.trial(target.kind, name, kind, numbers(tile), backend):
                        found = cost(target, backend, row, tile)
                except Exception as error:  # any compiler's reason drops it
                    text = (str(error).splitlines() or [""])[0][:90]
                    print(f"{said}: {text}", file=sys.stderr)
                    continue
                if found is not None:
                    costs[tile] = found
                    print(f"{said}: {found}", flush=True)
            if costs:
                block[name][kind] = numbers(min(costs, key=lambda tile: costs[tile]))
    return block


def write(kind: str, row: dict[str, Any]) -> None:
    """Puts a device's row into the table."""
    table = json.loads(tables.TABLE.read_text()) | {kind: row}
    tables.TABLE.write_text(tables.text(table))


def here() -> Tpu | Gpu | None:
    """The target that this machine's own device is, under its own name: one of its
    kind, or a GPU of its compute capability."""
    device = jax.devices()[0]
    own = next((t for t in TARGETS.values() if t.kind == device.device_kind), None)
    if own is not None or device.platform != "gpu":
        return own
    near = next((t for t in TARGETS.values() if isinstance(t, Gpu) and
                 device.compute_capability == ".".join(map(str, t.capability))), None)
    return near and dataclasses.replace(near, kind=device.device_kind)


def main(arguments: list[str]) -> int:
    """Tunes target after target, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="v5e,v5p,v6e", help="of v4, v5e, v5p, ...")
    parser.add_argument("--kernels", default=",".join(FAMILIES), help="of them some")
    parser.add_argument("--timed", action="store_true", help="time on this device")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    families = given.kernels.split(",")
    if unknown := set(families) - set(FAMILIES):
        print(f"--kernels={','.join(sorted(unknown))}: expected some of "
              f"{','.join(FAMILIES)}", file=sys.stderr)
        return 2
    if given.worker:
        target = TARGETS[given.targets]
        cost = functools.partial(static_cost, pathlib.Path(given.worker))
        static = [b for b in target.backends if b != "mosaic"]
        write(target.kind, tuned(target, cost, static, families))
        return 0
    if given.timed:
        own = here()
        if own is None:
            print(f"--timed: {jax.devices()[0].device_kind} is none of the targets "
                  f"({', '.join(t.kind for t in TARGETS.values())})", file=sys.stderr)
            return 2
        write(own.kind, tuned(own, timed_cost, own.backends, families))
        return 0
    names = given.targets.split(",")
    if unknown := set(names) - set(TARGETS):
        print(f"--targets={','.join(sorted(unknown))}: expected some of "
              f"{','.join(TARGETS)}", file=sys.stderr)
        return 2
    if wrong := next((text for n in names if (text := missing(TARGETS[n]))), None):
        print(wrong, file=sys.stderr)
        return 2
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            more = "--kernels", given.kernels
            if code := worker("pallas_kernels.tune", name, folder, *more).wait():
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
