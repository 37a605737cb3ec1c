"""Pictures of heads: numbers by layer and head, and circuits as graphs."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from experiments.measure.report import plt


def maps(found: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Each array [L,H] as a picture: layers from below, heads from the left."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(2.6 * len(found), 2.6), layout="constrained",
        squeeze=False)
    for panel, (name, a) in zip(axes[0], found.items()):
        most = float(np.nanmax(np.abs(a), initial=1e-9))
        image = panel.imshow(a, origin="lower", cmap="RdBu_r", vmin=-most, vmax=most)
        panel.set(title=name, xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=panel, shrink=0.7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def graphs(stages: dict[str, dict[str, Any]], top: int, path: pathlib.Path) -> None:
    """Stages "TASK movers" and "TASK inhibition" as graphs: heads where they stand, the
    greatest effects as arrows to the answer and to the movers."""
    tasks = sorted({name.rpartition(" ")[0] for name in stages})
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4 * len(tasks), 4), layout="constrained", squeeze=False)
    for panel, task in zip(axes[0], tasks):
        movers, inner = (stages[f"{task} {name}"]["score"]
                         for name in ("movers", "inhibition"))
        layers, heads = movers.shape
        panel.plot(*np.meshgrid(range(heads), range(layers)), "o", color="0.85")
        answer = (heads - 1) / 2, layers
        told = _best(movers, top)
        for n, h in told:
            _arrow(panel, (h, n), answer, movers[n, h], "C0")
        for n, h in _best(inner, top):
            for later, other in told:
                if later > n:
                    _arrow(panel, (h, n), (other, later), inner[n, h], "C1")
        panel.text(*answer, "answer", ha="center", va="bottom")
        panel.set(title=task, xlabel="head", ylabel="layer", ylim=(-0.5, layers + 0.5),
                  xticks=range(heads), yticks=range(layers))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _best(score: np.ndarray, top: int) -> list[tuple[int, int]]:
    size = np.nan_to_num(np.abs(score), nan=-1.0)
    order = np.argsort(-size.ravel(), kind="stable")[:top]
    where = [divmod(int(n), score.shape[1]) for n in order]
    return [(n, h) for n, h in where if size[n, h] > 0]


def _arrow(panel, start, end, effect: float, colour: str) -> None:
    width = 0.5 + 3 * min(abs(float(effect)), 1.0)
    panel.annotate("", end, start, arrowprops={
        "arrowstyle": "->", "color": colour, "lw": width, "alpha": 0.8})
