"""The process that cases run in: names come in on its standard input, a line each, and
rows go out, one JSON text a line. What libraries print goes to the error stream.

    python -m experiments.measure.device.child FOLDER [--tiny] [--list]

A program that failed on the device may have left it unusable to its process: after a
row with an error the process ends, and its parent starts another one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any, TextIO

BROKEN = 3  # the exit status of a process that should not go on


def run(case: Any, bench: Any) -> dict[str, Any]:
    """A case's row, or what kept it from having one."""
    from experiments.measure.device.case import Wrong
    from experiments.measure.device.fast import said
    from pallas_kernels import Refused

    clock = time.perf_counter()
    try:
        row = {"state": "done"} | case.run(bench)
    except Wrong as error:
        row = {"state": "wrong", "why": str(error)}
    except Refused as error:
        row = {"state": "refused", "why": str(error)}
    except Exception as error:
        row = {"state": "failed", "why": said(error)}
    return {"name": case.name, "seconds": round(time.perf_counter() - clock, 2)} | row


def leave_with(parent: int) -> None:
    """Ends this process a second after its parent, whatever it is in the middle of: a
    case that hangs would keep the device."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(BROKEN)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Serves its parent until there are no more names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--extra", help="a module with cases of its own, for tests")
    given = parser.parse_args(arguments)
    leave_with(os.getppid())
    out = _own_output()
    from experiments.cli import compile_cache

    compile_cache.use()
    from experiments.measure.device import place as places
    from experiments.measure.device.case import Bench
    from experiments.measure.device.cases import cases
    from experiments.measure.device.interpreter import keep_programs

    place = places.here(given.tiny)
    if place.interpret:
        keep_programs()
    known = cases(place, given.extra)
    if given.list:
        _say(out, {"place": places.described(place), "cases": [
            {"name": c.name, "tier": c.tier, "seconds": c.seconds, "group": c.group}
            for c in known.values()]})
        return 0
    bench = Bench(place, given.folder, lambda word: _say(out, {"now": word}))
    for line in sys.stdin:
        row = run(known[line.strip()], bench)
        _say(out, row)
        if row["state"] == "failed":
            return BROKEN
    return 0


def _own_output() -> TextIO:
    """The standard output, of which nothing else knows any more."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def _say(out: TextIO, row: dict[str, Any]) -> None:
    print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
