"""Decay: TransNormer on text, with it and without, beside a network of softmax.

TransNormer (Qin et al., 2024, arXiv:2405.17381) replaces softmax attention by linear
attention that fades with age, and claims losses like a Transformer's; without the decay
it does clearly worse. Here three small networks read the same bytes of the standard
library: TransNormer, the same without decay (`slopes="none"`), and a Transformer (RoPE,
softmax, SwiGLU) of about as many parameters.

    python -m experiments.decay

takes 1 to 3 minutes on 2 cores (3:07 beside other jobs). 300 steps of 8 rows of 256
bytes, the paper's claim in direction: TransNormer ends at 1.960 nats a byte on held-out
text, 1.4% above softmax (1.933), and 2.186 without decay, 13.1% above. Both have
246,000 parameters (245,856 and 246,240). The other claim, speed, is no matter at 256
tokens: 14,299 tokens a second of training against 17,758. One seed; nothing else was
tried.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import flax.linen as nn
import jax
from rich import box
from rich.console import Console
from rich.table import Table

from attn.lightning import Lightning
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus, Text
from experiments.measure import seeds
from experiments.training.loop import TrainConfig, evaluate, fit
from models.lm import LM
from models.transnormer import TransNormer


@dataclasses.dataclass(frozen=True)
class Config:
    """Three networks of one size on one text."""

    text: Corpus = option(Text(length=256), "the text, and the tokens of a row")
    depth: int = option(2, "layers")
    width: int = option(96, "model width E")
    heads: int = option(4, "heads H")
    slopes: str = option("code", "the decays of TransNormer: code, paper or fla")
    steps: int = option(300, "training steps", most=STEPS)
    batch: int = option(8, "rows a step")
    rate: float = option(3e-3, "peak learning rate", above=0)
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars and no table", FREE)

    def __post_init__(self):
        seeds.check(self)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by name. TransNormer's gate takes E^2 parameters a layer, so its
        SGLU is narrower: 4 + 1 matrices, and 3 of E x hidden."""
        size: dict[str, Any] = {
            "vocab": self.text.vocab, "width": self.width, "heads": self.heads}
        hidden = -(-8 * self.width // 48) * 16
        normer = lambda slopes: TransNormer(
            **size, depth=self.depth, hidden=hidden - self.width // 3,
            attention=Lightning(slopes=slopes),
        )
        return {
            "transnormer": normer(self.slopes), "no_decay": normer("none"),
            "softmax": LM(**size, attention=(Softmax(),) * self.depth, hidden=hidden),
        }

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, seed=self.seed,
            warmup=self.steps // 10,
        )


TINY = Config(text=Text(length=32), width=24, heads=2, steps=2, batch=2, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    return seeds.repeated(config_, once, "decay", ("_loss",))


def once(config_: Config) -> dict[str, Any]:
    """Trains and evaluates -> loss in nats a token on held-out text, parameters and
    training tokens a second of each network, and the losses over that of softmax."""
    text = dataclasses.replace(config_.text, seed=config_.text.seed + config_.seed)
    held_out = dataclasses.replace(text, split="valid")
    found: dict[str, Any] = {}
    for name, model in config_.networks().items():
        fitted = fit(model, text, config_.plan(), label=name,
                     quiet=config_.quiet)
        score = evaluate(model, fitted.params, held_out, 16, config_.batch)
        found |= {
            f"{name}_loss": score["loss"],
            f"{name}_parameters": sum(a.size for a in jax.tree.leaves(fitted.params)),
            f"{name}_tokens_per_second": fitted.tokens_per_second,
        }
    for name in ("transnormer", "no_decay"):
        found[f"{name}_over_softmax"] = found[f"{name}_loss"] / found["softmax_loss"]
    if not config_.quiet:
        Console().print(table(config_, found))
    return found


def table(config_: Config, found: dict[str, Any]) -> Table:
    """The numbers for the terminal."""
    rows = Table(title=f"{config_.steps} steps", box=box.SIMPLE_HEAD)
    rows.add_column("network")
    for title in ("loss (nats)", "over softmax", "parameters", "training tok/s"):
        rows.add_column(title, justify="right")
    for name in config_.networks():
        loss = found[f"{name}_loss"]
        rows.add_row(
            name, f"{loss:.3f}", f"{loss / found['softmax_loss'] - 1:+.1%}",
            f"{found[f'{name}_parameters']:,}",
            f"{found[f'{name}_tokens_per_second']:,.0f}")
    return rows


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
