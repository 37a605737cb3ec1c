"""Roofline: what a compiled program needs on a pod, and how long it takes at least.

Nothing runs. Bytes of memory come from the compiler, collectives from the program's
text, operations from walking what was traced. Times are a model:

- products of matrices run at `SHARE` of the peak, kernels at the rate that their
  compiled schedule has in the compile matrix (`pallas_kernels/MATRIX.md`), at heads 128
  wide, but no product faster than the peak; what only reads and writes (norms,
  activations, the optimiser) is left out.
- a collective takes its bytes over the links that its group has, both ways: for an
  all-gather the result, for a reduce-scatter the operand, for an all-reduce both; a
  permutation goes as many links as its pairs are apart in the mean, an all-to-all as
  its members.
- what the program starts and waits for later is hidden behind computing, if computing
  is longer; what it does at once is not.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import tempfile
from collections import Counter
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import pallas_kernels
from experiments.measure import cost
from experiments.measure.collectives import Collective, instructions
from experiments.measure.topology import Pod
from pallas_kernels.matrix.cases import cases
from pallas_kernels.matrix.targets import TARGETS

RECORD = pathlib.Path(pallas_kernels.__file__).parent / "matrix.json"
SHARE = 0.9  # of the peak; jax's own matmul kernel for v5e is given as 0.91 to 0.92
# the case of the compile matrix that gives a family of kernels its rate
RATED = {
    "flash": "causal T8192 D128 H16", "linear": "head T8192 D128 H16",
    "delta": "gated T8192 D128 H16", "scan": "T8192 V128 H16 K4 packed",
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one device and one run. memory: bytes of arguments, results and temporaries;
    moved: (collectives, bytes) by kind; work: operations by name; compute, hidden and
    open: seconds of computing, of collectives behind it and of those that it waits for,
    None without a model of the device."""

    memory: int
    moved: dict[str, tuple[int, int]]
    work: Counter
    compute: float | None
    hidden: float | None
    open: float | None

    @property
    def products(self) -> float:
        """Operations of matrix products, in kernels and outside."""
        return sum(n for name, n in self.work.items() if _of_product(name))

    @property
    def step(self) -> float | None:
        """Seconds of a run."""
        if self.compute is None:
            return None
        return max(self.compute, self.hidden or 0) + (self.open or 0)

    @property
    def waiting(self) -> float | None:
        """The share of a run that is communication and nothing else."""
        return None if not self.step else 1 - (self.compute or 0) / self.step


def roofline(pod: Pod, mesh: Any, traced: Any, lowered: Any) -> Roofline:
    """The roofline of a program on `mesh`, traced and lowered, which is compiled."""
    compiled, text = built(pod, lowered)
    work = cost.work(traced.jaxpr.jaxpr)
    devices = len(pod.devices)
    work = Counter({name: n / devices for name, n in work.items()})
    found = instructions(text)
    moved: dict[str, tuple[int, int]] = {}
    for one in found:
        count, size = moved.get(one.kind, (0, 0))
        moved[one.kind] = count + one.times, size + one.times * one.bytes
    if pod.target is None:
        return Roofline(held(compiled), moved, work, None, None, None)
    seconds = {hidden: sum(
        took(pod, mesh, one) for one in found if one.hidden == hidden
    ) for hidden in (True, False)}
    return Roofline(
        held(compiled), moved, work, computing(pod, work), seconds[True], seconds[False]
    )


def built(pod: Pod, lowered: Any) -> tuple[Any, str]:
    """A lowered program, compiled, and its text. libtpu writes the text itself: jaxlib
    (0.10.2) cannot read those of its programs that have work on a SparseCore."""
    if pod.target is None:
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        [found] = pathlib.Path(folder).glob("*after_buffer_assignment.txt")
        return compiled, found.read_text()


def held(compiled: Any) -> int:
    """Bytes that a device holds while the program runs; results that take the place of
    arguments count once."""
    found = compiled.memory_analysis()
    return (found.argument_size_in_bytes + found.output_size_in_bytes
            + found.temp_size_in_bytes - found.alias_size_in_bytes)


def computing(pod: Pod, work: Counter) -> float:
    """Seconds of products and kernels. No kernel makes its products faster than the
    peak: schedules as they are read fall short of some that a step pipelines."""
    target = pod.target
    assert target is not None
    total = work["matmul"] / (SHARE * target.peak)
    for name in {n.split()[0] for n in work} - {"matmul", "other"}:
        products = work[f"{name} products"]
        every = work[name] + products
        total += max(every / rate(target.name, name), products / target.peak)
    return total


def _of_product(name: str) -> bool:
    return name == "matmul" or name.endswith(" products")


@functools.cache
def rate(target: str, kernel: str) -> float:
    """Operations a second of a kernel, by its name, on one device of the target: those
    of its case in the compile matrix over the time that the record gives it, and of one
    that the matrix has no time for, those of a product of matrices."""
    family, chip = kernel.split("_")[0], TARGETS[target]
    if family not in RATED:
        return SHARE * chip.peak
    operations, time = _recorded(target, f"{family} forward")
    if "backward" in kernel:
        both = _recorded(target, f"{family} backward")
        operations, time = both[0] - operations, both[1] - time
    return operations / time


def _recorded(target: str, name: str) -> tuple[float, float]:
    """Operations and seconds of a case of the compile matrix."""
    name = f"{name} {RATED[name.split()[0]]}"
    chip = TARGETS[target]
    f, args, _ = cases(chip)[name].build(chip)
    device = AbstractDevice(
        device_kind=chip.kind, num_cores=getattr(chip, "cores", 1), platform="tpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        operations = cost.flops(f, *args)
    record = json.loads(RECORD.read_text())["cases"]
    return operations, record[f"{target} {name}"]["milliseconds"] * 1e-3


def took(pod: Pod, mesh: Any, one: Collective) -> float:
    """Seconds of a collective, all the times it runs."""
    assert pod.link is not None
    at = mesh.devices.flat
    if one.kind == "collective-permute":
        away = pod.distance([(at[a], at[b]) for a, b in one.pairs])
        return one.times * one.bytes * max(away, 1) / pod.link
    members = [at[n] for n in one.members]
    group, ways = len(members), 2 * pod.spread(members) * pod.link
    if group == 1:
        return 0.0
    if one.kind.endswith("all-to-all"):
        away = pod.distance(list(itertools.product(members, members)))
        return one.times * one.bytes * away / ways
    size = one.bytes * (group if one.kind == "reduce-scatter" else 1)
    twice = 2 if one.kind == "all-reduce" else 1
    return one.times * twice * size * (group - 1) / group / ways
