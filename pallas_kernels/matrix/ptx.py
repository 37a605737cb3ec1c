"""Readings: what the compiler says of a GPU kernel before it ever runs.

XLA and Mosaic GPU leave the PTX of each kernel, and ptxas says what became of it:
registers a thread, bytes that spill out of them, shared memory. How many blocks of
threads a multiprocessor then holds at once follows from CUDA's rules of occupancy.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
from typing import NamedTuple

from pallas_kernels.matrix import ptx_loop
from pallas_kernels.matrix.targets import Gpu, ptxas

TENSOR = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
ENTRY = re.compile(r"\.entry\s+([\w$]+)")
ARCH = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
THREADS = re.compile(r"^\.(?:reqntid|maxntid)\s+(\d+)(?:,\s*(\d+))?", re.MULTILINE)
USED = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
STATIC = re.compile(r"(\d+) bytes smem")
LAUNCH = re.compile(r"kCustomKernel \[[^\]]*\] (\S+) .*shared_memory: (\d+) bytes")
DYNAMIC = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")
XLA_OWN = re.compile(r"fusion|^wrapped_|^(copy|concatenate|transpose|sort)[_\d]*$")
MOST_BLOCKS, RESERVED = 32, 1024  # of one multiprocessor; bytes a block costs beside


class Kernel(NamedTuple):
    """registers: of a thread; spills: bytes stored and loaded again; shared: bytes of
    a block; threads: of a block; tensor: tensor-core instructions in the text, of the
    `unit` wgmma, mma or tcgen05; work: of its busiest loop."""

    name: str
    registers: int
    spills: int
    shared: int
    threads: int
    tensor: int
    unit: str
    work: ptx_loop.Pass = ptx_loop.Pass()

    def cycles(self, target: Gpu, stream: bool = False) -> tuple[float, float]:
        """The time of a pass of its busiest loop, and a warp's own, by `ptx_loop`."""
        warps = -(-self.threads // 32)
        return self.work.cycles(target, warps, self.blocks(target), stream)

    def blocks(self, target: Gpu) -> int:
        """Blocks that one multiprocessor holds at once."""
        warps = -(-self.threads // 32)
        each = -(-self.registers * 32 // 256) * 256 * warps
        return min(
            MOST_BLOCKS, 2048 // (warps * 32), 65536 // max(each, 1),
            target.shared // (self.shared + RESERVED),
        )

    def occupancy(self, target: Gpu) -> float:
        """Threads that a multiprocessor holds, as a share of the 2048 it could."""
        return self.blocks(target) * -(-self.threads // 32) * 32 / 2048


def kernel(ptx: str, said: str, shared: int) -> Kernel:
    """A kernel from its PTX, from what ptxas said, and its bytes of dynamic memory."""
    name = ENTRY.search(ptx)
    sizes = THREADS.search(ptx)
    threads = int(sizes[1]) * int(sizes[2] or 1) if sizes else 1
    found = TENSOR.findall(ptx)
    spills, static = SPILLS.search(said), STATIC.search(said)
    used = USED.search(said)
    if name is None or used is None:
        raise ValueError(f"ptxas said {said.strip()[:200]!r}")
    return Kernel(
        name[1], int(used[1]), sum(map(int, spills.groups())) if spills else 0,
        shared + (int(static[1]) if static else 0), threads, len(found),
        found[0].split(".")[0] if found else "", ptx_loop.busiest(ptx),
    )


def assembled(path: pathlib.Path) -> str:
    """What ptxas says of a file: as Mosaic GPU left it beside it, or asked for now."""
    left = path.with_suffix(".ptxas")
    if left.exists():
        return left.read_text()
    arch = ARCH.search(path.read_text())
    words = [str(ptxas()), "-v", f"-arch={arch[1] if arch else 'sm_80'}", str(path),
             "-o", "/dev/null"]
    return subprocess.run(words, capture_output=True, text=True).stderr


def programs(folder: pathlib.Path, whole: bool = False) -> dict[str, Kernel]:
    """The kernels that were dumped to a folder, by name: Pallas's own, or all of the
    `whole`, XLA's fusions with them. A name that comes again is numbered."""
    launches: dict[str, int] = {}
    for path in folder.glob("*thunk_sequence.txt"):
        for name, shared in LAUNCH.findall(path.read_text()):
            launches[name] = int(shared)
    found: dict[str, Kernel] = {}
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        entry = ENTRY.search(text)
        if entry is None or XLA_OWN.search(entry[1]) and not whole:
            continue
        name, shared = entry[1], launches.get(entry[1], 0)
        log = path.with_suffix(".mlir-passes.log")
        if log.exists():
            dynamic = DYNAMIC.search(log.open().read(10**7))
            shared = int(dynamic[1]) if dynamic else 0
        name = name.removesuffix("_mosaic_gpu_kernel")
        while name in found:
            name += "'"
        found[name] = kernel(text, assembled(path), shared)._replace(name=name)
    return found
