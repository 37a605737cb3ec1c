"""Flowformer against plain linear attention: digits as long sequences of pixels.

A digit of 8 x 8 pixels, each drawn as 4 x 4, is a sequence of 1,024 tokens, and the
network has to say which digit it is (after the Image task of the Long Range Arena; Tay
et al., 2020, arXiv:2011.04006). Conservation of flow makes sources compete and sinks
share (Flowformer; Wu et al., 2022, arXiv:2202.06258): Flow should do better than the
same linear attention without the two, and come near softmax. How unequally the sources
of the trained network share is the ratio of the largest to the smallest c of a head.

    python -m experiments.competition

takes about 12 minutes on 2 cores that have other work. Of 360 held-out digits it names
84.7% with Flow, 86.1% without competition, 86.7% without allocation as well, and 88.9%
with softmax, at 31,000, 37,000, 70,000 and 9,600 pixels a second of training. So what
shows is the cost, a third of softmax's; what does not show, after 200 steps and with
one seed, is that competition helps: 2 points, 7 digits, less. The sources of a head
share by 1.6 to 1. Nothing else was tried.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import flax.linen as nn
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.flow import Flow
from attn.masks import Full
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data.images import Digits
from experiments.measure import seeds
from experiments.training.loop import TrainConfig, fit
from experiments.training.objectives import LABELS, accuracy
from models.pixels import PixelNet
from models.stack import check_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """The attentions and the task."""

    attentions: tuple = option(
        (Flow(causal=False), Flow(causal=False, compete=False),
         Flow(causal=False, compete=False, allocate=False), Softmax(mask=Full())),
        "what is compared, each in all layers",
    )
    zoom: int = option(4, "pixels a side for each of the digit's 8")
    width: int = option(32, "model width E")
    heads: int = option(4, "heads H")
    layers: int = option(2, "layers")
    steps: int = option(200, "training steps", most=STEPS)
    batch: int = option(16, "pictures a step")
    rate: float = option(5e-3, "peak learning rate", above=0)
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained of each, with seeds one after the other")
    quiet: bool = option(False, "no progress bar and no table", FREE)

    def __post_init__(self):
        seeds.check(self)
        check_layers("attentions", self.attentions)

    def data(self, split: str = "train") -> Digits:
        """The pictures."""
        return Digits(zoom=self.zoom, split=split, seed=self.seed)

    def model(self, attention: Any) -> PixelNet:
        """The network; a learned vector says where a pixel is."""
        return PixelNet(
            width=self.width, heads=self.heads, attention=(attention,) * self.layers,
            table=True,
        )

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate,
            seed=self.seed,
            warmup=self.steps // 10,
        )


TINY = Config(attentions=(Flow(causal=False),), zoom=1, width=8, heads=2, layers=1,
              steps=2, batch=4, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    return seeds.repeated(config_, once, "competition", ("accuracy",))


def once(config_: Config) -> dict[str, Any]:
    """Trains and measures -> of each attention the accuracy and training pixels a
    second."""
    found: dict[str, Any] = {}
    for attention in config_.attentions:
        name, model = config.format_value(attention), config_.model(attention)
        fitted = fit(
            model, config_.data(), config_.plan(), objective=LABELS, label=name,
            quiet=config_.quiet,
        )
        held_out = config_.data("valid").whole()
        found[f"{name} accuracy"] = accuracy(model, fitted.params, held_out)
        found[f"{name} pixels_per_second"] = fitted.tokens_per_second
        if isinstance(attention, Flow) and attention.compete:
            found[f"{name} largest_over_smallest"] = inequality(
                config_, model, fitted.params)
    if not config_.quiet:
        _show(config_, found)
    return found


def inequality(config_: Config, model: nn.Module, params: Any) -> float:
    """The largest over the smallest c of a head, the median over pictures, heads and
    layers."""
    images = config_.data("valid").batch(0, 4)["x"]
    projections = lambda module, _: module.name in ("q", "k")
    _, found = model.apply(
        params, images, capture_intermediates=projections, mutable=["intermediates"]
    )
    ratios = []
    for layer in found["intermediates"]["layers"].values():
        q, k = (layer["mixer"][n]["__call__"][0] for n in "qk")
        share = Flow(causal=False).shares(q, k)
        ratios.append(np.asarray(share.max(1) / share.min(1)).ravel())
    return float(np.median(np.concatenate(ratios)))


def _show(config_: Config, found: dict[str, Any]) -> None:
    table = Table(title=f"{(8 * config_.zoom) ** 2:,} pixels", box=box.SIMPLE)
    for title in ("attention", "accuracy", "pixels/s", "max c / min c"):
        table.add_column(title, justify="left" if title == "attention" else "right")
    for attention in config_.attentions:
        name = config.format_value(attention)
        ratio = found.get(f"{name} largest_over_smallest")
        table.add_row(name, f"{found[f'{name} accuracy']:.1%}",
                      f"{found[f'{name} pixels_per_second']:,.0f}",
                      "" if ratio is None else f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
