"""Passes: what one turn of a GPU kernel's loop asks of a multiprocessor, by its PTX.

A kernel is as long as its busiest loop, the innermost one with most matrix products
(or, without any, with most instructions); one without a loop is one pass. Counted are,
for each warp, instructions by what executes them, and bytes through shared memory and
from beyond. The time of a pass is the larger of two:

- of the units that all blocks of a multiprocessor share, the one that takes longest;
- a warp's own time, in which nothing overlaps (the sum of all units, of which each of
  four schedulers has a quarter), shared by as many blocks as fit. Loads that are begun
  some passes ahead hide their latency in these passes; others add it.

That ranks tiles; it is no prediction. Clock by clock behaviour (conflicts of banks,
dependences, the second-level cache) is not in it, and mov, which the assembler removes,
is not counted.

Rates a cycle of a multiprocessor, from NVIDIA's tables of arithmetic throughput and
white papers: 4 instructions of warps, 16 special functions, 64 lanes of integers and
comparisons, 64 (sm80) or 128 of float32, 128 bytes of shared memory; 5120 bytes of the
second-level cache for all together (A100; of later ones taken as the same).
"""

from __future__ import annotations

import dataclasses
import itertools
import re

from pallas_kernels.matrix.targets import Gpu

LABEL = re.compile(r"^(\$L\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)")
CODE = re.compile(r"^\s+(?:@!?%\w+\s+)?([a-z][\w.]*)(.*)$")
SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)")
VECTOR = re.compile(r"(?:\.v(\d))?\.[a-z]*(\d+)$")
MATRICES = re.compile(r"\.x(\d)")
WAIT = re.compile(r"^cp\.async\.wait_group\s+(\d+)")
SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos", "div")
FLOATS = ("add", "sub", "mul", "fma")
NOTHING = ("mov", "ld.param", "ret", "bra")  # or next to it
SCHEDULERS, WARP = 4, 32
L2, LATENCY = 5120, 600  # bytes a cycle; cycles of a load from there


@dataclasses.dataclass
class Pass:
    """Of one warp: instructions, of them special, alu and float ones, flops of matrix
    products, bytes of shared memory and from beyond; bursts: how often it waits for
    loads of its own pass; ahead: how many passes ahead the others are begun."""

    issued: int = 0
    special: int = 0
    alu: int = 0
    floats: int = 0
    flops: float = 0.0
    shared: float = 0.0
    beyond: float = 0.0
    bursts: int = 0
    commits: int = 0
    ahead: int = 0

    def units(self, target: Gpu, warps: int, stream: bool = False) -> dict[str, float]:
        """Cycles of each unit for a block of so many warps; stream: what comes from
        beyond comes from the main memory, all of it."""
        clock = target.ghz * 1e9
        beyond = (target.bandwidth / clock if stream else L2) / target.cores
        rate = target.peak / target.cores / clock
        lanes = 64 if target.capability == (8, 0) else 128
        each = {
            "issue": self.issued / SCHEDULERS, "special": self.special * WARP / 16,
            "alu": self.alu * WARP / 64, "floats": self.floats * WARP / lanes,
            "tensor": self.flops / rate, "shared": self.shared / 128,
            "beyond": self.beyond / beyond,
        }
        return {name: cycles * warps for name, cycles in each.items()}

    def cycles(self, target: Gpu, warps: int, blocks: int, stream: bool = False):
        """The time of a pass, of a multiprocessor that holds `blocks` blocks; and what
        of it a warp's own time is."""
        own = sum(self.units(target, SCHEDULERS, stream).values())
        if self.ahead:
            own = max(own, LATENCY / self.ahead)
        else:
            own += LATENCY * self.bursts
        share = own / blocks
        return max(max(self.units(target, warps, stream).values()), share), share


def busiest(ptx: str) -> Pass:
    """The pass that a kernel's time depends on."""
    lines = ptx.splitlines()
    labels = {m[1]: n for n, line in enumerate(lines) if (m := LABEL.match(line))}
    ends = [(labels[m[1]], n) for n, line in enumerate(lines)
            if (m := BRANCH.search(line)) and labels.get(m[1], n) < n]
    inner = [(a, b) for a, b in ends
             if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in ends)]
    found = [counted(lines[a:b + 1]) for a, b in inner] or [counted(lines)]
    most = max(p.flops for p in found)
    if not most:
        return max(found, key=lambda p: p.issued)
    # of a tile with and one without a mask, the one without
    return min((p for p in found if p.flops >= 0.9 * most), key=lambda p: p.issued)


def counted(lines: list[str]) -> Pass:
    """What the instructions of some lines ask for."""
    p, waits, waiting = Pass(), 0, False
    for text in itertools.chain.from_iterable(line.split(";") for line in lines):
        match = CODE.match(text)
        if match is None or match[1].startswith(NOTHING):
            continue
        code, rest = match.groups()
        p.issued += 1
        name = code.partition(".")[0]
        if wait := WAIT.match(text.strip()):
            waits = int(wait[1])
        elif name in ("mma", "wgmma"):
            _product(p, code, rest)
            waiting = False
        elif name in SPECIAL:
            p.special += 1
        elif name in ("ldmatrix", "stmatrix"):
            each = MATRICES.search(code)
            p.shared += 128 * int(each[1]) if each else 128
        elif name == "shfl":
            p.shared += 4 * WARP
        elif code.startswith("cp.async"):
            _copy(p, code, rest)
        elif ".shared" in code or ".global" in code:
            size = VECTOR.search(code)
            many = int(size[1] or 1) * int(size[2]) / 8 * WARP if size else 4 * WARP
            if ".shared" in code:
                p.shared += many
            else:
                p.beyond += many
                if name == "ld" and not waiting:
                    p.bursts, waiting = p.bursts + 1, True
        elif name in FLOATS and code.endswith("f32"):
            p.floats += 1
        else:
            p.alu += 1
    if p.commits:
        p.ahead = waits // p.commits + 1
    return p


def _product(p: Pass, code: str, rest: str) -> None:
    shape = SHAPE.search(code)
    if shape is None:  # a fence or a wait
        return
    m, n, k = map(int, shape.groups())
    warps = 4 if code.startswith("wgmma") else 1
    p.flops += 2 * m * n * k / warps
    if warps == 4:
        # operands of 16 bits lie in shared memory; the left one perhaps in registers
        left = rest.count("{") < 2
        p.shared += 2 * k * (n + m * left) / warps


def _copy(p: Pass, code: str, rest: str) -> None:
    if code.startswith("cp.async.commit"):
        p.commits += 1
    elif code.startswith(("cp.async.ca", "cp.async.cg")):
        size = int(rest.split(",")[2], 0) * WARP
        p.shared += size
        p.beyond += size
