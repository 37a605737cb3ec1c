"""Readings: what the compiler's dumps say of a TPU kernel before it ever runs.

A TPU core issues one bundle a cycle, so bundles times trips is a lower bound on the
time of a region that is exact and repeatable. A kernel's program falls into regions: a
tile without mask, one with, the end of a line, and so on, each of which runs for some
steps of the grid only; the dump marks where they begin.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

UNITS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE",
         "SPILL", "SALU")
BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:([A-Z]{2}(?:\s*[A-Z]{2})*))?\s*:")
RARE = 100  # bundles; a shorter region may be taken at each step
COUNTS = re.compile(r"(?<![\w.])\d+(?![\w.])")


class Region(NamedTuple):
    """bundles: cycles for one pass; units: how often each unit is used in it."""

    mark: str
    bundles: int
    units: dict[str, int]


class Program(NamedTuple):
    """A kernel's regions in order, and how many of each unit a bundle can use."""

    name: str
    regions: tuple[Region, ...]
    capacity: dict[str, int]

    @property
    def bundles(self) -> int:
        """All bundles of the program."""
        return sum(r.bundles for r in self.regions)

    def total(self, unit: str) -> int:
        """How often a unit is used in the program."""
        return sum(r.units[unit] for r in self.regions)

    @property
    def tiles(self) -> list[Region]:
        """The regions in which the matrix unit works, in program order."""
        return [r for r in self.regions if r.units["MATMUL"] > 16]

    def cycles(self, trips: tuple[int, ...], lines: int, steps: int) -> int | None:
        """Cycles of a run in which the n-th tile region is taken trips[n] times.

        What else is long and under a condition (a line's start and end) is taken
        `lines` times, what comes before the grid's loop once, all the rest at each of
        `steps` grid steps. None if the program has other tile regions than trips.
        """
        if len(trips) != len(self.tiles):
            return None
        work = sum(r.bundles * n for r, n in zip(self.tiles, trips))
        for r in self.regions:
            if r not in self.tiles:
                rare = r.mark == "branch" and r.bundles > RARE
                once = r.mark == "start"
                work += r.bundles * (1 if once else lines if rare else steps)
        return work


def marks(text: str) -> list[tuple[int, str]]:
    """(bundle, mark) where a region begins: "branch" behind a branch that may jump over
    it, or the dump's own mark (LB: a loop body; PF: where such branches meet)."""
    found = [(0, "start")]
    for line in text.splitlines():
        match = BUNDLE.match(line)
        if not match:
            continue
        if match[2]:
            found.append((int(match[1], 16), match[2].split()[0]))
        if "sbr.rel" in line:
            found.append((int(match[1], 16) + 1, "branch"))
    return found


def rows(text: str) -> list[list[int]]:
    """Use of the units: the capacity first, then a row a bundle."""
    table = []
    for line in text.splitlines():
        numbers = [int(n) for n in COUNTS.findall(line)]
        if len(numbers) >= len(UNITS):
            table.append(numbers[-len(UNITS):])
    return table


def program(name: str, bundles: str, use: str) -> Program:
    """A kernel's program from the texts of its two dumps."""
    capacity, *each = rows(use)
    starts = [m for m in marks(bundles) if m[0] < len(each)]
    ends = [m[0] for m in starts[1:]] + [len(each)]
    regions = []
    for (start, mark), end in zip(starts, ends):
        columns = zip(*each[start:end]) if end > start else ((0,),) * len(UNITS)
        units = {n: sum(c) for n, c in zip(UNITS, columns)}
        regions.append(Region(mark, end - start, units))
    return Program(name, tuple(regions), dict(zip(UNITS, capacity)))


def programs(folder: pathlib.Path, whole: bool = False) -> dict[str, Program]:
    """The programs that were dumped to a folder, by name: those in which the matrix
    unit works, or all of the `whole`, XLA's own fusions with them."""
    found = {}
    for path in sorted(folder.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        name = path.name.split("-")[1]
        bundles = [p for p in folder.glob(f"*-{name}-*-final_bundles.txt")
                   if "schedule-analysis" not in p.name]
        if not bundles or name.startswith(("TLP", "<")):
            continue
        read = program(name, bundles[0].read_text(), path.read_text())
        if whole or read.tiles:
            found[name] = read
    return found
