"""Distances: right answers against how far back that stands which is asked for.

What `seeds.merged` gave has numbers NAME N, the share of right answers at distance N,
NAME, that of all, and NAME kept, where a memory keeps what is asked for.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.measure import seeds
from experiments.measure.report import LINES, plt, style


def lines(found: dict[str, Any], name: str, most: int) -> np.ndarray:
    """The medians, the least and the greatest [3,n] at distances 1 to n = `most`."""
    return np.array([
        [found.get(f"{name} {n}{end}", found[f"{name} {n}"])
         for n in range(1, most + 1)] for end in ("", " from", " to")])


def picture(found: dict[str, Any], names: Sequence[str], most: int, chance: float,
            xlabel: str, path: pathlib.Path) -> None:
    """A line a name, at each distance one from the least to the greatest seed."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for n, name in enumerate(names):
        middle, least, greatest = lines(found, name, most)
        at = np.arange(1, most + 1) + 0.04 * (n - len(names) / 2)  # side by side
        axes.plot(at, middle, label=name, lw=1, ls=LINES[n % len(LINES)], **style(n))
        axes.vlines(at, least, greatest, color=f"C{n % 10}", lw=1)
    axes.axhline(chance, color="gray", lw=1, ls=":", label="chance")
    axes.set(ylim=(-0.03, 1.03), xlabel=xlabel, ylabel="right answers")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(found: dict[str, Any], names: Sequence[str], most: int, title: str) -> Table:
    """The same for the terminal, with the spread of what is known of all distances."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
                  title=title)
    shown.add_column("")
    for head in (*map(str, range(1, most + 1)), "all", "kept"):
        shown.add_column(head, justify="right")
    for name in names:
        shown.add_row(
            name, *(f"{share:.0%}" for share in lines(found, name, most)[0]),
            *(seeds.spread(found, key, "{:.0%}") if key in found else ""
              for key in (name, f"{name} kept")))
    return shown
