"""Rows of `experiments.speed`, as tables for the terminal and as a picture."""

from __future__ import annotations

import pathlib
from typing import Any

from rich import box
from rich.table import Table

from experiments.measure.panels import Panel, curves


def tables(rows: list[dict[str, Any]], base: str) -> list[Table]:
    """The rows for the terminal, a table a pass, a line a candidate: milliseconds, the
    ratio to `base` in brackets, and the share of the product or copy."""
    found = []
    for which in dict.fromkeys(row["pass"] for row in rows):
        of = [row for row in rows if row["pass"] == which]
        one = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
                    title=f"{which}: ms (times as fast as {base}), share of the limit")
        one.add_column("candidate", overflow="fold")
        lengths = list(dict.fromkeys(row["length"] for row in of))
        for t in lengths:
            one.add_column(f"T = {t:,}", justify="right")
        for name in dict.fromkeys(row["name"] for row in of):
            own = {row["length"]: row for row in of if row["name"] == name}
            one.add_row(name, *(_cell(own.get(t)) for t in lengths))
        found.append(one)
    return found


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ms = f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:,.0f}"
    share = f", {row['share']:.0%}" if "share" in row else ""
    return f"{ms} ({row['ratio']:.2f}){share}"


def picture(found: dict[str, Any], path: pathlib.Path) -> None:
    """Time against length, a line a candidate."""
    axes = {"xscale": "log", "yscale": "log", "xlabel": "tokens T",
            "ylabel": f"ms ({found['dtype']}, {found['device']})"}
    panels = []
    for which in dict.fromkeys(row["pass"] for row in found["rows"]):
        lines: dict[str, tuple[list, list]] = {}
        for row in found["rows"]:
            if row["pass"] == which:
                lengths, times = lines.setdefault(row["name"], ([], []))
                lengths.append(row["length"])
                times.append(row["ms"])
        panels.append(Panel(which, lines, axes))
    curves(panels, path)
