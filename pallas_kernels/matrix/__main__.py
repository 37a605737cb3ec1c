"""The compile matrix: every kernel really compiled for every target, with none at hand.

    pip install -e '.[aot]'
    python -m pallas_kernels.matrix                      # all cases on all targets
    python -m pallas_kernels.matrix --targets v5e,sm90a --cases 'flash forward'
    python -m pallas_kernels.matrix --write              # matrix.json and MATRIX.md
    python -m pallas_kernels.matrix --check              # exit 1 if something got worse
    python -m pallas_kernels.matrix --check --all        # and compile what is unchanged
    python -m pallas_kernels.matrix --check --write      # record what changed
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
memory or spills than the record says. A case whose program has the digest that the
record has is not compiled again (`digest.py` says what that proves), which takes two
minutes for all of them on 2 cores; --all compiles them, in the better part of an hour.
"""

from __future__ import annotations

import argparse
import importlib
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

from pallas_kernels.matrix.digest import digest  # noqa: E402
from pallas_kernels.matrix.metrics import metrics  # noqa: E402
from pallas_kernels.matrix.record import (  # noqa: E402
    read, unrecorded, worse, write
)
from pallas_kernels.matrix.report import show  # noqa: E402
from pallas_kernels.matrix.targets import TARGETS, missing, worker  # noqa: E402

SHAPE = re.compile(r"^(\w+)\[([\d,]*)\]$")
SHORT = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s32": "int32",
         "s8": "int8"}


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


def chosen(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """The cases of one target that the command line asks for."""
    from pallas_kernels.matrix.cases import cases

    if given.function:
        return {given.function: own_case(given.function, given.shapes)}
    return {n: c for n, c in cases(TARGETS[name]).items()
            if given.cases in n and not (given.quick and (c.near_duplicate or c.peer))}


def work(given: argparse.Namespace) -> int:
    """The worker of one target: compiles its cases, or those that are not as recorded,
    prints a line for each that is done, and writes metrics; None: as recorded."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # a peer's word on its tuning
    del sys.argv[1:]  # which a peer reads, too
    target, folder = TARGETS[given.targets], pathlib.Path(given.worker)
    old = read()["cases"] if given.check and not given.all else {}
    found = {f"{target.name} {name}": case
             for name, case in chosen(given, target.name).items()}
    done = {}
    for name, case in found.items():
        done[name] = one(given, target, case, folder, old.get(name, {}))
        print(name, flush=True)
    pathlib.Path(given.out).write_text(json.dumps(done))
    return 0


def one(given: argparse.Namespace, target: Any, case: Any, folder: pathlib.Path,
        old: dict[str, Any]) -> dict[str, Any] | None:
    """A case's metrics with its digest; None if `old` has the same one."""
    own = None if case.peer or given.function else digest(target, case)
    if own is not None and own == old.get("digest"):
        return None
    new = metrics(target, case, folder)
    return new if own is None or "error" in new else {"digest": own} | new


def compile_all(given: argparse.Namespace) -> dict[str, Any] | None:
    """What `work` found for all cases, a process a target, as many at once as there are
    cores; None if one of them died."""
    from rich.console import Console
    from rich.progress import Progress

    def run(name: str, task: Any) -> dict[str, Any] | None:
        with tempfile.TemporaryDirectory() as folder, \
                tempfile.NamedTemporaryFile(suffix=".json") as out:
            more = ["--cases", given.cases, "--out", out.name, "--function",
                    given.function, "--shapes", given.shapes,
                    *["--quick"] * given.quick, *["--check"] * given.check,
                    *["--all"] * (given.all or given.write and not given.check)]
            process = worker("pallas_kernels.matrix", name, folder, *more,
                             stdout=subprocess.PIPE, text=True)
            for _ in process.stdout:
                progress.advance(task)
            dead = process.wait()
            return None if dead else json.loads(pathlib.Path(out.name).read_text())

    with Progress(console=Console(stderr=True)) as progress, \
            futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(run, name, progress.add_task(name, total=len(own)))
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
    parser.add_argument("--write", action="store_true", help="record the metrics")
    parser.add_argument("--check", action="store_true", help="compare with the record")
    parser.add_argument("--all", action="store_true",
                        help="with --check: compile what is as recorded, too")
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
    done = compile_all(given)
    if done is None:
        print("a compiler's process died: see above", file=sys.stderr)
        return 1
    if not done:
        print(f"--cases={given.cases!r}: no case has this in its name", file=sys.stderr)
        return 2
    found = {name: new for name, new in done.items() if new is not None}
    show(found)
    old = read()
    if given.write:
        part = given.cases or given.function or given.quick
        # a whole target is written anew: what is no case any more goes
        again = () if part or given.check else given.targets.split(",")
        kept = {n: one for n, one in old["cases"].items()
                if n.partition(" ")[0] not in again}
        write(kept | found)
    if not given.check:
        return 0
    print(f"{len(done) - len(found)} cases as recorded, {len(found)} compiled")
    lines = worse(old["cases"], found) + unrecorded(old["cases"], found)
    if lines:
        print("worse than the record:\n" + "\n".join(lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
