"""Pointers: a network that answers with positions of its input, and longer inputs.

Pointer networks (Vinyals et al., 2015, arXiv:1506.03134) learn convex hulls, Delaunay
triangles and short tours from examples alone, and answer for more points than they have
seen, which a network with a dictionary of indices cannot. Here a small one learns from
lists of `least` to `most` points, with hulls of `scipy.spatial` or exact tours as its
targets, and is asked about lists of other lengths. A beam keeps answers valid: of a
tour every point once, of a hull no point twice.

Accuracy is the share of answers with the right polygon, whichever corner it begins at,
of a hull; the same triangles; the mean length of a tour, of an exact or 2-opt one, and
of the points as they come. Area is the mean share of the hull's, of the answers that
are simple polygons; `failed` the share that are not. `covered` is the share of the
right triangles.

    python -m experiments.hull --dictionary=None --seeds=3

trained networks of three seeds, each in 2 minutes on 2 cores beside other jobs. Of 500
hulls of each number of points, trained on 5 to 10, medians, and the least and the
greatest accuracy:

    points           5       10       15       20       25
    accuracy     73.8%    43.2%    23.8%    11.0%     5.8%
         from    72.8     40.6     23.6     10.2      5.0
           to    75.2     46.0     25.2     13.6      6.8
    area         98.4%    98.1%    97.8%    97.2%    96.5%
    failed        0.8%     0.2%     0.2%     0.6%     2.0%

The claim of longer lists shows: 2.5 times the points, and 96% of the area. What is
expected of so small a network, more than 60% at 5 points and 40% at 10, is reached, 99%
of the area is not. It needs parameters that begin wider and faster steps: with the
paper's spread (`--spread=0.08 --hidden=64 --rate=2e-3 --steps=2500`, one seed) it
stayed on its plateau, with 3.6% at 5 points, and so did the dictionary (4.2%), which
has not been trained with the settings here: nothing is said of it.

    python -m experiments.hull --task=tsp --least=5 --most=5 --asked='(5,)' \\
        --dictionary=None --steps=1000 --seeds=3

learns tours: a mean length of 2.148 (2.128 to 2.154 by seed), the best 2.133 (2.110 to
2.139), 2.636 in the order in which the points come. Each seed is 0.7% to 0.8% above the
best; the paper has 2.12 of 2.12. This needs tours that go counter-clockwise. Where the
second index has to be below the last one (`--direction=index`), whatever the places of
the points, one seed stayed for 2,000 steps on the plateau of tours at random: 2.615,
and 2.658 as they come.

    python -m experiments.hull --task=delaunay --least=5 --most=5 --asked='(5,)' \\
        --dictionary=None --steps=2000

does not learn triangles so soon: with one seed 4.4% of the answers are right and 53% of
the triangles are there, where the paper has 80.7% and 93.0%. Other settings, and longer
trainings, were not tried.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import points as data
from experiments.data.points import Points
from experiments.measure import seeds
from experiments.measure.pointing import SCORES
from experiments.measure.provenance import provenance
from experiments.training.loop import Objective, TrainConfig, fit
from experiments.training.mesh import whole
from experiments.training.runs import open_folder, write_whole
from models.pointernet import PointerNet, search

RULES = {"hull": "hull", "tsp": "tour", "delaunay": "free"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The task, and the network."""

    task: str = option("hull", "hull, tsp or delaunay")
    direction: str = option("plane", "of tours: plane (counter-clockwise) or index")
    least: int = option(5, "points of the shortest lists of the training")
    most: int = option(10, "points of the longest")
    asked: tuple[int, ...] = option((5, 10, 15, 20, 25), "points of the lists asked")
    hidden: int = option(128, "width h of both LSTMs")
    spread: float = option(0.2, "parameters begin within it; the paper has 0.08")
    dictionary: int | None = option(
        20, "indices of the baseline, which does not point; None for no baseline")
    steps: int = option(1500, "training steps", most=STEPS)
    batch: int = option(128, "lists a step")
    rate: float = option(5e-3, "peak learning rate", above=0)
    tests: int = option(500, "lists of a length that are asked about")
    beam: int = option(3, "answers that are kept while one is written")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars and no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        seeds.check(self)
        if self.task not in data.TASKS:
            raise ValueError(f"task={self.task!r}: expected one of {data.TASKS}")
        if self.direction not in data.DIRECTIONS:
            raise ValueError(f"direction={self.direction!r}: expected one of "
                             f"{data.DIRECTIONS}")
        if not 3 <= self.least <= self.most:
            raise ValueError(f"least={self.least}, most={self.most}: expected 3 or "
                             "more, and least of at most most")
        if not self.asked or min(self.asked) < 3 or self.beam < 1:
            raise ValueError(f"asked={self.asked}, beam={self.beam}: expected lists of "
                             "3 points or more, and 1 answer or more")
        if self.dictionary is not None and self.dictionary < self.most:
            raise ValueError(f"dictionary={self.dictionary}: expected None, or as many "
                             f"as most={self.most}")

    def lists(self, n: int | None = None) -> Points:
        """The lists of the training, or those of n points that are asked."""
        least, most = (self.least, self.most) if n is None else (n, n)
        return Points(length=most, least=least, task=self.task, seed=self.seed,
                      direction=self.direction,
                      split="train" if n is None else "valid")

    def plan(self) -> TrainConfig:
        """The training; the paper's is 1,000,000 lists by SGD of rate 1."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, seed=self.seed,
            weight_decay=0.0, warmup=self.steps // 20, clip=2.0)


TINY = Config(least=3, most=4, asked=(5,), hidden=4, dictionary=4, steps=2, batch=2,
              tests=3, beam=2, quiet=True)


def next_index(model, params, batch: dict, key) -> tuple[jax.Array, jax.Array]:
    """Cross entropy in nats of the indices, given those before: (sum, count)."""
    logits = model.apply(params, batch["points"], batch["targets"], batch["there"])
    targets = batch["targets"]
    nats = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, nats, 0).sum(), (targets >= 0).sum()


def run(config_: Config) -> dict[str, Any]:
    """Trains and asks -> what is right, by network and number of points: medians over
    seeds, with the least and the greatest."""
    command = config.command(config_)
    folder = open_folder("hull", config_.folder, command, config.settings(config_))
    each = [once(one, folder) for one in seeds.each(config_)]
    found = seeds.merged(each)
    which = [one.seed for one in seeds.each(config_)]
    result = provenance(command, which) | {"rows": each, "found": found}
    write_whole(folder / "hull.json", json.dumps(result, indent=1) + "\n")
    if not config_.quiet:
        Console().print(table(config_, found))
    return found | {"folder": str(folder)}


def once(config_: Config, folder: pathlib.Path) -> dict[str, Any]:
    """The numbers with one seed, named NETWORK_POINTS_WHAT; the first one's answers are
    drawn."""
    found: dict[str, Any] = {}
    networks = {"pointer": PointerNet(config_.hidden, spread=config_.spread)}
    if config_.dictionary:
        networks["dictionary"] = PointerNet(
            config_.hidden, dictionary=config_.dictionary, spread=config_.spread)
    for name, model in networks.items():
        fitted = fit(
            model, config_.lists(), config_.plan(),
            objective=Objective(next_index, "points"), label=name,
            quiet=config_.quiet)
        params = whole(fitted.params)
        for n in config_.asked:
            if name == "dictionary" and n > (config_.dictionary or 0):
                continue  # there is no index for the last points
            lists = config_.lists(n).batch(0, config_.tests)
            steps = data.steps_of(config_.task, n)
            answers = np.asarray(search(
                model, params, lists["points"], lists["there"], steps=steps,
                rule=RULES[config_.task], width=config_.beam))
            scores = SCORES[config_.task](lists, answers)
            found |= {f"{name}_{n}_{what}": a for what, a in scores.items()}
            if name == "pointer" and not (folder / f"answers_{n}.png").exists():
                picture(config_, lists, answers, folder / f"answers_{n}.png")
    return found


def table(config_: Config, found: dict[str, Any]) -> Table:
    """What is right, for the terminal."""
    columns = {"hull": ("accuracy", "area", "failed"), "delaunay": ("accuracy",
               "covered"), "tsp": ("length", "optimal", "random")}[config_.task]
    text = "{:.3f}" if config_.task == "tsp" else "{:.1%}"
    made = Table(title=f"{config_.task}, trained on {config_.least} to {config_.most} "
                 "points", box=box.SIMPLE_HEAD)
    for name in ("network", "points", *columns):
        made.add_column(name, justify="right")
    for name in ("pointer", "dictionary"):
        for n in config_.asked:
            keys = [f"{name}_{n}_{column}" for column in columns]
            if keys[0] in found:
                made.add_row(name, str(n), *(text.format(found[k]) for k in keys))
    return made


def picture(config_: Config, lists: dict, answers: np.ndarray,
            path: pathlib.Path) -> None:
    """A few answers (lines) over the right ones (grey)."""
    from experiments.measure.report import plt

    many = min(4, len(answers))
    figure, panels = plt.subplots(1, many, figsize=(2.4 * many, 2.4), squeeze=False,
                                  layout="constrained")
    for axes, points, targets, answer in zip(
            panels[0], lists["points"], lists["targets"], answers):
        for indices, look in ((targets, {"color": "0.75", "lw": 5}),
                              (answer, {"color": "C0", "lw": 1.5})):
            at = indices[indices > 0] - 1
            if config_.task != "delaunay":
                axes.plot(*points[at].T, **look)
                continue
            for one in at[:len(at) // 3 * 3].reshape(-1, 3):
                axes.plot(*points[np.append(one, one[0])].T, **look)
        axes.plot(*points.T, "o", color="0.2", ms=3)
        axes.set(xticks=(), yticks=(), aspect="equal")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
