"""Collectives: what a compiled program moves between devices, read from its text.

    compiled = jax.jit(f).lower(*args).compile()
    collectives(compiled.as_text())     # {"all-gather": [98304]}: bytes of the results

The text is XLA's optimised HLO, of any backend, of a program that ran or of one that
was compiled for devices that are not there. What stands in the body of a loop counts as
often as the loop runs, where the text says so (`known_trip_count`, or a condition that
counts up to a constant, as loops of jax do from 0); else once, and `uncounted` is set.
All branches of a condition count.

    python -m experiments.collectives FILE    # prints one line an instruction
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from typing import Iterator

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all",
    "collective-broadcast", "ragged-all-to-all",
)
BITS = {
    "pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128,
    "s4": 4, "u4": 4, "s2": 2, "u2": 2,
}
_HEAD = re.compile(r"^\s*(?:ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->\s*.*\{\s*$")
_LINE = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation|"
    r"called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"?known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction. bytes: of its result on one device; members: devices of the
    first group that takes part together, by their place in the mesh; pairs: from where
    to where a permutation goes; hidden: it is begun, and waited for later; times: how
    often it runs; uncounted: it stands in a loop whose trips are not known, each of
    which counted as one."""

    kind: str
    name: str
    bytes: int
    members: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    hidden: bool = False
    times: int = 1
    uncounted: bool = False

    @property
    def group(self) -> int:
        """How many devices take part together."""
        return len(self.members)


def collectives(text: str) -> dict[str, list[int]]:
    """Bytes of the result of every collective that one run of the compiled program
    makes, by kind: one number a time it runs."""
    found: dict[str, list[int]] = {}
    for each in instructions(text):
        found.setdefault(each.kind, []).extend([each.bytes] * each.times)
    return found


def instructions(text: str) -> list[Collective]:
    """The collectives of a compiled program in the order of its text. ValueError if the
    text is not that of a compiled program."""
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    head = text.split("\n", 1)[0]
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)
    devices = math.prod(map(int, counts))
    found, started = [], _started(bodies)
    for name, lines in bodies.items():
        count, known, hidden = times.get(name, (0, True, False))
        for line in lines if count else ():
            one = _collective(line)
            if one is not None and started.get(_channel(line), name) == name:
                found.append(dataclasses.replace(
                    one, times=count, uncounted=not known,
                    hidden=hidden or one.hidden or _channel(line) in started,
                    members=one.members or tuple(range(devices))))
    return found


def _started(bodies: dict) -> dict[str, str]:
    """Where collectives start whose steps are fused into work that does not need them,
    by channel: TPU programs name such a one in every fusion that it passes through."""
    return {
        _channel(line): name for name, lines in bodies.items()
        if any('custom_call_target="AsyncCollectiveStart"' in line for line in lines)
        for line in lines if _collective(line) is not None
    }


def _channel(line: str) -> str:
    found = re.search(r"channel_id=(\d+)", line)
    return found[1] if found else ""


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that runs first."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and " = " not in line.split("->")[0]:
            lines = bodies.setdefault(head[1], [])
            entry = head[1] if line.lstrip().startswith("ENTRY") else entry
        elif line.strip() == "}":
            lines = None
        elif lines is not None and _LINE.match(line):
            lines.append(line)
    if not entry:
        raise ValueError("text: no ENTRY computation, expected compiled.as_text()")
    return bodies, entry


def _times(bodies: dict, entry: str) -> dict[str, tuple[int, bool, bool]]:
    """How often each computation runs, whether that is known, and whether others go on
    meanwhile."""
    found: dict[str, tuple[int, bool, bool]] = {}

    def visit(name: str, count: int, known: bool, hidden: bool) -> None:
        before, sure, aside = found.get(name, (0, True, False))
        found[name] = before + count, sure and known, aside or hidden
        for line in bodies.get(name, ()):
            beside = hidden or _opcode(line) == "async-start"
            for callee, trips in _called(line, bodies):
                visit(callee, count * (trips or 1), known and trips is not None, beside)

    visit(entry, 1, True, False)
    return found


def _called(line: str, bodies: dict) -> Iterator[tuple[str, int | None]]:
    """Computations that an instruction runs, and how often, None if nobody knows."""
    opcode = _opcode(line)
    passed = "async-update", "async-done"
    if opcode.removesuffix("-start") in KINDS or opcode in passed:
        return  # a sum of two numbers, and what has been counted at its start
    trips = _trips(line, bodies) if opcode == "while" else 1
    for names in _CALLED.findall(line):
        for name in names.strip("{}").split(","):
            yield name.strip().lstrip("%"), trips


def _trips(line: str, bodies: dict) -> int | None:
    """How often a loop runs."""
    if known := _TRIPS.search(line):
        return int(known[1])
    found = re.search(r"condition=%?([\w.\-]+)", line)
    lines = bodies.get(found[1], ()) if found else ()
    last = next((text for text in lines if "ROOT" in text), "")
    ends = re.findall(r"constant\((\d+)\)", "\n".join(lines))
    return int(ends[0]) if "direction=LT" in last and len(ends) == 1 else None


def _opcode(line: str) -> str:
    match = _LINE.match(line)
    rest = _past_shape(match[2]) if match else ""
    return rest.split("(", 1)[0].strip()


def _past_shape(text: str) -> str:
    """What follows the shape that an instruction's text begins with."""
    if not text.startswith("("):
        return text.split(" ", 1)[-1].lstrip()
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[at + 1:].lstrip()
    return ""


def _collective(line: str) -> Collective | None:
    match, opcode = _LINE.match(line), _opcode(line)
    if match is None:
        return None
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    shape = match[2][: len(match[2]) - len(_past_shape(match[2]))]
    started = opcode.endswith("-start")
    return Collective(
        kind, match[1], _result(shape, kind, started), _members(line), _pairs(line),
        started,
    )


def _result(shape: str, kind: str, started: bool) -> int:
    """Bytes of the result. The shape of a start names operands before results (and
    signals behind them), except that of an all-reduce, which has results only."""
    if not started or kind == "all-reduce":
        return sum(map(_bytes, _ARRAY.findall(shape)))
    parts = _parts(shape)
    chosen = parts[1] if len(parts) > 1 else shape
    return sum(map(_bytes, _ARRAY.findall(chosen)))


def _parts(shape: str) -> list[str]:
    """The outermost members of a tuple shape."""
    inner, depth, parts = shape.strip()[1:-1], 0, [""]
    for letter in inner:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(array: tuple[str, str]) -> int:
    kind, shape = array
    bits = BITS.get(kind)
    if bits is None:
        number = re.match(r"[a-z]+(\d+)", kind)
        bits = int(number[1]) if number else 0
    count = 1
    for size in re.findall(r"\d+", shape):
        count *= int(size)
    return -(-count * bits // 8)


def _members(line: str) -> tuple[int, ...]:
    """Devices of the first group, () for all of them."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, listed[1].split(",")))
    grid = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if grid:
        order = np.arange(int(grid[1]) * int(grid[2]))
        order = order.reshape([int(n) for n in grid[3].split(",")])
        if grid[4]:
            order = order.transpose([int(n) for n in grid[4].split(",")])
        return tuple(order.reshape(int(grid[1]), -1)[0].tolist())
    return tuple(sorted({n for pair in _pairs(line) for n in pair}))


def _pairs(line: str) -> tuple[tuple[int, int], ...]:
    found = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1] if found else "")
    return tuple((int(a), int(b)) for a, b in pairs)


def main(paths: list[str]) -> int:
    """Prints the collectives of each file."""
    if not paths:
        print(__doc__)
        return 2
    for path in paths:
        with open(path) as file:
            for each in instructions(file.read()):
                mark = " (a loop of unknown length)" if each.uncounted else ""
                print(f"{each.kind:20} {each.bytes:12} bytes x {each.times}, groups of "
                      f"{each.group}: {each.name}{mark}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
