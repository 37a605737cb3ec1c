"""Panels: curves and matrices side by side in one picture."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from experiments.measure.report import LINES, plt, style


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves of one panel. lines: name -> (x, y), or (x, y, least, greatest) of several
    seeds, each a sequence of as many numbers; axes: what matplotlib sets, such as
    xlabel and yscale; levels: name -> a number that does not depend on x. On a
    logarithmic axis each x has its tick, as a number."""

    title: str
    lines: Mapping[str, Sequence]
    axes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)


def curves(panels: Sequence[Panel], path: pathlib.Path) -> None:
    """Draws the panels beside each other into a file."""
    figure, every = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8),
                                 layout="constrained", squeeze=False)
    for axes, panel in zip(every[0], panels):
        for n, (name, (x, y, *spread)) in enumerate(panel.lines.items()):
            axes.plot(x, y, label=name, ls=LINES[n % len(LINES)], ms=4, **style(n))
            if spread:
                axes.fill_between(x, *spread, alpha=0.2, color=f"C{n % 10}", lw=0)
        for n, (name, level) in enumerate(panel.levels.items()):
            axes.axhline(level, color="gray", ls=LINES[-1 - n % len(LINES)], label=name)
        axes.set(title=panel.title, **panel.axes)
        if panel.axes.get("xscale") == "log":
            ticks = sorted({float(at) for x, *_ in panel.lines.values() for at in x})
            axes.set_xticks(ticks, [f"{at:,g}" for at in ticks])
            axes.minorticks_off()
        if panel.axes.get("yscale") == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) + len(panel.levels) > 1:
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def matrices(rows: Sequence[Mapping[str, np.ndarray]], path: pathlib.Path) -> None:
    """Draws named matrices, a row of the picture each mapping, blue below 0 and red
    above; each has its own scale, which its title says."""
    wide = max(map(len, rows))
    figure, every = plt.subplots(len(rows), wide, figsize=(2.4 * wide, 2.6 * len(rows)),
                                 layout="constrained", squeeze=False)
    for line, named in zip(every, rows):
        for axes in line[len(named):]:
            axes.set_visible(False)
        for axes, (name, matrix) in zip(line, named.items()):
            most = float(np.abs(matrix).max()) or 1.0
            axes.imshow(np.atleast_2d(matrix), cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set(title=f"{name}, to {most:.2g}", xticks=[], yticks=[])
            axes.title.set_fontsize(8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
