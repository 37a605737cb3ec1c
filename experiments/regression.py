"""Regression in context: what heads of softmax attention learn, against closed forms.

One layer is trained on prompts of examples (x, y) of a linear map that is drawn anew in
each (In-Context Linear Regression Demystified). Claims: every head comes down to two
numbers, KQ = diag(w I, 0) and OV = (0, mu); two heads or more make pairs of opposite
signs that together do one step of gradient descent with centred x (debiased), and do
better than one head can; the longer the prompt, the better, while linear attention,
whose step is fixed, gets worse beyond the length that it was trained at.

    python -m experiments.regression

takes 5 minutes on 2 busy cores. Excess risk (error less noise; d = 5, trained at L =
40, noise 0.1), medians of three seeds; the numbers of the authors' class in brackets:

    L               20             40             80             160
    1 head          0.469 [0.469]  0.303 [0.299]  0.201 [0.199]  0.138 [0.138]
    2 heads         0.263 [0.263]  0.144 [0.142]  0.080 [0.080]  0.047 [0.047]
    4 heads         0.263          0.144          0.080          0.047
    linear          0.380          0.141          0.766          6.475
    Bayes           0.034          0.014 [0.015]  0.007          0.003
    descent         0.255          0.141 [0.142]  0.080          0.049
    debiased        0.263          0.144 [0.145]  0.080          0.047

(descent and debiased with the best step at L = 40, 0.860 and 0.879.) So a pair does
what one debiased step does and as well at every length, twice as well as one head, and
ten times worse than Bayes: the paper's optimum is one of scaling. At L = 40 seeds
differ by at most 0.013. Reduced to w and -w with the best mu, pairs have 0.144 for w =
0.05 and 0.1, 0.145 for 0.2 and 0.165 for 0.5; one head at best 0.303, at 0.5.

Heads: one has w = 0.518 (0.518 to 0.520; [0.519]) and |mu| 1.49 [1.50]; two have |w|
0.159 (0.159 to 0.163; [0.159]) that differ by 0.5% at most, |mu| 2.76 each [2.77], a
sum of mu of at most 0.1% of their sizes, and signs that agree; entries of KQ beside the
diagonal are below 3% of w. Of four heads 2, 3 or 4 were live; mu adds up to 0.1% at
most, but in one seed of three |w| differs by 23% (0.1% in the others), and entries
beside w go up to 41% of it. So "all live heads share one |w|" holds for two heads, and
for four in two seeds of three; more steps were not tried.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data.regression import Prompts, Regression
from experiments.measure import panels, regression, seeds
from experiments.measure.provenance import provenance
from experiments.training.regression_heads import (
    Heads, linear_answer, random_heads, softmax_answer)
from experiments.training.runs import open_folder, write_whole

PAIRS, SINGLES = (0.05, 0.1, 0.2, 0.5), (0.1, 0.3, 0.5)  # w of the reduced models
LINEAR = "linear"


@dataclasses.dataclass(frozen=True)
class Config:
    """The prompts, and the layers that are trained on them."""

    dim: int = option(5, "variables d")
    length: int = option(40, "examples L of a prompt that is trained on")
    noise: float = option(0.1, "variance of the noise of y")
    heads: tuple[int, ...] = option((1, 2, 4), "of the softmax layers")
    lengths: tuple[int, ...] = option((20, 40, 80, 160), "examples of prompts judged")
    steps: int = option(12000, "of Adam", most=STEPS)
    batch: int = option(256, "prompts a step, the same for all layers")
    rate: float = option(3e-3, "learning rate, by a cosine to a fifteenth", above=0)
    prompts: int = option(40000, "prompts a layer is judged on", least=4000)
    seed: int = option(0, "of prompts and weights; the first of several")
    seeds: int = option(3, "trainings, with seeds one after the other")
    quiet: bool = option(False, "no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        seeds.check(self)
        for name in ("heads", "lengths"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name}={values}: expected one or more of 1 or more")
        self.data(self.length)

    def data(self, length: int) -> Regression:
        """Prompts of so many examples."""
        return Regression(self.dim, length, self.noise)


TINY = Config(dim=2, length=4, heads=(2,), lengths=(4,), steps=3, batch=4,
              prompts=4000, seeds=2, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """Trains and judges -> excess risks, and the numbers that heads come down to:
    medians over seeds with the least and the greatest; pictures in the folder."""
    command = config.command(config_)
    folder = open_folder(
        "regression", config_.folder, command, config.settings(config_))
    each = seeds.each(config_)
    found = [once(one) for one in each]
    kept = [{name: a for name, a in one.items() if name != "layers"} for one in found]
    result = provenance(command, [one.seed for one in each]) | {"seeds found": kept}
    write_whole(folder / "regression.json", json.dumps(result, indent=1) + "\n")
    pictures(config_, found, folder)
    if not config_.quiet:
        Console().print(table(config_, found))
    return seeds.merged([one["numbers"] for one in found]) | {"folder": str(folder)}


def once(config_: Config) -> dict[str, Any]:
    """One seed: excess risk of each predictor at each length, {name: [lengths]}, the
    layers that were trained, and the numbers."""
    same = dataclasses.replace(config_, seed=0, seeds=1, folder=None)  # one program
    fitted = fit(same, config_.seed)
    layers = {name: (np.asarray(one.kq), np.asarray(one.ov))
              for name, one in fitted.items()}
    key = jax.random.fold_in(jax.random.key(config_.seed), 2)
    judged: dict[str, list[float]] = {}
    steps: dict[str, float] = {}
    for length in (config_.length, *config_.lengths):
        at = judge(same, length, layers, key)
        for name, row in zip(names(config_), np.asarray(at)):
            if name not in steps:  # the first length is the one that is trained at
                free = name not in layers and name not in ("Bayes", "least squares")
                steps[name] = float(regression.best_step(row)) if free else 1.0
                judged[name] = []
                continue
            judged[name].append(float(regression.excess(row, steps[name])))
    numbers = {f"excess of {name} at {length}": value
               for name, values in judged.items()
               for length, value in zip(config_.lengths, values)}
    numbers |= {f"step of {name}": steps[name] for name in (
        "descent", "debiased")}
    for name, layer in layers.items():
        if name != LINEAR:
            numbers |= {f"{what} of {name}": value
                        for what, value in shape(*layer).items()}
    return {"judged": judged, "layers": layers, "numbers": numbers}


def trained(config_: Config) -> dict[str, int]:
    """Layer -> heads."""
    return {f"{many} heads": many for many in config_.heads} | {LINEAR: 1}


def names(config_: Config) -> list[str]:
    """What is judged, in the order of `answers`."""
    return [*trained(config_), "Bayes", "least squares", "descent", "debiased",
            *(f"pair {w}" for w in PAIRS), *(f"single {w}" for w in SINGLES)]


def answers(config_: Config, layers: dict, prompts: Prompts) -> jax.Array:
    """[predictors,B]; those with a free factor, at factor 1."""
    z, q = prompts.examples, prompts.query
    one = jnp.ones(1)
    return jnp.stack([
        *(answer(config_, name)(*layers[name], z, q) for name in trained(config_)),
        regression.ridge(config_.noise * config_.dim, prompts),
        # of fewer examples than variables it has no one answer
        regression.ridge(1e-6, prompts),
        regression.descent(prompts), regression.debiased(prompts),
        *(regression.reduced(jnp.array([w, -w]), jnp.array([1.0, -1.0]), prompts)
          for w in PAIRS),
        *(regression.reduced(w * one, one, prompts) for w in SINGLES),
    ])


@functools.partial(jax.jit, static_argnums=(0, 1))
def judge(config_: Config, length: int, layers: dict, key) -> jax.Array:
    """The moments of all `answers` to prompts of `length` [predictors,3]."""
    return regression.moments(
        functools.partial(answers, config_, layers), config_.data(length), key,
        config_.prompts // 4000)


def answer(config_: Config, name: str) -> Callable:
    """What a layer computes from KQ, OV, examples and query."""
    if name == LINEAR:
        return functools.partial(linear_answer, length=config_.length)
    return softmax_answer


@functools.partial(jax.jit, static_argnums=0)
def fit(config_: Config, seed) -> dict[str, Heads]:
    """Trains all layers on the same prompts, by the squared error of the noisy answer.
    """
    key = jax.random.key(seed)
    start = {
        name: random_heads(jax.random.fold_in(key, 100 + n), many, config_.dim + 1)
        for n, (name, many) in enumerate(trained(config_).items())
    }
    rate = optax.cosine_decay_schedule(config_.rate, config_.steps, 1 / 15)
    adam = optax.adam(rate)
    data = config_.data(config_.length)

    def loss(layers, prompts):
        # a sum: no layer's gradient knows of the others
        return sum(
            ((answer(config_, name)(one.kq, one.ov, prompts.examples, prompts.query)
              - prompts.answer) ** 2).mean() for name, one in layers.items())

    def step(carry, n):
        layers, state = carry
        prompts = data.draw(jax.random.fold_in(key, 1000 + n), config_.batch)
        change, state = adam.update(jax.grad(loss)(layers, prompts), state)
        return (optax.apply_updates(layers, change), state), None

    (last, _), _ = jax.lax.scan(
        step, (start, adam.init(start)), jnp.arange(config_.steps))
    return last


def shape(kq: np.ndarray, ov: np.ndarray) -> dict[str, float]:
    """The two numbers of a layer's heads, and how far it is from having no others.
    A head with less than a tenth of the greatest |mu w| is a dummy."""
    found = regression.pattern(kq, ov)
    w, mu = found["w"], found["mu"]
    live = np.abs(w * mu) > 0.1 * np.abs(w * mu).max()
    size = np.abs(w[live])
    return {
        "live heads": int(live.sum()), "live heads below 0": int((w[live] < 0).sum()),
        "|w|": float(size.mean()), "spread of |w|": float(np.ptp(size) / size.mean()),
        "largest beside w": float(found["off"][live].max() / size.mean()),
        "sum of |mu|": float(np.abs(mu).sum()),
        "|sum of mu|, share": float(abs(mu.sum()) / np.abs(mu).sum()),
        "signs agree": int((np.sign(w[live]) == np.sign(mu[live])).all()),
    }


def pictures(config_: Config, found: list[dict], folder) -> None:
    """KQ and OV of every head of the first seed, and excess risk by length."""
    rows = []
    for name, (kq, ov) in found[0]["layers"].items():
        order = np.argsort(np.diagonal(kq, axis1=1, axis2=2)[:, :-1].mean(1))
        rows.append({f"{name}: KQ {n}": kq[h] for n, h in enumerate(order)}
                    | {f"OV {n}": ov[h] for n, h in enumerate(order)})
    panels.matrices(rows, folder / "heads.png")
    shown = [n for n in names(config_) if not n.startswith(("pair", "single"))]
    lines = {}
    for name in shown:
        values = np.asarray([one["judged"][name] for one in found])
        lines[name] = (config_.lengths, np.median(values, 0), values.min(0),
                       values.max(0))
    panels.curves([panels.Panel("excess risk", lines, {
        "xlabel": "examples in the prompt", "xscale": "log", "yscale": "log"})],
        folder / "regression.png")


def table(config_: Config, found: list[dict]) -> Table:
    """Excess risk by length, medians over seeds."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("excess risk")
    for length in config_.lengths:
        shown.add_column(f"L {length}", justify="right")
    for name in names(config_):
        middle = np.median([one["judged"][name] for one in found], 0)
        shown.add_row(name, *(f"{value:.4f}" for value in middle))
    return shown


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
