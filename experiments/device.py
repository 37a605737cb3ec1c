"""Device: every kernel proved and timed on the card or chip that is here, in one run.

    python -m experiments.device                # what 8 minutes are enough for
    python -m experiments.device --minutes=30   # goes on where the last run stopped
    python -m experiments.device --quick        # two minutes
    python -m experiments.device --cases='fast flash,candidate' --write

It says what the device is, and measures in each of its processes the ceilings that what
is timed there is held against: a large product of bfloat16, and a large copy (read plus
written), of iid normal numbers. Then, the cases that say most first:

- right: a kernel's results and all its gradients against float32 on the same device.
  Errors are multiples of plain jnp's in the same type ("0.98x"), in float32 of the
  norm; at most 2x and 1e-5 (gradients 2e-5) are right. Programs run twice, into memory
  that holds NaN, and give the same bits.
- fast: a kernel beside its peers where they are installed (cuDNN, XLA, tokamax; torch
  and flash-linear-attention in a process of their own), interleaved in one process:
  milliseconds, TFLOP/s or GB/s, the share of the ceiling, and the ratio to the best
  peer, 2 is twice as fast; and from how many tokens on a recurrence is faster than
  exact attention.
- candidate: a form that no device has judged, beside the one that it would replace.
- layer: attentions as users call them, and a hybrid that takes a step and writes 32
  tokens, against XLA's on this machine's CPU.
- suite: the tests of the kernels, laws and golden files, compiled for the device.
- tiles: what `pallas_kernels.tune` would try for a row of tiles.json, beside the tile
  that stands there; only in runs that have time left for it.

Each case runs in a process that may crash or hang and then costs that case alone. Its
row is written to `device.json` in the folder at once, and a run that was stopped, or
had no more time, goes on with what is left; what was done on another device, with other
versions or another source is kept beside it. --write makes pallas_kernels/MEASURED.md
of it, and puts tiles that were faster than the table's in every round into tiles.json
under the device's name, which is another source: its cases are measured anew. On a CPU
kernels are interpreted in tiny shapes: that proves the command.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import sys
import time
from typing import Any

import pallas_kernels
from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.measure.device import best_tiles, pool
from experiments.measure.device.record import Record
from experiments.measure.device.report import BAD, lines, page
from pallas_kernels import tables

PAGE = pathlib.Path(pallas_kernels.__file__).with_name("MEASURED.md")
QUICK = 2.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run, and for how long."""

    minutes: float = option(8.0, "time for all of it, starting and compiling too")
    quick: bool = option(False, "at most two minutes, in shapes that are tiny")
    cases: str = option("", "only those with one of these words, parted by commas")
    again: bool = option(False, "run again what has failed")
    write: bool = option(
        False, "make pallas_kernels/MEASURED.md of it, and keep the best tiles", FREE)
    folder: str = option("results/device", "where what is known stands", FREE)
    extra: str | None = option(None, "a module whose cases are run instead", FREE)

    def __post_init__(self):
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"minutes={self.minutes}: expected more than 0, at most "
                             "1440")


TINY = Config(quick=True, cases="right scan triton", folder="device-tiny")


def run(config_: Config) -> dict[str, Any]:
    """Runs what is left -> how many cases are in which state, and the folder."""
    begun = time.monotonic()
    minutes = min(config_.minutes, QUICK) if config_.quick else config_.minutes
    deadline = begun + 60 * minutes
    folder = pathlib.Path(config_.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--tiny"] * config_.quick
    words += ["--extra", config_.extra] if config_.extra else []
    found = pool.listed(folder, words, _platform())
    record = Record(folder, found["place"])
    wanted = [c for c in found["cases"] if _asked(config_, c["name"])]
    if not wanted:
        raise ValueError(f"cases={config_.cases!r}: no case has this in its name")
    done = {name for name, row in record.rows.items()
            if not (config_.again and row["state"] in BAD)}
    todo = [c for c in wanted if c["name"] not in done]
    if todo:
        pool.serve(folder, todo, words, found["place"]["platform"], deadline,
                   lambda row: _keep(record, row))
    names = {c["name"] for c in wanted}
    rows = {name: row for name, row in record.rows.items() if name in names}
    left = [name for name in names if name not in rows]
    print("\n".join(lines(found["place"], rows, left)), flush=True)
    if config_.write:
        date = datetime.date.today().isoformat()
        PAGE.write_text(page(found["place"], record.rows, date))
        for name in best_tiles.write(found["place"]["device"], record.rows):
            print(f"kept {name} in {tables.TABLE.name}", file=sys.stderr)
    states = ("done", "refused", *BAD)
    counts = {s: sum(r["state"] == s for r in rows.values()) for s in states}
    return counts | {"left": len(left), "seconds": round(time.monotonic() - begun, 1),
                     "folder": str(folder)}


def _asked(config_: Config, name: str) -> bool:
    words = [word.strip() for word in config_.cases.split(",") if word.strip()]
    return not words or any(word in name for word in words)


def _keep(record: Record, row: dict[str, Any]) -> None:
    record.keep(row)
    more = f": {row['why']}" if "why" in row else ""
    print(f"{row['state']} {row['name']}{more}"[:160], file=sys.stderr, flush=True)


def _platform() -> str:
    """What a child will find, as far as it can be told without asking the device: it
    decides what libraries read before they load. "" where nobody knows."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu"
    return "gpu" if pathlib.Path("/dev/nvidiactl").exists() else ""


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
