"""Shipped: figures of several seeds that come with the library, beside a run of one.

`experiments.NAME --record=experiments/NAME.json` with three seeds or more writes what a
later run of one seed, with the same settings, shows beside its own numbers, and by how
long each row took says how long all of it will take here.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import numpy as np

from experiments.measure.provenance import ROOT
from experiments.training.record import write_whole

LEAST = 3  # seeds of a record


def path_of(name: str) -> pathlib.Path:
    """Where the record of an experiment lies."""
    return ROOT / "experiments" / f"{name}.json"


def check(record: str | None, seeds: int) -> None:
    """ValueError for a record of fewer than three seeds."""
    if record is not None and seeds < LEAST:
        raise ValueError(f"record={record}: expected seeds={LEAST} or more, got "
                         f"{seeds}")


def save(path: pathlib.Path, settings: Any, found: dict[str, Any]) -> None:
    """Writes a record: what was found, under the settings that all seeds share."""
    record = {"settings": settings, "pace": pace()} | found
    write_whole(path, json.dumps(record, indent=1) + "\n")


def copy(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes what was found, rows as far as they were run; ValueError where it has no
    row, or fewer than what lies there, of which a part would be lost."""
    try:
        there = len(_good(json.loads(path.read_text())))
    except (OSError, ValueError, KeyError, TypeError):
        there = 0
    if (have := len(_good(found))) < max(there, 1):
        raise ValueError(f"record={path}: expected {max(there, 1)} rows or more, got "
                         f"{have}: go on in the folder of the run that it is of")
    write_whole(path, json.dumps(found, indent=1) + "\n")


def _good(found: dict[str, Any]) -> list:
    return [row for row in found["rows"] if "failed" not in row]


def load(name: str, settings: Any) -> dict[str, Any] | None:
    """The record of an experiment; None if there is none of these settings."""
    try:
        record = json.loads(path_of(name).read_text())
    except (OSError, ValueError):
        return None
    same = record.get("settings") == json.loads(json.dumps(settings))
    return record if same else None


def rows(record: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The rows of a record by attention."""
    return {} if record is None else {row["attention"]: row for row in record["rows"]}


def beside(row: dict[str, Any], record: dict[str, Any] | None,
           names: tuple[str, ...]) -> dict[str, Any]:
    """A row of one seed with what the record has of the same attention:
    NAME_shipped, the values of its seeds."""
    known = rows(record).get(row["attention"], {})
    return row | {f"{name}_shipped": known[f"{name}_seeds"] for name in names
                  if f"{name}_seeds" in known}


def expected(record: dict[str, Any] | None, labels: list[str], seeds: int = 1
             ) -> float | None:
    """Seconds that these rows will take here, by those that they took where the record
    was made; None if it does not know one of them."""
    known = rows(record)
    if record is None or not all("seconds" in known.get(n, {}) for n in labels):
        return None
    took = sum(known[label]["seconds"] for label in labels)
    return took * seeds * pace() / record["pace"]


def pace() -> float:
    """Seconds of a fixed piece of work, half products of matrices and half Python, the
    least of five: how fast this machine is, whatever the work."""
    a = np.ones((384, 384), np.float32)

    def once() -> float:
        start = time.perf_counter()
        for _ in range(12):
            a @ a
        sum(n * n for n in range(100_000))
        return time.perf_counter() - start

    return min(once() for _ in range(5))


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "2:05 minutes"."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02} minutes"
