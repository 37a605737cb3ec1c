"""Metrics: what one program compiles to on one target, as plain numbers.

On TPU: bundles of each region in which the matrix unit works, and how often it runs;
shares of the units' capacity; fills and spills; fast memory (VMEM); and the predicted
time, the larger of cycles over clock and bytes over bandwidth. A kernel takes no fewer
cycles than its matrix products take at the peak: schedules count one form of product
(vmatmul.lmr of v5e and v5p) for a third of its rows. On GPU: registers of a
thread, bytes that spill, shared memory, tensor-core instructions, occupancy.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from pallas_kernels import Refused
from pallas_kernels.matrix import tpu_schedule, ptx
from pallas_kernels.matrix.case import TripCounts
from pallas_kernels.matrix.cases import Case, bytes_of
from pallas_kernels.matrix.targets import Gpu, Tpu, compiled

GROWS = ("bundles", "spills", "registers", "memory")  # what may not get larger


def metrics(target: Tpu | Gpu, case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """What one case compiles to on one target; dumps go to, and fill, `folder`."""
    for path in folder.iterdir():
        path.unlink()
    found: dict[str, Any] = {"peer": True} if case.peer else {}
    try:
        f, args, trips = case.build(target)
        program = compiled(target, f, *args)
    except Refused as error:
        return found | {"refused": str(error)}
    except Exception as error:  # whatever the compiler says is the finding
        text = (str(error).strip() or "no reason given").splitlines()[0]
        return found | {"error": f"{type(error).__name__}: {text[:200]}"}
    found["temporary_bytes"] = program.memory_analysis().temp_size_in_bytes
    if isinstance(target, Tpu):
        return found | _on_tpu(target, case, folder, args, trips)
    kernels = ptx.programs(folder, whole=case.whole)
    return found | {"kernels": {n: _gpu(k, target) for n, k in sorted(kernels.items())}}


def _on_tpu(target: Tpu, case: Case, folder, args, trips) -> dict[str, Any]:
    kernels = tpu_schedule.programs(folder, whole=case.whole)
    memory: dict[str, int] = {}
    for path in folder.glob("*vmem_report.html"):
        memory |= vmem(path.read_text())
    found: dict[str, Any] = {"kernels": {}}
    counts: dict[str, list[float | None]] = {start: [] for start in trips}
    for name, read in sorted(kernels.items()):
        one = _tpu(read) | {"memory": memory.get(name, 0)}
        for start, own in trips.items():
            if start in name:
                counts[start].append(cycles(target, read, start, own))
                if counts[start][-1] is not None:
                    one["trips"] = list(own.tiles)
                    if counts[start][-1] == (least := _least(target, read, start, own)):
                        one["least"] = round(least)
        found["kernels"][name] = one
    every = [n for own in counts.values() for n in own or [None]]
    known = [n for n in every if n is not None]
    if known and len(known) == len(every):
        found |= predicted(target, case, sum(known), case.moved or bytes_of(args))
    return found


def cycles(target: Tpu, read: tpu_schedule.Program, start: str, trips: TripCounts):
    """Cycles of a kernel whose name holds `start`: those of its schedule, or of its
    products at the peak if they take longer; None if the schedule has other regions."""
    scheduled = read.cycles(trips.tiles, trips.lines, trips.steps)
    return None if scheduled is None else max(
        scheduled, _least(target, read, start, trips))


def _least(target: Tpu, read: tpu_schedule.Program, start: str,
           trips: TripCounts) -> float:
    """Cycles of a kernel's products at the peak."""
    return trips.products(read.name.partition(start)[2]) / target.cycle


def predicted(target: Tpu, case: Case, count: float, moved: float) -> dict[str, Any]:
    """The time that `count` cycles of one core and `moved` bytes take at least."""
    compute = count / target.clock / target.cores
    memory = moved / target.bandwidth
    found: dict[str, Any] = {
        "milliseconds": round(max(compute, memory) * 1e3, 4),
        "bound": "compute" if compute >= memory else "memory",
    }
    if case.flops:
        share = case.flops / max(compute, memory) / target.peak
        found["share_of_peak"] = round(share, 3)
    return found


def vmem(report: str) -> dict[str, int]:
    """Bytes of fast memory of each kernel, from the page on it that libtpu leaves."""
    start = report.index("const DATA =") + len("const DATA =")
    data = json.JSONDecoder().raw_decode(report[start:].lstrip())[0]
    return {n: one["total_size"] for n, one in data["hlo_breakdowns"].items()}


def _tpu(p: tpu_schedule.Program) -> dict[str, Any]:
    tiles = p.tiles or p.regions
    bundles = max(sum(r.bundles for r in tiles), 1)
    use = {
        unit.lower(): round(sum(r.units[unit] for r in tiles) / bundles
                            / p.capacity[unit], 3)
        for unit in ("MATMUL", "VALU", "VLOAD", "VSTORE")
    }
    return {"bundles": p.bundles, "tiles": [r.bundles for r in p.tiles], "use": use,
            "fills": p.total("FILL"), "spills": p.total("SPILL")}


def _gpu(k: ptx.Kernel, target: Gpu) -> dict[str, Any]:
    return {"registers": k.registers, "spills": k.spills, "memory": k.shared,
            "threads": k.threads, "tensor": k.tensor, "unit": k.unit,
            "occupancy": round(k.occupancy(target), 3)}
