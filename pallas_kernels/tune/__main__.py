"""Fills the tile tables: tries candidates for a target and keeps the best.

    python -m pallas_kernels.tune --targets v5e,v6e       # by what the compiler says
    python -m pallas_kernels.tune --timed                 # by the clock of this device
    python -m pallas_kernels.tune --kernels linear,delta  # not all of them

Without the accelerator, a TPU candidate costs its bundles times their trips (see
`pallas_kernels/matrix/tpu_schedule.py`), which is exact for what the compiler scheduled
and knows nothing of the memory system. A GPU has no such schedule to read: a candidate
that spills registers is dropped, and what is left is ranked, for flash, blocks and
decode, by the time of the busiest loop's pass for each logit
(`pallas_kernels/matrix/ptx_loop.py`), among equals by a warp's own; for recurrences,
whose loops are not alike, by how much of a chunk a multiprocessor keeps in flight,
among equals by registers. The kernels of Mosaic GPU, which share out registers
themselves, keep their tiles. Kernels of one program are tried one by one, as far as
each has a row of its own. Where the device is there, --timed runs every candidate
instead, and its row is written under the device's own name. What does not compile,
because it asks for more fast memory than there is, is passed over. About a quarter of
an hour a target and family of kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
import tempfile
from typing import Any, Callable, Sequence

import jax

from pallas_kernels import tables, tiles
from pallas_kernels.matrix import metrics, tpu_schedule, ptx
from pallas_kernels.matrix.targets import TARGETS, Gpu, Tpu, compiled, missing, worker
from pallas_kernels.tune.rows import FAMILIES, Row, Tile, rows
from pallas_kernels.tune.timed import here, timed_cost, write


def static_cost(folder: pathlib.Path, target, backend: str, row: Row, tile) -> Any:
    """What ranks a candidate by what the compiler says; None to drop it."""
    for path in folder.iterdir():
        path.unlink()
    f, args, trips = row.program(target, backend)
    compiled(target, f, *args)
    if isinstance(target, Gpu):
        found = [k for n, k in ptx.programs(folder).items()
                 if row.reads(backend, n)]
        if not found or any(k.spills for k in found):
            return None
        area = math.prod(tile[:2])
        if not row.recurrent:
            each = [k.cycles(target, row.which == "decode") for k in found]
            return tuple(sum(cycles) / area for cycles in zip(*each))
        flight = min(k.blocks(target) for k in found) * area
        return -flight, max(k.registers for k in found)
    counts = [metrics.cycles(target, p, start, own)
              for n, p in tpu_schedule.programs(folder).items()
              for start, own in trips.items() if row.reads(backend, n) and start in n]
    known = [n for n in counts if n is not None]
    return sum(known) / target.clock / target.cores if known else None


def tuned(target: Tpu | Gpu, cost: Callable, backends: Sequence[str],
          families: Sequence[str] = FAMILIES) -> dict[str, Any]:
    """The target's block of the table: the best tile of each row."""
    block: dict[str, Any] = json.loads(json.dumps(
        tables.row(target.kind, target.backends[0])))
    with contextlib.ExitStack() as found_so_far:
        for backend in backends:
            for row in rows(families, backend):
                name, kind = row.place(backend)
                best = _best(target, cost, backend, row)
                if best is not None:
                    # rows that share its program are tried beside it
                    found_so_far.enter_context(
                        tables.trial(target.kind, name, kind, best, backend))
                    block[name][kind] = best
    return block


def _best(target, cost: Callable, backend: str, row: Row) -> dict[str, int] | None:
    """The fields of the cheapest candidate by name; None if none compiles."""
    name, kind = row.place(backend)
    costs: dict[Tile, Any] = {}

    def fields(tile: Tile) -> dict[str, int]:
        return dataclasses.asdict(tiles.kind(name)(*tile))

    for tile in row.candidates(backend):
        said = f"{target.name} {backend} {' '.join(row)} {tile}"
        try:
            with tables.trial(target.kind, name, kind, fields(tile), backend):
                found = cost(target, backend, row, tile)
        except Exception as error:  # any compiler's reason drops it
            text = (str(error).splitlines() or [""])[0][:90]
            print(f"{said}: {text}", file=sys.stderr)
            continue
        if found is not None:
            costs[tile] = found
            print(f"{said}: {found}", flush=True)
    return fields(min(costs, key=lambda tile: costs[tile])) if costs else None


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
