"""Distil: a matrix of attention that is learned from a teacher, and read where it is
large.

SEA (Lee et al., 2023, arXiv:2310.01777) estimates a row of the matrix by convolutions
over what a Performer says, learns that from a teacher's matrix, and reads the keys that
it finds largest. Claims, scaled down: in the place of exact attention in a trained
network of two layers, and distilled as the others are, it comes nearer to the teacher's
loss than a Performer alone or a window of as many keys; the estimate comes to correlate
with the teacher's weights; a head reads the number of keys that was asked for; memory
grows with T, not with its square. All students begin with the teacher's parameters and
learn its logits and the outputs of its heads; SEA alone its matrix, too.

    python -m experiments.distil

With students trained for longer than by default,

    python -m experiments.distil --distil_steps=300 --distil_batch=16

took 16 minutes of computing. Bits per byte of held-out text, medians of three seeds,
least to greatest behind them:

    exact, the teacher    2.630 (2.562 to 2.811)     before it learns
    SEA                   2.647 (2.590 to 2.809)     5.290 (4.905 to 5.821)
    window of 8           2.671 (2.571 to 2.816)     2.718 (2.655 to 2.845)
    Performer             3.065 (3.050 to 3.245)     5.304 (5.158 to 5.457)

Correlation goes from 0.16 to 0.61 (0.60 to 0.63), a head reads 7.7 keys of the 8 asked
for, memory grows as T^1.00 where the matrix grows as T^2.00: these show, and so does
that the Performer is far behind. That SEA is nearer to the teacher than a window of as
many keys does not: with one seed of three the window is before it, by 19 thousandths or
more, and a teacher of E = 32, trained for 600 steps, looks hardly further back than it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attn.local import Local
from attn.performer import Performer
from attn.sea import SEA
from attn.softmax import Softmax
from attn.sparse import estimated
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus, Text
from experiments.measure import cost, seeds
from experiments.training.imitation import (
    begun, imitated, inside, of_layer, of_teacher, own,
)
from experiments.training.loop import measure
from experiments.training.plan import TrainConfig
from experiments.training.scanned import next_token, train
from models.lm import LM


@dataclasses.dataclass(frozen=True)
class Config:
    """The teacher, and what stands in the place of its attention."""

    text: Corpus = option(Text(length=128), "the text")
    columns: int = option(32, "columns K of the estimate")
    keep: int = option(8, "keys that a head reads, and tokens of the window")
    width: int = option(32, "model width E")
    heads: int = option(4, "heads H")
    layers: int = option(2, "layers")
    rows: int = option(4096, "rows that are trained on")
    steps: int = option(600, "training steps of the teacher", most=STEPS)
    distil_steps: int = option(200, "training steps of each student", most=STEPS)
    batch: int = option(16, "rows a step of the teacher")
    distil_batch: int = option(8, "rows a step of a student")
    rate: float = option(1e-2, "peak learning rate of the teacher", above=0)
    distil_rate: float = option(3e-3, "peak learning rate of students", above=0)
    lengths: tuple[int, int, int] = option(
        (512, 1024, 2048), "T, 2T and 4T at which memory is read off the programs")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(3, "teachers and students, with seeds one after the other")
    quiet: bool = option(False, "no progress bar and no table", FREE)

    def __post_init__(self):
        seeds.check(self)

    def students(self) -> dict[str, Any]:
        """What takes the place of exact attention, by name."""
        d = self.width // self.heads
        return {
            "SEA": SEA(columns=self.columns, keep=self.keep, length=self.text.length),
            "Performer": Performer(features=int(d * math.log(d))),
            "window": Local(window=self.keep),
        }

    def model(self, attention: Any) -> LM:
        """The network."""
        return LM(vocab=self.text.vocab, width=self.width, heads=self.heads,
                  attention=(attention,) * self.layers)

    def plan(self, steps: int, batch: int, rate: float) -> TrainConfig:
        """A training."""
        return TrainConfig(steps=steps, batch=batch, learning_rate=rate,
                           warmup=steps // 10, seed=self.seed)


TINY = Config(text=Text(length=32), columns=8, keep=4, width=16, heads=2, layers=1,
              rows=4, steps=2, distil_steps=1, batch=2, distil_batch=2,
              lengths=(8, 16, 32), seeds=1, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest; memory N: bytes of a head's program at each length, and its slope."""
    found = seeds.repeated(config_, once, None, ("bits", "correlation"))
    found |= memory(config_)
    if not config_.quiet:
        Console().print(table(config_, found))
    return found


def once(config_: Config) -> dict[str, float]:
    """bits NAME: bits per byte of held-out text, of the teacher and of students, and of
    them before they learn; of SEA also correlation, before and after, and keys."""
    text = dataclasses.replace(config_.text, seed=config_.seed)
    rows = text.batch(0, config_.rows)
    held = dataclasses.replace(text, split="valid").batch(0, 64)
    exact = config_.model(Softmax())

    def bits(model: LM, params: Any) -> float:
        nats, _, count = measure(model, params, held)
        return float(nats / count) / math.log(2) / text.bytes_per_token

    teacher = train(exact, next_token, ("tokens",), rows,
                    config_.plan(
                        config_.steps, config_.batch, config_.rate)).params
    found = {"bits teacher": bits(exact, teacher)}
    plan = config_.plan(
        config_.distil_steps, config_.distil_batch, config_.distil_rate)
    for name, attention in track(config_.students().items(), f"seed {config_.seed}",
                                 disable=config_.quiet):
        model = config_.model(attention)
        start = begun(model, teacher, rows["tokens"][:1], config_.seed)
        after = train(
            model, imitated, ("tokens",), rows, plan, start=start).params
        for when, all_of_it in ((" before", start), ("", after)):
            params = own(all_of_it)
            found[f"bits {name}{when}"] = bits(model, params)
            if name == "SEA":
                found |= {f"{key}{when}": float(a) for key, a in estimate(
                    model, params, teacher, held["tokens"][:16]).items()}
    return found


@functools.partial(jax.jit, static_argnums=0)
def estimate(model: LM, variables: Any, teacher: Any, tokens: Any) -> dict[str, Any]:
    """correlation: of the estimated and the teacher's weights over all pairs of a token
    and an earlier one, the mean over layers; keys: read by a row of a head."""
    _, theirs = of_teacher(model, teacher["params"], tokens)
    _, mine = inside(model, variables, tokens)
    seen = np.tril(np.ones((tokens.shape[1],) * 2, bool))
    found = []
    for n, ((scores, _), (q, k, v, _)) in enumerate(zip(theirs, mine)):
        guess, chosen = of_layer(model, variables, n, stretched, q, k, v)
        a, b = (jax.nn.softmax(jnp.where(seen[None, None], s, -jnp.inf))[..., seen]
                for s in (scores, guess))
        keys = (chosen & seen[None, None]).sum(-1).mean()
        found.append((jnp.corrcoef(a.ravel(), b.ravel())[0, 1], keys))
    correlation, keys = (jnp.stack(a).mean() for a in zip(*found))
    return {"correlation": correlation, "keys": keys}


def stretched(module: SEA, q, k, v) -> tuple:
    """The estimated scores and the choice of columns as those of keys [B,H,T,T]."""
    valid = jnp.ones(q.shape[:2], bool)
    found, _ = module._estimate(q, k, v, valid, None)
    rank = jnp.arange(q.shape[1])[None]
    return tuple(estimated.stretched(a, found.length, rank)
                 for a in (found.scores, module.selected(found)))


def memory(config_: Config) -> dict[str, float]:
    """Bytes of a forward pass of SEA and of the whole matrix at each length, and the
    exponents of T."""
    found: dict[str, float] = {}
    shape = config_.heads, config_.width // config_.heads
    sea = config_.students()["SEA"]
    for name, attention in (("SEA", sea), ("matrix", Softmax(implementation="dense"))):
        each: list[float] = []
        for t in config_.lengths:
            call: Any = attention
            given: tuple = (jax.ShapeDtypeStruct((1, t, *shape), jnp.float32),) * 3
            if name == "SEA":
                sea = sea.clone(length=t)
                given = (jax.eval_shape(sea.init, jax.random.key(0), *given), *given)
                call = sea.apply
            each.append(cost.memory(call, *given))
            found[f"memory {name} {t}"] = each[-1]
        found[f"memory {name} slope"] = cost.slope(each)
    return found


def table(config_: Config, found: dict[str, Any]) -> Table:
    """Bits per byte for the terminal, and below what the estimate does."""
    shown = Table(box=box.SIMPLE_HEAD)
    for title in ("attention", "bits per byte", "before it learns"):
        shown.add_column(title, justify="left" if title == "attention" else "right")
    shown.add_row("exact, the teacher", seeds.spread(found, "bits teacher", "{:.3f}"))
    for name in config_.students():
        shown.add_row(name, *(seeds.spread(found, f"bits {name}{when}", "{:.3f}")
                              for when in ("", " before")))
    for name, text in (("correlation", "{:.2f}"), ("keys", "{:.1f}")):
        shown.add_row(f"SEA, {name}", *(seeds.spread(found, f"{name}{when}", text)
                                        for when in ("", " before")))
    for name in ("SEA", "matrix"):
        shown.add_row(f"memory {name} ~ T^", f"{found[f'memory {name} slope']:.2f}")
    return shown


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
