"""Fills the tile tables: compiles candidates for a target and keeps the fastest.

    python -m pallas_kernels.tune --targets v5e,v6e

No accelerator is needed: the time of a candidate is its bundles times their trips (see
`pallas_kernels/readings.py`), which is exact for what the compiler scheduled and knows
nothing of the memory system. A candidate that does not compile, because it asks for
more fast memory than there is, is passed over. About ten minutes a target on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any, Iterator

from pallas_kernels import cases, readings, tables
from pallas_kernels.targets import TARGETS, Target, compiled, in_process

TILES = ((512, 1024), (512, 2048), (1024, 512), (1024, 1024), (1024, 2048),
         (2048, 1024))
CHUNKS = (256, 512, 1024)
WIDTHS = {"d128": 128, "d256": 256}
LENGTH = 8192


def candidates(width: int) -> Iterator[tuple[int, int, int]]:
    """Queries, keys and keys a chunk of a tile."""
    for rows, columns in TILES:
        if width > 128 and rows * columns > 2**20:
            continue
        yield from ((rows, columns, n) for n in CHUNKS if n <= columns)


def measured(target: Target, which: str, width: int, tile, folder: pathlib.Path):
    """Seconds of a candidate by its bundles; None if it does not compile."""
    backward = which == "flash_backward"
    f, args, trips = cases.attention(
        target.kind, backward=backward, t=LENGTH, d=width, tile=tile)
    for path in folder.iterdir():
        path.unlink()
    try:
        compiled(target, f, *args)
    except Exception as error:  # any compiler's reason passes a candidate over
        print(f"{which} {width} {tile}: {str(error).splitlines()[0][:90]}",
              file=sys.stderr)
        return None
    counts = [p.cycles(*trips[which]) for n, p in readings.programs(folder).items()
              if which in n]
    cycles = [n for n in counts if n is not None]
    return sum(cycles) / target.clock / target.cores if cycles else None


def tuned(target: Target, folder: pathlib.Path) -> dict[str, Any]:
    """The target's row of the table: the best tile of each kernel and width."""
    row: dict[str, Any] = json.loads(json.dumps(tables.row(target.kind)))
    for which in ("flash_forward", "flash_backward"):
        for label, width in WIDTHS.items():
            times: dict[tuple, float] = {}
            for tile in candidates(width):
                seconds = measured(target, which, width, tile, folder)
                if seconds is not None:
                    times[tile] = seconds
                    print(f"{target.name} {which} {label} {tile}: "
                          f"{seconds * 1e3:.3f} ms", flush=True)
            if times:
                best = min(times.items(), key=lambda item: item[1])[0]
                row[which][f"{label} f16"] = list(best)
    return row


def main(arguments: list[str]) -> int:
    """Tunes target after target, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="v5e,v5p,v6e", help="of v4, v5e, v5p, ...")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        target = TARGETS[given.targets]
        row = tuned(target, pathlib.Path(given.worker))
        table = json.loads(tables.TABLE.read_text()) | {target.kind: row}
        tables.TABLE.write_text(tables.text(table))
        return 0
    if unknown := set(given.targets.split(",")) - set(TARGETS):
        print(f"targets={sorted(unknown)}: expected some of {sorted(TARGETS)}")
        return 2
    for name in given.targets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            if code := in_process("pallas_kernels.tune", name, folder):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
