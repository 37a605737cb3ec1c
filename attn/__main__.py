"""python -m attn: every attention with its paper, its patterns (noncausal and causal,
self and cross attention), its cost and what a stream keeps."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import pathlib
import re
from typing import Any, Iterator

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from attn.contract.attention import said
from attn.contract.patterns import PATTERNS, patterns
from attn.masks import Full

SIZES = 4096, 16384
# q, k, v [B,T,H,D] and the tokens x [B,T,E] of the streams that are measured
SHAPES = (1, 1, 8, 64), (1, 1, 8, 64), (1, 1, 8, 64), (1, 1, 512)


def papers() -> Iterator[tuple[str, str, str]]:
    """(class, "authors, year", arXiv id) of every attention, by file."""
    for path in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.lower() == path.stem:
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if found := re.search(r"\((.+?, \d{4})\)\s+arXiv:(\d+\.\d+)", first):
                    yield node.name, found[1], found[2]


def kept(attention: Any, size: int) -> int | None:
    """Bytes that a stream keeps of `size` tokens, in bfloat16; None without a stream.
    """
    if not hasattr(attention, "init_state") or not said(attention, "causal"):
        return None
    q, k, v, x = (jax.ShapeDtypeStruct(a, jnp.bfloat16) for a in SHAPES)
    state = jax.eval_shape(lambda: attention.init_state(size, q, k, v, x=x))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))


def supported(cls: Any) -> tuple[str, ...]:
    """The patterns of a class: of its default, and of those of its settings that change
    the order of tokens."""
    found: set[str] = set()
    for fields in ({}, {"causal": True}, {"causal": False}, {"mask": Full()}):
        if fields.keys() <= cls.__dataclass_fields__.keys():
            with contextlib.suppress(ValueError):  # it is not made so
                found |= set(patterns(cls(**fields)))
    return tuple(name for name in PATTERNS if name in found)


def main() -> None:
    """Prints the table."""
    *_, heads, width = SHAPES[0]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=(
        f"kept: MB of a stream, {heads} heads of width {width}, bfloat16, default "
        "settings; -: no stream. Patterns: N noncausal, C causal; S self, C cross. "
        "Cost: of L tokens, D channels, m features, rank r, "
        "blocks of b."))
    table.add_column("attention", no_wrap=True)
    table.add_column("paper")
    table.add_column("arXiv", no_wrap=True)
    table.add_column("patterns", no_wrap=True)
    for size in SIZES:
        table.add_column(f"kept of\n{size:,}", justify="right", no_wrap=True)
    table.add_column("cost")
    for name, *paper in papers():
        made = getattr(importlib.import_module(f"attn.{name.lower()}"), name)
        if "q" not in inspect.signature(made.__call__).parameters:
            continue  # a mixer of tokens, an analysis of others
        sizes = (kept(made(), size) for size in SIZES)
        cells = ("-" if n is None else f"{n / 1e6:,.2f}" for n in sizes)
        own = supported(made)
        marks = " ".join(p if p in own else "  " for p in PATTERNS)
        table.add_row(name, *paper, marks, *cells, made.row.cost)
    Console().print(table)


if __name__ == "__main__":
    main()
