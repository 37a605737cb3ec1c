"""Charts: quality against what is read or kept, and where a fact is found again."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.transforms import Bbox

from experiments.measure.report import LINES, plt, style

TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
Rows = list[dict[str, Any]]


def shares_picture(rows: Rows, tasks: dict[str, str], path: pathlib.Path) -> None:
    """Quality against the share of the pairs that is read, a line a method and a panel
    a task ({name in the rows: title}); the method "exact" is a level."""
    _lines(rows, tasks, path, "method", lambda row, task: row[f"{task}_read"],
           "share of the causal pairs read")


def memory_picture(rows: Rows, tasks: dict[str, str], path: pathlib.Path) -> None:
    """Quality against the memory that is kept, a line a policy, as `shares_picture`."""
    _lines(rows, tasks, path, "policy", lambda row, task: row["memory"],
           "memory, of exact attention's")


def _lines(rows: Rows, tasks: dict[str, str], path: pathlib.Path, name: str,
           at: Callable[[dict[str, Any], str], float], xlabel: str) -> None:
    """A panel a task, in it a line for each value of `name`; at: the place on the axis
    below. Where seeds are known, a line from the least to the greatest."""
    figure, panels = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4.8),
                                  layout="constrained", squeeze=False)
    names = [m for m in dict.fromkeys(row[name] for row in rows) if m != "exact"]
    for axes, (task, title) in zip(panels[0], tasks.items()):
        for n, one in enumerate(names):
            mine = sorted(((at(r, task), r) for r in rows if r[name] == one),
                          key=lambda pair: pair[0])
            axes.plot([x for x, _ in mine], [row[task] for _, row in mine], label=one,
                      lw=1, ls=LINES[n % len(LINES)], zorder=3, **style(n))
            for x, row in mine:
                if values := row.get(f"{task}_seeds"):
                    axes.vlines(x, min(values), max(values), color=f"C{n % 10}", lw=1)
        for row in (r for r in rows if r[name] == "exact"):
            axes.axhline(row[task], color="gray", lw=1, label="exact attention")
        axes.set(xscale="log", title=title, xlabel=xlabel)
        axes.set_xticks(TICKS, [f"{tick:.0%}" for tick in TICKS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, frameon=False, loc="outside lower center",
                  ncols=5)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def needle_picture(cells: Rows, path: pathlib.Path) -> None:
    """Where a fact is found again: a cell a length and depth, with the share."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    share = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        at = depths.index(cell["depth"]), lengths.index(cell["length"])
        share[at] = cell["found"]
    figure, axes = plt.subplots(layout="constrained",
                                figsize=(2.5 + len(lengths), 1.5 + 0.6 * len(depths)))
    shown = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        axes.text(column, row, f"{value:.0%}", ha="center", va="center",
                  color="black" if value > 0.6 else "white")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens of the text", ylabel="depth of the fact",
             title="Facts found again")
    figure.colorbar(shown, label="share of answers that are right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def leaderboard_picture(rows: Rows, asked: int, path: pathlib.Path) -> None:
    """Recall against the bytes of the memory of a long text, each attention by its
    name, as many as were run of those that were asked for; filled: with a network of
    its own, hollow: with exact attention's."""
    leaderboard_figure(rows, asked).savefig(path, dpi=150)
    plt.close()


def leaderboard_figure(rows: Rows, asked: int) -> Any:
    """The same as a figure; a line from the least to the greatest of several seeds."""
    figure, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
    rows = sorted(rows, key=lambda row: row["bytes_long"])
    points = [(row["bytes_long"], row["recall"]) for row in rows]
    colors = [f"C{n % 10}" for n in range(len(rows))]
    for row, (x, y), color in zip(rows, points, colors):
        axes.plot(x, y, "o", color=color, ms=6, zorder=3,
                  mfc=color if row["trained"] else "white")
        values = row.get("recall_seeds", [y])
        axes.vlines(x, min(values), max(values), color=color, lw=1, alpha=0.5)
    for fill, text in (("gray", "network of its own"),
                       ("white", "network of exact attention")):
        axes.plot([], [], "o", color="gray", mfc=fill, ms=6, label=text)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    axes.set(xscale="log", ylim=(-0.04, 1.06), ylabel="recall (share of right answers)",
             xlabel="memory of a sequence of a long text (bytes)",
             title="What is remembered, at what cost: of those that stream "
             f"{len(rows)} of {asked}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _named(figure, axes, points, [r["attention"].partition("(")[0] for r in rows],
           colors)
    return figure


ANGLES = np.deg2rad((45, -45, 135, -135, 0, 180, 90, -90, 22, -22, 158, -158))
DISTANCES = 8, 14, 22, 32, 44, 58  # in points of 1/72 inch


def _named(figure: Any, axes: Any, points: list[tuple[float, float]],
           names: list[str], colors: list[str]) -> None:
    """Names beside points, each at the nearest place where it covers neither a point
    nor a name; from farther away a line leads to its point."""
    figure.canvas.draw()
    figure.set_layout_engine("none")  # places are known, and stay
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5)
             for x, y in axes.transData.transform(points)]
    for point, name, color in zip(points, names, colors):
        for distance, angle in itertools.product(DISTANCES, ANGLES):
            place = distance * np.cos(angle), distance * np.sin(angle)
            side = "left" if place[0] > 1 else "right" if place[0] < -1 else "center"
            told = {"fontsize": 7, "color": color, "xytext": place, "ha": side,
                    "va": "center", "textcoords": "offset points"}
            text = axes.annotate(name, point, **told)
            box = text.get_window_extent()
            text.remove()
            inside = axes.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        if distance > DISTANCES[1]:
            told["arrowprops"] = {"arrowstyle": "-", "lw": 0.5, "color": color}
        axes.annotate(name, point, **told)
        taken.append(box)
