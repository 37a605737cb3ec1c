"""Scan and snap: attention of one layer picks the tokens that tell, then freezes.

Scan and Snap (Tian et al., 2023, arXiv:2305.16380) follows the training of one layer on
texts whose tokens say what comes next, common ones and distinct ones. Claims: attention
leaves the common tokens for the distinct ones, for the more frequent of them first
(rich get richer); the faster the decoder learns beside attention (the ratio lr_Y /
lr_Z), the earlier this snaps, so that more tokens keep a share; and it freezes before
one token has everything. That the flow is the paper's, and what it says of every token
of the population, is tested exactly; this is what texts do.

    python -m experiments.scansnap

takes a minute on 2 busy cores. Medians of three seeds, entropy of the mixture c_n in
nats and the common tokens' share of it, with those that the authors' code gave to two
other seeds in brackets; P itself has 2.89 and 0.645:

    queries lr_Z  ratio 1      2            5            10
    1       0.5   2.76 [2.74]  2.82 [2.79]  2.87 [2.86]  2.89 [2.88]
    1       1     2.63 [2.57]  2.74 [2.69]  2.84 [2.82]  2.87 [2.85]
    1       2     2.38 [2.24]  2.58 [2.47]  2.74 [2.68]  2.72 [2.74]
    3       2     2.33 [2.31]  2.34 [2.31]  2.54 [2.56]  2.70 [2.71]
    share   2     .20 [.20]    .28 [.28]    .41 [.36]    .42 [.40]     of 1 query
    share   2     .16 [.15]    .18 [.17]    .26 [.26]    .34 [.35]     of 3

More entropy with the ratio, from 1 to 10, at every rate of Z: by 0.12 (0.118 to 0.168)
or more with 1 query, 0.108 (0.105 to 0.114) with 3, but 0.078 (-0.005 to 0.089) with 5
and 0.042 (0.037 to 0.057) with 10, where a decoder of ratio 1 has not learned enough in
100 steps to push attention anywhere: 2 has less entropy than 1. Less entropy with the
rate of Z, at every ratio: by 0.28 to 0.38 (least of all seeds 0.097). Frozen, of two
queries from zero: (c_10 / c_1)^2 - 1 goes from 99 to 1196 (887 to 1225; 1022 of the
authors' code), the last 30 steps change it by 0.25% (at most 0.62%), past its peak it
falls by at most 0.62%, and common tokens keep 0.389 (0.385 to 0.393; 0.379). Distinct
tokens stand in the order of their frequency and above all common ones in every seed;
logits of the rarest, which a text holds less than once, may end just below 0 (-0.02),
so that 85% (80% to 90%) of the distinct ones are above it, and in the population all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data.cooccurrence import Cooccurrence
from experiments.measure import panels, seeds
from experiments.measure.provenance import provenance
from experiments.training import one_layer
from experiments.training.one_layer import Rates, Texts, Weights
from experiments.training.runs import open_folder, write_whole

Numbers = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """The texts, and how fast the two matrices learn from them."""

    queries: tuple[int, ...] = option((1, 3, 5, 10), "query tokens, a sweep of each")
    next_tokens: int = option(2, "next tokens of each query in the sweep")
    common: int = option(10, "tokens that stand beside all next tokens")
    distinct: int = option(10, "tokens of each next token alone")
    length: int = option(128, "tokens of a text, its query included", least=2)
    rates: tuple[float, ...] = option((0.5, 1.0, 2.0, 3.0), "of Z in the sweep")
    ratios: tuple[float, ...] = option((1.0, 2.0, 5.0, 10.0), "of Y's rate to Z's")
    momentum: float = option(0.9, "of both")
    batch: int = option(128, "texts a step")
    steps: int = option(100, "of gradient descent", most=STEPS)
    seed: int = option(0, "of texts and weights; the first of several")
    seeds: int = option(3, "trainings, with seeds one after the other")
    quiet: bool = option(False, "no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        seeds.check(self)
        for name in ("queries", "rates", "ratios"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name}={values}: expected one or more above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: expected 0 or more, below 1")

    def data(self, queries: int, next_tokens: int) -> Cooccurrence:
        """The texts of so many queries."""
        return Cooccurrence(
            queries=queries, next_tokens=next_tokens, common=self.common,
            distinct=self.distinct, tokens=self.length - 1)


TINY = Config(queries=(1, 2), common=2, distinct=2, length=8, rates=(0.5, 1.0),
              ratios=(1.0, 2.0), batch=4, steps=10, seeds=2, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """The sweep and the freezing -> what the claims say, medians over seeds with the
    least and the greatest; the table and the pictures in the folder."""
    command = config.command(config_)
    folder = open_folder("scansnap", config_.folder, command, config.settings(config_))
    each = seeds.each(config_)
    found = [once(one) for one in each]
    result = provenance(command, [one.seed for one in each]) | {"seeds found": found}
    write_whole(folder / "scansnap.json", json.dumps(result, indent=1) + "\n")
    pictures(config_, found, folder)
    if not config_.quiet:
        Console().print(table(config_, found))
    claimed = [claims(config_, one) for one in found]
    return seeds.merged(claimed) | {"folder": str(folder)}


def once(config_: Config) -> Numbers:
    """One seed: {sweep: {queries: [rates][ratios] of (entropy, common share)}, growth:
    (c_10/c_1)^2 - 1 after each step, and what else the freezing shows}."""
    sweep = {}
    rates = [(z, z * ratio) for z in config_.rates for ratio in config_.ratios]
    z, y = jnp.asarray(rates).T
    every = Rates(z, y, jnp.full(len(rates), config_.momentum))
    for many in config_.queries:
        data = config_.data(many, config_.next_tokens)
        start = one_layer.random_weights(jax.random.key(config_.seed), data.vocab)
        spread = jax.jit(swept, static_argnums=(0, 1, 2))(
            data, config_.batch, config_.steps, config_.seed, start, every)
        shape = len(config_.rates), len(config_.ratios), 2
        sweep[str(many)] = np.asarray(spread, np.float64).reshape(shape).tolist()
    return {"sweep": sweep} | frozen(config_)


def texts(data: Cooccurrence, batch: int, seed, n) -> Texts:
    """The batch of step n."""
    counts, of = data.draw(jax.random.fold_in(jax.random.key(seed + 1), n), batch)
    return Texts(counts, jnp.asarray(data.query())[of], jnp.asarray(data.label())[of])


def swept(data: Cooccurrence, batch: int, steps: int, seed, start: Weights,
          rates: Rates) -> jax.Array:
    """Trains with every pair of rates [R] on the same texts -> [R,2]: the entropy of
    c_n in the population, and the common tokens' share of it, means over n."""
    many = jnp.size(rates.z)

    def one(carry, n):
        now = texts(data, batch, seed, n)
        step = lambda w, v, r: one_layer.step(w, v, now, r)
        weights, velocity = carry
        return jax.vmap(step)(weights, velocity, rates), None

    weights = jax.tree.map(lambda a: jnp.broadcast_to(a, (many, *a.shape)), start)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    (last, _), _ = jax.lax.scan(one, (weights, zeros), jnp.arange(steps))
    whole = one_layer.population(data.probabilities(), data.query(), data.label())
    c = jax.vmap(one_layer.mix, (0, None))(last.z, whole)  # [R,K,M]
    share = c[..., : data.common].sum(-1).mean(-1)
    return jnp.stack([one_layer.entropy(c).mean(-1), share], -1)


def frozen(config_: Config) -> Numbers:
    """Two queries of one next token each, from zero, lr_Z = lr_Y = 1: the growth of the
    most frequent distinct token over the rarest, and what is left to common ones, after
    each step, means over n."""
    data = config_.data(2, 1)
    c, z = jax.jit(functools.partial(followed, data, config_.batch, config_.steps,
                                     config_.momentum))(config_.seed)
    own = data.distinct_ids()
    mine = np.take_along_axis(np.asarray(c, np.float64), own[None], 2)  # [steps,K,d]
    logit = np.take_along_axis(np.asarray(z), own, 1)
    common = np.asarray(z)[:, : data.common]
    growth = ((mine[..., -1] / mine[..., 0]) ** 2 - 1).mean(1)
    return {
        "growth": growth.tolist(),
        "common": np.asarray(c)[..., : data.common].sum(-1).mean(1).tolist(),
        "in order": bool((np.diff(mine[-1]) > 0).all()),
        "distinct above common": bool(logit.min() > common.max(initial=-np.inf)),
        "distinct above 0": float((logit > 0).mean()),
    }


def followed(data: Cooccurrence, batch: int, steps: int, momentum: float, seed):
    """c [steps,K,M] in the population after each step, and Z's rows [K,M] at the end.
    """
    whole = one_layer.population(data.probabilities(), data.query(), data.label())
    zeros = one_layer.zero_weights(data.vocab)

    def one(carry, n):
        weights, velocity = carry
        after = one_layer.step(
            weights, velocity, texts(data, batch, seed, n), Rates(1.0, 1.0, momentum))
        return after, one_layer.mix(after[0].z, whole)

    (last, _), c = jax.lax.scan(one, (zeros, zeros), jnp.arange(steps))
    return c, last.z[whole.query]


def claims(config_: Config, found: Numbers) -> Numbers:
    """What the paper says of one seed, as numbers. Gains are the least of all rows or
    columns of the sweep, from its first entry to its last."""
    numbers: Numbers = {}
    for many, values in found["sweep"].items():
        entropy = np.asarray(values)[..., 0]
        by_ratio, by_rate = entropy[:, -1] - entropy[:, 0], entropy[0] - entropy[-1]
        numbers[f"more entropy by ratio, {many} queries"] = float(by_ratio.min())
        numbers[f"less entropy by rate, {many} queries"] = float(by_rate.min())
    growth = np.asarray(found["growth"])
    before = growth[-min(30, len(growth))]
    numbers["growth"] = float(growth[-1])
    numbers["growth after its peak"] = float(growth[-1] / growth.max() - 1)
    numbers["changed at the end"] = float(abs(growth[-1] / before - 1))
    numbers["left to common tokens"] = float(found["common"][-1])
    numbers["in order"] = int(found["in order"])
    numbers["distinct above common"] = int(found["distinct above common"])
    numbers["distinct above 0"] = found["distinct above 0"]
    return numbers


def pictures(config_: Config, found: list[Numbers], folder) -> None:
    """Entropies of the sweep, and the freezing, with the spread of seeds."""
    shown = []
    for many in found[0]["sweep"]:
        entropy = np.asarray([one["sweep"][many] for one in found])[..., 0]
        lines = {f"lr_Z {rate}": (config_.ratios, *spread(entropy[:, n]))
                 for n, rate in enumerate(config_.rates)}
        shown.append(panels.Panel(f"{many} queries", lines, {
            "xlabel": "lr_Y / lr_Z", "ylabel": "entropy of c, nats"}))
    steps = np.arange(1, len(found[0]["growth"]) + 1)
    for name, title in (("growth", "(c_max / c_min)^2 - 1"),
                        ("common", "share of common tokens")):
        lines = {"lr_Z = lr_Y = 1": (
            steps, *spread(np.asarray([one[name] for one in found])))}
        shown.append(panels.Panel(title, lines, {"xlabel": "steps"}))
    panels.curves(shown, folder / "scansnap.png")


def spread(values: np.ndarray) -> tuple:
    """Median, least and greatest over seeds [seeds,...]."""
    return np.median(values, 0), values.min(0), values.max(0)


def table(config_: Config, found: list[Numbers]) -> Table:
    """Entropy and the common tokens' share of the sweep, medians over seeds."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("queries")
    for title in ("lr_Z", *(f"ratio {ratio:g}" for ratio in config_.ratios)):
        shown.add_column(title, justify="right")
    for many in found[0]["sweep"]:
        middle = np.median([one["sweep"][many] for one in found], 0)
        for rate, row in zip(config_.rates, middle):
            cells = [f"{entropy:.2f}, {share:.2f}" for entropy, share in row]
            shown.add_row(many, f"{rate:g}", *cells)
    shown.caption = "entropy of c_n in nats, common tokens' share"
    return shown


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
