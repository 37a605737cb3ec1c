"""The compile matrix: every kernel really compiled for every target, with none at hand.

    pip install -e '.[aot]'
    python -m pallas_kernels.matrix                      # all cases on all targets
    python -m pallas_kernels.matrix --targets v5e,sm90a --cases 'flash forward'
    python -m pallas_kernels.matrix --write              # matrix.json and MATRIX.md
    python -m pallas_kernels.matrix --check              # exit 1 if something got worse
    python -m pallas_kernels.matrix --targets v5e --function my.module:f \\
        --shapes 'bf16[1,8192,16,128] bf16[1,8192,16,128]'   # a function of your own

libtpu and XLA's CUDA compiler run on any machine. What is printed is read off what
they made. TPU: bundles (one a cycle) of the regions in which the matrix unit works,
times how often each runs; how much of the matrix, vector and load-store units they use;
spills; fast memory; and the predicted time, the larger of cycles over clock and bytes
over bandwidth, with the share of the chip's peak that it implies. Where a schedule is
shorter than the products of a flash kernel at the peak, their cycles count and stand
behind it: of v5e's and v5p's vmatmul.lmr it has a third of the rows. GPU: registers,
spilled bytes, shared memory, tensor-core instructions in the kernel's text, and
occupancy. Nothing is measured: the memory system's stalls are not in it. A check fails
when a case that compiled no longer does, or needs over 5% more bundles, registers, fast
memory or spills than the record says. All of it takes the better part of an hour
on 2 cores, --quick half an hour.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent import futures
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax loads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from pallas_kernels.matrix.figures import GROWS, figures  # noqa: E402
from pallas_kernels.matrix.report import page, show  # noqa: E402
from pallas_kernels.matrix.targets import TARGETS, missing, worker  # noqa: E402

HERE = pathlib.Path(__file__).parents[1]
RECORD, PAGE = HERE / "matrix.json", HERE / "MATRIX.md"
SLACK = 1.05  # how much more of anything a check allows
SHAPE = re.compile(r"^(\w+)\[([\d,]*)\]$")
SHORT = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s32": "int32",
         "s8": "int8"}
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "tokamax")


def own_case(function: str, shapes: str) -> Any:
    """A case from `module:name` and 'bf16[1,8] f32[4]'. ValueError says what is wrong.
    """
    from pallas_kernels.matrix.cases import Case

    module, _, name = function.partition(":")
    try:
        f = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--function={function}: {error}") from None
    args = []
    for text in shapes.split():
        match = SHAPE.match(text)
        if not match:
            raise ValueError(f"--shapes: {text!r}: expected one like bf16[1,8192,128]")
        size = tuple(int(n) for n in match[2].split(",") if n)
        try:
            kind = jnp.dtype(SHORT.get(match[1], match[1]))
        except TypeError as error:
            raise ValueError(f"--shapes: {text!r}: {error}") from None
        args.append(jax.ShapeDtypeStruct(size, kind))
    return Case(lambda target: (f, tuple(args), {}), whole=True)


def worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What got worse from one record to the next, a line each; peers may change."""
    lines = []
    for name, before in old.items():
        after = new.get(name)
        if after is None or before.get("peer"):
            continue
        for kind in ("error", "refused"):
            if kind in after and kind not in before:
                lines.append(f"{name}: {kind}: {after[kind]}")
        for kernel, was in before.get("kernels", {}).items():
            now = after.get("kernels", {}).get(kernel)
            # Mosaic GPU leaves nothing of a kernel that an earlier case had compiled
            gone = now is None and "kernels" in after
            if gone and not {"mosaic", "blackwell"} & set(name.split()):
                lines.append(f"{name}: {kernel}: is no longer there")
            for figure in GROWS if now else ():
                # a figure that was 0 may not appear
                if now.get(figure, 0) > was.get(figure, 0) * SLACK:
                    lines.append(f"{name}: {kernel}: {figure} {was.get(figure, 0)} -> "
                                 f"{now[figure]}")
    return lines


def unrecorded(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Errors of cases that the record does not have, a line each."""
    return [f"{name}: error: {found['error']}" for name, found in new.items()
            if name not in old and "error" in found and not found.get("peer")]


def chosen(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """The cases of one target that the command line asks for."""
    from pallas_kernels.matrix.cases import cases

    if given.function:
        return {given.function: own_case(given.function, given.shapes)}
    return {n: c for n, c in cases(TARGETS[name]).items()
            if given.cases in n and not (given.quick and (c.kin or c.peer))}


def work(given: argparse.Namespace) -> int:
    """The worker of one target: compiles its cases, prints a line for each that is
    done, and writes their figures."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # a peer's word on its tuning
    del sys.argv[1:]  # which a peer reads, too
    target, folder = TARGETS[given.targets], pathlib.Path(given.worker)
    found = {}
    for name, case in chosen(given, target.name).items():
        found[f"{target.name} {name}"] = figures(target, case, folder)
        print(name, flush=True)
    pathlib.Path(given.out).write_text(json.dumps(found))
    return 0


def compile_all(given: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of all cases, a process a target, as many at once as there are cores;
    None if one of them died."""
    from rich.console import Console
    from rich.progress import Progress

    def one(name: str, task: Any) -> dict[str, Any] | None:
        with tempfile.TemporaryDirectory() as folder, \
                tempfile.NamedTemporaryFile(suffix=".json") as out:
            more = ["--cases", given.cases, "--out", out.name, "--function",
                    given.function, "--shapes", given.shapes,
                    *["--quick"] * given.quick]
            process = worker("pallas_kernels.matrix", name, folder, *more,
                             stdout=subprocess.PIPE, text=True)
            for _ in process.stdout:
                progress.advance(task)
            dead = process.wait()
            return None if dead else json.loads(pathlib.Path(out.name).read_text())

    with Progress(console=Console(stderr=True)) as progress, \
            futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(one, name, progress.add_task(name, total=len(own)))
            for name in given.targets.split(",") if (own := chosen(given, name))
        ]
        found = [job.result() for job in jobs]
    whole = [part for part in found if part is not None]
    if len(whole) < len(found):
        return None
    return {name: one for part in whole for name, one in part.items()}


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--cases", default="", help="only those whose name holds this")
    parser.add_argument("--function", default="", help="module:name of your own")
    parser.add_argument("--shapes", default="", help="its arguments: 'bf16[8,128] ...'")
    parser.add_argument("--write", action="store_true", help="record the figures")
    parser.add_argument("--check", action="store_true", help="compare with the record")
    parser.add_argument("--quick", action="store_true",
                        help="leave out peers, and cases that another one is near to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def problem(given: argparse.Namespace) -> str | None:
    """What is wrong with the command line, in a sentence."""
    names = given.targets.split(",")
    if unknown := set(names) - set(TARGETS):
        return f"--targets={','.join(sorted(unknown))}: expected some of " \
            f"{','.join(TARGETS)}"
    if given.function:
        try:
            own_case(given.function, given.shapes)
        except ValueError as error:
            return str(error)
    elif given.shapes:
        return f"--shapes={given.shapes}: expected a --function beside it"
    return next((text for n in names if (text := missing(TARGETS[n]))), None)


def main(arguments: list[str]) -> int:
    """Compiles, prints, and records or checks; the exit status."""
    given = parsed(arguments)
    if given.worker:
        return work(given)
    if wrong := problem(given):
        print(wrong, file=sys.stderr)
        return 2
    found = compile_all(given)
    if found is None:
        print("a compiler's process died: see above", file=sys.stderr)
        return 1
    if not found:
        print(f"--cases={given.cases!r}: no case has this in its name", file=sys.stderr)
        return 2
    show(found)
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {"cases": {}}
    if given.write:
        part = given.cases or given.function or given.quick
        again = () if part else given.targets.split(",")
        kept = {n: one for n, one in old["cases"].items()
                if n.partition(" ")[0] not in again}
        record(kept | found)
    lines = worse(old["cases"], found) + unrecorded(old["cases"], found)
    if given.check and lines:
        print("worse than the record:\n" + "\n".join(lines))
        return 1
    return 0


def record(found: dict[str, Any]) -> None:
    """Writes matrix.json and MATRIX.md."""
    there = {d.name for d in importlib.metadata.distributions()}
    versions = {n: importlib.metadata.version(n) for n in PACKAGES if n in there}
    new = {"versions": versions, "cases": dict(sorted(found.items()))}
    RECORD.write_text(json.dumps(new, indent=1) + "\n")
    PAGE.write_text(page(new))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
