"""The best tiles: the candidates of `pallas_kernels.tune` for a row of the table, one
after the other in every round of one process, beside the tile that stands there.

A winner is one that was faster than what stands there in every round; `write` puts the
winners into the table under the device's own name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any, Iterator

import jax
import numpy as np

from experiments.measure.device.case import Bench, Case, Row, timed
from experiments.measure.device.fast import figures, said
from experiments.measure.device.place import Place
from pallas_kernels import tables, tiles
from pallas_kernels.tune import timed as tune
from pallas_kernels.tune.rows import FAMILIES, Row as TableRow, rows

SECONDS, COMPILING = 300.0, 180.0  # of a case, and of its compiling
CLOSE = 2.0**-6  # of the norm, apart from what stands there: sums in another order
NOW = "the table's"
# what matters most first: which kernel, for which widths and numbers
FIRST = (("flash_forward", "d128", "f16"), ("flash_backward", "d128", "f16"),
         ("decode", "d128", "i4"), ("decode", "d128", "i8"),
         ("linear_forward channels", "d128", "f16"),
         ("linear_backward channels", "d128", "f16"), ("delta_keys", "d128", "f16"),
         ("delta_values", "d128", "f16"), ("delta_inside", "d128", "f16"),
         ("memory", "d128", "f16"))


def cases(place: Place) -> Iterator[Case]:
    """A case for each row of the table that this device reads."""
    target = tune.named(place.kind, place.capability)
    if target is None or place.interpret or place.tiny:
        return
    found = [(backend, row) for backend in target.backends
             for row in rows(FAMILIES, backend) if _now(target, backend, row)]
    order = {row: n for n, row in enumerate(FIRST)}
    for backend, row in sorted(found, key=lambda one: order.get(one[1], len(order))):
        yield Case(f"tiles {row.which} {backend} {row.label} {row.kind}",
                   functools.partial(_race, target, backend, row),
                   tier=2 if row in order else 3, seconds=SECONDS)


def _now(target: Any, backend: str, row: TableRow) -> dict[str, int] | None:
    """The fields of the tile that stands in the table."""
    name, kind = row.place(backend)
    return tables.row(target.kind, backend).get(name, {}).get(kind)


def _race(target: Any, backend: str, row: TableRow, bench: Bench) -> Row:
    """The row of the fastest candidate, ours, beside the tile that stands there."""
    told: Row = {"contenders": {}, "absent": {}}
    calls, first, clock = {}, None, time.monotonic()
    tried = _tried(target, backend, row)
    for label, tile in tried.items():
        if time.monotonic() - clock > COMPILING:
            told["absent"][label] = "no time was left"
            continue
        try:
            call, found, seconds = _candidate(target, backend, row, tile, bench)
        except Exception as error:  # any compiler's reason drops it
            if label == NOW:
                raise
            told["absent"][label] = said(error)
            continue
        first = found if first is None else first
        if (apart := _apart(found, first)) > CLOSE:
            told["absent"][label] = f"{apart:.1e} from the table's result"
            continue
        calls[label] = call
        told["contenders"][label] = {"compile_s": round(seconds, 2)}
    with bench.alone():
        spent = timed(calls)
    for label, own in told["contenders"].items():
        own |= figures(spent[label], 0.0, 0.0, 1.0, 1.0)
    best = min(spent, key=lambda label: np.median(spent[label]))
    if best == NOW:
        return told | {"ours": NOW, "said": f"{[*tried[NOW].values()]} stays"}
    each = np.asarray(spent[NOW]) / np.asarray(spent[best])
    return told | {"ours": best, "peer": NOW, "ratio": round(float(np.median(each)), 4),
                   "least": round(float(each.min()), 4), "backend": backend,
                   "place": row.place(backend), "tile": tried[best]}


def _tried(target: Any, backend: str, row: TableRow) -> dict[str, dict[str, int]]:
    """The fields of what stands in the table, and then of its candidates, by label."""
    now = _now(target, backend, row)
    assert now is not None
    kind = tiles.kind(row.place(backend)[0])
    found = [dataclasses.asdict(kind(*tile)) for tile in row.candidates(backend)]
    return {NOW: now} | {" ".join(map(str, tile.values())): tile for tile in found
                         if tile != now}


def _candidate(target: Any, backend: str, row: TableRow, tile: dict[str, int],
               bench: Bench) -> tuple[Any, Any, float]:
    """A call of the row's program with a tile, its result, and seconds of compiling."""
    name, kind = row.place(backend)
    with tables.trial(target.kind, name, kind, tile, backend):
        f, args, _ = row.program(target, backend)
        program, seconds = bench.compiled(f, *args)
    call = functools.partial(program, *tune.drawn(args))
    with bench.alone():
        return call, jax.device_get(call()), seconds


def _apart(a: Any, b: Any) -> float:
    """The greatest distance of two trees' arrays, in the norm of the second's."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = (np.asarray(one, np.float64) for one in (x, y))
        size = float(np.linalg.norm(y)) or 1.0
        worst = max(worst, float(np.linalg.norm(x - y)) / size)
    return worst if np.isfinite(worst) else np.inf


def won(row: Row) -> bool:
    """Whether a row's candidate gains more than its rounds spread."""
    return row["state"] == "done" and "tile" in row and row["least"] > 1


def write(device: str, found: dict[str, Row]) -> list[str]:
    """Puts the winners among rows into the table, under a device's name -> the names of
    their cases."""
    winners = [row for row in found.values() if won(row)]
    if winners:
        block = json.loads(json.dumps(tables.row(device, winners[0]["backend"])))
        for row in winners:
            name, kind = row["place"]
            block[name][kind] = row["tile"]
        tune.write(device, block)
    return [row["name"] for row in winners]
