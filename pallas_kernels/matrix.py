"""The compile matrix: every kernel really compiled for every TPU, with none at hand.

    pip install -e '.[aot]'
    python -m pallas_kernels.matrix                      # all cases on all targets
    python -m pallas_kernels.matrix --targets v5e --cases 'forward causal T8192 D128'
    python -m pallas_kernels.matrix --write              # matrix.json and MATRIX.md
    python -m pallas_kernels.matrix --check              # exit 1 if something got worse
    python -m pallas_kernels.matrix --targets v5e --function my.module:f \\
        --shapes 'bf16[1,8192,16,128] bf16[1,8192,16,128]'   # a function of your own

libtpu compiles on any machine. What is printed is read off its schedule: bundles (one
a cycle) of the regions in which the matrix unit works, how much of the matrix, vector
and load-store units they use, fills and spills, bytes that the program keeps in main
memory beside its arguments; and the predicted time, the larger of cycles over clock and
bytes over bandwidth, with the share of the chip's peak that it implies. Nothing is
measured: the memory system's stalls are not in it. GPU targets have no kernels yet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, readings
from pallas_kernels.targets import TARGETS, Target, compiled, in_process

HERE = pathlib.Path(__file__).parent
RECORD, PAGE = HERE / "matrix.json", HERE / "MATRIX.md"
SLACK = 1.05  # how much more of anything a check allows
SHAPE = re.compile(r"^(\w+)\[([\d,]*)\]$")
SHORT = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "s32": "int32",
         "s8": "int8"}


def figures(target: Target, case: Any, folder: pathlib.Path) -> dict[str, Any]:
    """What one case compiles to on one target."""
    from pallas_kernels.cases import bytes_of

    for path in folder.iterdir():
        path.unlink()
    try:
        f, args, trips = case.build(target.kind)
        program = compiled(target, f, *args)
    except Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # whatever the compiler says is the finding
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    kernels = readings.programs(folder, whole=case.whole)
    found: dict[str, Any] = {
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "kernels": {n: _kernel(p) for n, p in sorted(kernels.items())},
    }
    counts = [p.cycles(*own) for n, p in kernels.items()
              for start, own in trips.items() if start in n]
    cycles = [n for n in counts if n is not None]
    if cycles and len(cycles) == len(trips):
        compute = sum(cycles) / target.clock / target.cores
        memory = (case.moved or bytes_of(args)) / target.bandwidth
        found["milliseconds"] = round(max(compute, memory) * 1e3, 4)
        found["bound"] = "compute" if compute >= memory else "memory"
        if case.flops:
            share = case.flops / max(compute, memory) / target.peak
            found["share_of_peak"] = round(share, 3)
    return found


def _kernel(p: readings.Program) -> dict[str, Any]:
    """The figures of one kernel's program."""
    use = {}
    tiles = p.tiles or p.regions
    bundles = max(sum(r.bundles for r in tiles), 1)
    for unit in ("MATMUL", "VALU", "VLOAD", "VSTORE"):
        used = sum(r.units[unit] for r in tiles)
        use[unit.lower()] = round(used / bundles / p.capacity[unit], 3)
    return {"bundles": p.bundles, "tiles": [r.bundles for r in p.tiles], "use": use,
            "fills": p.total("FILL"), "spills": p.total("SPILL")}


def own_case(function: str, shapes: str) -> Any:
    """A case from `module:name` and 'bf16[1,8] f32[4]'. ValueError says what is wrong.
    """
    from pallas_kernels.cases import Case

    module, _, name = function.partition(":")
    try:
        f = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--function={function}: {error}") from None
    args = []
    for text in shapes.split():
        match = SHAPE.match(text)
        if not match:
            raise ValueError(f"--shapes: {text!r}: expected one like bf16[1,8192,128]")
        size = tuple(int(n) for n in match[2].split(",") if n)
        kind = jnp.dtype(SHORT.get(match[1], match[1]))
        args.append(jax.ShapeDtypeStruct(size, kind))
    return Case(lambda device: (f, tuple(args), {}), whole=True)


def worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What got worse from one record to the next, a line each."""
    lines = []
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            continue
        for kind in ("error", "refused"):
            if kind in after and kind not in before:
                lines.append(f"{name}: {kind}: {after[kind]}")
        for kernel, was in before.get("kernels", {}).items():
            now = after.get("kernels", {}).get(kernel)
            for figure in ("bundles", "spills"):
                if now and now[figure] > was[figure] * SLACK:
                    lines.append(f"{name}: {kernel}: {figure} {was[figure]} -> "
                                 f"{now[figure]}")
    return lines


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# Compile matrix", "",
        "Generated by `python -m pallas_kernels.matrix --write`; predicted, not "
        "measured (see the module's text).",
        f"jax {record['jax']}, libtpu {record['libtpu']}.", "",
        "| target | case | kernels: bundles of tiles | matrix | vector | load | store "
        "| spills | ms | of peak |", "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in record["cases"].items():
        target, _, case = name.partition(" ")
        if "kernels" not in found:
            reason = found.get("error") or f"refused: {found['refused']}"
            lines.append(f"| {target} | {case} | {reason} | | | | | | | |")
            continue
        kernels = found["kernels"]
        tiles = "; ".join(f"{n.strip('_')}: {', '.join(map(str, k['tiles']))}"
                          for n, k in kernels.items())
        use = ["/".join(f"{k['use'][u]:.0%}" for k in kernels.values())
               for u in ("matmul", "valu", "vload", "vstore")]
        spills = "/".join(str(k["spills"]) for k in kernels.values())
        share = found.get("share_of_peak")
        cells = [target, case, tiles, *use, spills, str(found.get("milliseconds", "")),
                 "" if share is None else f"{share:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def work(given: argparse.Namespace) -> int:
    """The worker of one target: compiles its cases, writes their figures."""
    from rich.console import Console
    from rich.progress import track

    from pallas_kernels.cases import cases

    target, folder = TARGETS[given.targets], pathlib.Path(given.worker)
    chosen = {n: c for n, c in cases().items() if given.cases in n}
    if given.function:
        chosen = {given.function: own_case(given.function, given.shapes)}
    console = Console(stderr=True)
    found = {
        f"{target.name} {name}": figures(target, case, folder)
        for name, case in track(chosen.items(), target.name, console=console)
    }
    pathlib.Path(given.out).write_text(json.dumps(found))
    return 0


def show(found: dict[str, Any]) -> None:
    """The figures on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "case", "kernel", title="compile matrix (predicted)")
    for column in ("tiles", "matrix", "vector", "spills", "ms", "of peak"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        target, _, case = name.partition(" ")
        if "kernels" not in one:
            table.add_row(target, case, one.get("error") or one["refused"])
        for kernel, k in one.get("kernels", {}).items():
            share = one.get("share_of_peak")
            use = [f"{k['use'][unit]:.0%}" for unit in ("matmul", "valu")]
            table.add_row(
                target, case, kernel, ", ".join(map(str, k["tiles"])), *use,
                str(k["spills"]), str(one.get("milliseconds", "")),
                "" if share is None else f"{share:.0%}",
            )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


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
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def problem(given: argparse.Namespace) -> str | None:
    """What is wrong with the command line, in a sentence."""
    if unknown := set(given.targets.split(",")) - set(TARGETS):
        return f"--targets={','.join(sorted(unknown))}: expected some of " \
            f"{','.join(TARGETS)}"
    if given.function:
        try:
            own_case(given.function, given.shapes)
        except (ValueError, TypeError) as error:
            return str(error)
    try:
        importlib.import_module("libtpu")
    except ImportError:
        return "libtpu is not installed: pip install -e '.[aot]'"
    return None


def main(arguments: list[str]) -> int:
    """Compiles, prints, and records or checks; the exit status."""
    given = parsed(arguments)
    if given.worker:
        return work(given)
    if wrong := problem(given):
        print(wrong, file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    for name in given.targets.split(","):
        with tempfile.TemporaryDirectory() as folder, \
                tempfile.NamedTemporaryFile(suffix=".json") as out:
            more = ["--cases", given.cases, "--out", out.name,
                    "--function", given.function, "--shapes", given.shapes]
            if code := in_process("pallas_kernels.matrix", name, folder, *more):
                return code
            found |= json.loads(pathlib.Path(out.name).read_text())
    show(found)
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {"cases": {}}
    if given.write:
        record(old["cases"] | found)
    if given.check and (lines := worse(old["cases"], found)):
        print("worse than the record:\n" + "\n".join(lines))
        return 1
    return 0


def record(found: dict[str, Any]) -> None:
    """Writes matrix.json and MATRIX.md."""
    import importlib.metadata

    new = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"),
           "cases": dict(sorted(found.items()))}
    RECORD.write_text(json.dumps(new, indent=1) + "\n")
    PAGE.write_text(page(new))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
