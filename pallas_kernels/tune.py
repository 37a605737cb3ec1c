"""Fills the tile tables: tries candidates for a target and keeps the best.

    python -m pallas_kernels.tune --targets v5e,v6e       # by what the compiler says
    python -m pallas_kernels.tune --timed                 # by the clock of this device
    python -m pallas_kernels.tune --kernels linear,delta  # not all of them

Without the accelerator, a TPU candidate costs its bundles times their trips (see
`pallas_kernels/readings.py`), which is exact for what the compiler scheduled and knows
nothing of the memory system. A GPU has no such schedule to read: a candidate that
spills registers is dropped, and the best of the rest is the one that keeps most logits
in flight on a multiprocessor, its tile times the blocks that fit there, with the fewest
registers among equals; the kernels for Hopper, which share out registers themselves,
keep their tiles. Kernels of one program are tried one by one, as far as each has a row
of its own. Where the device is there, --timed runs every candidate instead, and
its row is written under the device's own name. What does not compile, because it asks
for more fast memory than there is, is passed over. About ten minutes a target on 2
cores.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import pathlib
import sys
import tempfile
import time
from typing import Any, Callable, Iterator, Sequence

import jax
import numpy as np

from pallas_kernels import cases, readings, readings_gpu, tables, tune_recurrent
from pallas_kernels.targets import TARGETS, Gpu, Tpu, compiled, missing, worker

TPU_TILES = ((512, 1024), (1024, 1024), (1024, 2048), (2048, 1024), (2048, 2048))
CHUNKS = (256, 512)
GPU_SIZES, WARPS, STAGES = (32, 64, 128), (4, 8), (1, 2, 3)
WIDTHS = {"d128": 128, "d256": 256}
KERNELS = ("flash_forward", "flash_backward")
FAMILIES = ("flash", "linear", "delta", "scan")
LENGTH, ROUNDS = 8192, 5
Tile = tuple[int, ...]


def candidates(backend: str, width: int, which: str) -> Iterator[Tile]:
    """Queries, keys and what else the table says of a tile."""
    if which not in KERNELS:
        yield from tune_recurrent.candidates(backend, which)
        return
    if backend == "mosaic":
        # of the backward pass also keys and stages of the kernel for dq
        sizes = ((128, 192), (64, 128)) if which == KERNELS[0] else ((64,), (64, 128))
        for rows, columns, stages in itertools.product(*sizes, (1, 2)):
            dq = () if which == KERNELS[0] else (64, stages, stages)
            yield rows, columns, stages, *dq
        return
    if backend == "tpu":
        yield from ((*tile, chunk) for tile in TPU_TILES for chunk in CHUNKS)
        return
    for rows, columns, warps, stages in itertools.product(
            GPU_SIZES, GPU_SIZES, WARPS, STAGES):
        if 2048 <= rows * columns <= 2**21 // width:
            yield rows, columns, warps, stages


def program(target: Tpu | Gpu, backend: str, which: str, width: int, tile: Tile):
    """The function of a candidate, its arguments and its trips."""
    if which not in KERNELS:
        return tune_recurrent.program(target, backend, which, LENGTH, width)
    return cases.attention(
        target, backend=backend, backward=which == "flash_backward", t=LENGTH, d=width,
        tile=tile)


def static_cost(folder: pathlib.Path, target, backend, which, width, tile) -> Any:
    """What ranks a candidate by what the compiler says; None to drop it."""
    for path in folder.iterdir():
        path.unlink()
    f, args, trips = program(target, backend, which, width, tile)
    compiled(target, f, *args)
    name = which if which in KERNELS else tune_recurrent.read(which, backend)
    if isinstance(target, Gpu):
        found = [k for n, k in readings_gpu.programs(folder).items() if name in n]
        if not found or any(k.spills for k in found):
            return None
        flight = min(k.blocks(target) for k in found) * math.prod(tile[:2])
        return -flight, max(k.registers for k in found)
    counts = [p.cycles(*own) for n, p in readings.programs(folder).items()
              for start, own in trips.items() if name in n and start in n]
    cycles = [n for n in counts if n is not None]
    return sum(cycles) / target.clock / target.cores if cycles else None


def timed_cost(target, backend, which, width, tile) -> float:
    """Seconds of a candidate on this machine's device, the median of some runs."""
    f, args, _ = program(target, backend, which, width, tile)

    def draw(n, a):
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


def rows(families: Sequence[str], backend: str) -> Iterator[str]:
    """The rows of the table that are tuned, by the kernels that they are of."""
    for family in families:
        yield from KERNELS if family == "flash" else tune_recurrent.rows(
            family, backend)


def place(backend: str, which: str, label: str, width: int) -> tuple[str, str]:
    """The name of a row of the table, and the class of shapes in it."""
    kernel, *channels = which.split()
    name = kernel if backend == "tpu" else f"{backend}_{kernel}"
    padded = tables.padded(width, width, backend) if backend == "mosaic" else None
    return name, padded or " ".join([label, "f16", *channels])


def tuned(target: Tpu | Gpu, cost: Callable, backends: Sequence[str],
          families: Sequence[str] = FAMILIES) -> dict[str, Any]:
    """The target's row of the table: the best tile of each kernel and width."""
    row: dict[str, Any] = json.loads(json.dumps(
        tables.row(target.kind, target.backends[0])))
    for backend, (label, width) in itertools.product(backends, WIDTHS.items()):
        for which in rows(families, backend):
            name, kind = place(backend, which, label, width)
            costs: dict[Tile, Any] = {}
            plain = isinstance(row[name][kind], int)
            numbers = lambda tile: tile[0] if plain else list(tile)
            for tile in candidates(backend, width, which):
                said = f"{target.name} {backend} {which} {label} {tile}"
                try:
                    with tables.trial(target.kind, name, kind, numbers(tile), backend):
                        found = cost(target, backend, which, width, tile)
                except Exception as error:  # any compiler's reason drops it
                    text = (str(error).splitlines() or [""])[0][:90]
                    print(f"{said}: {text}", file=sys.stderr)
                    continue
                if found is not None:
                    costs[tile] = found
                    print(f"{said}: {found}", flush=True)
            if costs:
                row[name][kind] = numbers(min(costs, key=lambda tile: costs[tile]))
    return row


def write(kind: str, row: dict[str, Any]) -> None:
    """Puts a device's row into the table."""
    table = json.loads(tables.TABLE.read_text()) | {kind: row}
    tables.TABLE.write_text(tables.text(table))


def here() -> Tpu | Gpu | None:
    """The target that this machine's own device is."""
    kind = jax.devices()[0].device_kind
    return next((t for t in TARGETS.values() if t.kind == kind), None)


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
