"""Usage: the help of a command, read off its source before anything is imported.

To import jax and to make the values of all fields takes seconds; the text of a file is
there at once. What a default is, is printed as it is written.
"""

from __future__ import annotations

import ast
import pathlib
import sys
from collections.abc import Sequence

OPTIONS = {
    "help": "print this text",
    "tiny": "start from the TINY config, which runs in seconds",
    "traceback": "print where an error comes from",
}
HELP = ("--help", "-h")
HERE = pathlib.Path(__file__).resolve().parents[1]


def answer(words: Sequence[str]) -> None:
    """Prints the help and ends the program if `words`, those of the interpreter's
    command line, are `-m experiments.NAME ... --help`."""
    at = [n for n, word in enumerate(words[:-1]) if word == "-m"]
    if not at or not set(HELP) & {*words[at[0] + 2 :]}:
        return
    name = words[at[0] + 1].removeprefix("experiments.")
    path = HERE / f"{name}.py"
    if name != words[at[0] + 1] and path.is_file() and has_config(path):
        print_help(path)


def print_help(path: pathlib.Path) -> None:
    """Prints the help of the command in a file, and ends the program."""
    text = of_file(path)
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        print(text, flush=True)
    except OSError:
        sys.stdout = sys.stderr
    raise SystemExit(0)


def has_config(path: pathlib.Path) -> bool:
    """Whether a file is a command: it has a Config and a run."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {"Config", "run"} <= {n.name for n in tree.body if isinstance(n, kinds)}


def of_file(path: pathlib.Path) -> str:
    """The help of the command in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    config = next(node for node in tree.body
                  if isinstance(node, ast.ClassDef) and node.name == "Config")
    named = {target.id: node.value for node in tree.body if isinstance(node, ast.Assign)
             for target in node.targets if isinstance(target, ast.Name)}
    rows = [row for node in config.body if (row := _row(node, named))]
    return formatted(f"experiments.{path.stem}", ast.get_docstring(tree), rows)


def _row(node: ast.stmt, named: dict) -> tuple[str, str, str] | None:
    """(--name=kind, default, help) of a field; None for another statement."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
        return None
    given = dict(zip(("default", "doc"), node.value.args))
    given |= {word.arg: word.value for word in node.value.keywords if word.arg}
    default, doc = given.get("default"), given.get("doc")
    if isinstance(default, ast.Name) and default.id in named:
        default = named[default.id]
    value = "required" if default is None else _value(default)
    assert isinstance(node.target, ast.Name)
    text = ast.literal_eval(doc) if doc is not None else ""
    return f"--{node.target.id}={ast.unparse(node.annotation)}", value, text


def _value(node: ast.expr) -> str:
    """A default as it is typed: `2**21` is 2097152."""
    powers = (ast.BinOp, ast.Constant)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        if all(isinstance(side, powers) for side in (node.left, node.right)):
            return str(ast.literal_eval(node.left) ** ast.literal_eval(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        return repr(node.value)
    return ast.unparse(node)


def formatted(title: str, doc: str | None, rows: list[tuple[str, str, str]]) -> str:
    """The text of a help: its docstring, then each field and its default."""
    rows = rows + [(f"--{name}", "", text) for name, text in OPTIONS.items()]
    wide = [min(max(len(row[i]) for row in rows), 30) for i in (0, 1)]
    lines = [f"  {a:<{wide[0]}}  {b:<{wide[1]}}  {c}".rstrip() for a, b, c in rows]
    call = f"python -m {title} [--field=value ...]"
    return "\n".join([(doc or "").strip(), "", call, "", *lines]).lstrip()
