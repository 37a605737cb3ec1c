"""`python -m experiments`: the experiments, each with the first line of its docstring.

`python -m experiments NAME --field=value` runs one.
"""

from __future__ import annotations

import ast
import pathlib
import runpy
import sys

from experiments.cli.fields import unknown
from experiments.cli.usage import HELP, has_config, print_help

HERE = pathlib.Path(__file__).resolve().parent


def experiments() -> dict[str, str]:
    """Name -> first docstring line of each file with a Config and a run, unimported."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if has_config(path):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def check(argv: list[str]) -> str:
    """The name of the experiment named first in `argv`. Ends the program if there is
    none of that name, or with its help if that is asked for."""
    name = argv[0].removeprefix("experiments.").removesuffix(".py")
    found = experiments()
    if name not in found:
        print(unknown("experiment", name, found), file=sys.stderr)
        raise SystemExit(2)
    if {*HELP} & {*argv[1:]}:
        print_help(HERE / f"{name}.py")
    return name


def main(argv: list[str]) -> None:
    """Lists the experiments, or runs the one named first in `argv`."""
    found = experiments()
    if not argv or argv[0] in HELP:
        width = max(map(len, found), default=0)
        print("python -m experiments.NAME [--help] [--field=value ...]\n")
        print("\n".join(f"{name:<{width}}  {line}" for name, line in found.items()))
        return
    name = check(argv)
    sys.argv = argv
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
