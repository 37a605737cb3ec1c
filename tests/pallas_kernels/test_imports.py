"""Imports inside `pallas_kernels` go down, rank by rank."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2] / "pallas_kernels"
RANKS = (
    ("__init__", "tile", "tiles"),
    ("tables",),
    ("schedule", "refusals", "machine"),
    ("flash", "decode", "linear", "delta", "scan"),
    ("blocks",),
    ("matrix",),
    ("tune",),
)
RANK = {name: n for n, names in enumerate(RANKS) for name in names}


def imported(path):
    """The parts of `pallas_kernels` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            first, *rest = node.module.split(".")
            if first == "pallas_kernels":
                yield from rest[:1] or [a.name for a in node.names if a.name in RANK]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported(path):
        assert other == own or RANK[other] < RANK[own], f"{path} imports {other}"
