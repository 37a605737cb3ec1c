"""ESSAformer against bicubic interpolation: images of few pixels made large.

An image is made four times smaller by means of 4 x 4 pixels; the network and bicubic
interpolation make it large again, and the signal-to-noise ratio says how close they
come (ESSAformer; Zhang et al., 2023, arXiv:2307.14010). Beside it stands the same
network in which every pixel attends to itself alone. So short a training needs bicubic
interpolation to begin with, which the paper's network does not add (`--skip=False`).

    python -m experiments.superres
    python -m experiments.superres --data='Spectra(size=8)'

take 2 to 4 minutes each on 2 cores that had other work. On cubes of 31 bands, made of
four materials, ESSAformer gets 27.57 dB, bicubic 25.68: 1.9 dB more. On a photograph
that comes with scikit-learn, of three bands, learned from its sides and asked about its
middle, it gets 28.71 dB, bicubic 28.69: nothing to speak of. What does not show is the
attention: the network without it gets 27.68 and 28.72 dB, as much.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.essa import Essa
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data.images import Pairs, Photos, Spectra
from experiments.measure import seeds
from experiments.training.loop import Objective, TrainConfig, fit
from models.essaformer import ESSAformer


@dataclasses.dataclass(frozen=True)
class Alone:
    """Attention of every token to itself alone."""

    def __call__(self, q, k, v, *, x=None, segments=None):
        """v."""
        return v


class Over(nn.Module):
    """Bicubic interpolation and what a network adds to it, at first nothing."""

    network: ESSAformer

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x [B,h,w,bands] -> [B,s h,s w,bands]."""
        b, h, w, bands = x.shape
        s = self.network.scale
        smooth = jax.image.resize(x, (b, s * h, s * w, bands), "cubic")
        share = self.param("share", nn.initializers.zeros, (), jnp.float32)
        return smooth + share * self.network(x, train)


@dataclasses.dataclass(frozen=True)
class Config:
    """One network on one dataset of images."""

    data: Pairs = option(Photos(size=8), "the images: Photos() or Spectra()")
    width: int = option(16, "channels inside the network")
    steps: int = option(1000, "training steps", most=STEPS)
    batch: int = option(8, "images a step")
    rate: float = option(3e-3, "peak learning rate", above=0)
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained, with seeds one after the other")
    dropout: float = option(0.0, "share of channels dropped; the authors' code has 0.2")
    skip: bool = option(
        True, "learn what is missing in bicubic; the paper's has no skip"
    )
    alone: bool = option(True, "also train the network without attention")
    quiet: bool = option(False, "no progress bar and no table", FREE)

    def __post_init__(self):
        seeds.check(self)

    def model(self, attention: Any) -> nn.Module:
        """The network."""
        network = ESSAformer(self.data.scale, self.width, attention, self.dropout)
        return Over(network) if self.skip else network

    def plan(self) -> TrainConfig:
        """The training, of the mean absolute error, which is proposed here."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate,
            weight_decay=0.0, warmup=self.steps // 10, seed=self.seed,
        )


TINY = Config(data=Spectra(size=4, scale=2, many=3), width=4, steps=2, batch=2,
              quiet=True)


def absolute(model, params, batch: dict, key) -> tuple[jax.Array, jax.Array]:
    """The absolute error, summed over the pixels' bands, and how many there are."""
    y = model.apply(params, batch["x"], train=True, rngs={"dropout": key})
    return jnp.abs(y - batch["y"]).sum(), jnp.float32(y.size)


def decibels(have: np.ndarray, want: np.ndarray) -> float:
    """The mean over images of the peak signal-to-noise ratio, of values in 0..1."""
    error = ((np.clip(have, 0, 1) - want) ** 2).mean((1, 2, 3))
    return float((-10 * np.log10(np.maximum(error, 1e-10))).mean())


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    return seeds.repeated(config_, once, "superres", ("essaformer", "alone"))


def once(config_: Config) -> dict[str, Any]:
    """Trains and measures -> decibels of essaformer, alone, bicubic and nearest on
    held-out images."""
    data = dataclasses.replace(config_.data, seed=config_.data.seed + config_.seed)
    valid = dataclasses.replace(data, split="valid").batch(0, 16)
    x, y = valid["x"], valid["y"]
    found = {
        name: decibels(np.asarray(jax.image.resize(x, y.shape, kind)), y)
        for name, kind in (("nearest", "nearest"), ("bicubic", "cubic"))
    }
    networks = {"alone": Alone(), "essaformer": Essa()}
    for name, attention in networks.items():
        if name == "alone" and not config_.alone:
            continue
        model = config_.model(attention)
        fitted = fit(
            model, data, config_.plan(), objective=Objective(absolute, "x"),
            label=name, quiet=config_.quiet,
        )
        large = jax.jit(model.apply)(fitted.params, x)
        found[name] = decibels(np.asarray(large), y)
    if not config_.quiet:
        table = Table(title=f"times {config_.data.scale}, held out", box=box.SIMPLE)
        table.add_column("method")
        table.add_column("dB", justify="right")
        for name, value in found.items():
            table.add_row(name, f"{value:.2f}")
        Console().print(table)
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
