"""The suite's own tests of the kernels, laws and golden files on this device, a case a
file. They come last: what they run on the device is not kept from others."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import sys
from typing import Iterator

from experiments.measure.device.case import Bench, Case, Row, Wrong
from experiments.measure.device.place import ROOT, Place, installed

SECONDS = 400.0
COUNTS = re.compile(r"(\d+) (passed|failed|deselected|error|errors|skipped)")


def cases(place: Place) -> Iterator[Case]:
    """One for each file; none where nothing is compiled, or pytest is not there."""
    folder = ROOT / "tests"
    if place.interpret or not folder.exists() or not installed("pytest"):
        return
    files = [*sorted(folder.glob("pallas_kernels/test_*.py")),
             folder / "test_golden.py", folder / "laws.py"]
    for path in files:
        yield Case(f"suite {path.relative_to(folder)}",
                   functools.partial(_file, path), 3, SECONDS)


def _file(path: pathlib.Path, bench: Bench) -> Row:
    """How many of its tests passed; raises Wrong with the first that did not."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
             "--tb=line", "--durations=0", "--durations-min=60", str(path)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"ATTN_DEVICE": "1"},
                          capture_output=True, text=True, timeout=SECONDS - 10)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    counts = {word: int(n) for n, word in COUNTS.findall(lines[-1] if lines else "")}
    text = ", ".join(f"{n} {word}" for word, n in counts.items())
    if done.returncode not in (0, 5):  # 5: all of them are another device's
        bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise Wrong(f"{text}: {'; '.join(bad[:4])}"[:600])
    return {"said": text or "no test is for this device"}
