"""Does turning attention sinks down in chosen heads help, without training?

ACT (Yu et al., 2024, arXiv:2406.15765) finds tokens in the middle of a text that
receive much attention, and gives part of it to others, in those heads in which that
helped on held-out texts. A small network is trained to say which of three moods most
clauses of a text have; clauses end with a delimiter. Then each head is calibrated
alone, those that help are kept and calibrated together, and fresh texts judge them,
beside all heads at once and the beginning of the text turned down too.

    python -m experiments.calibrate

No gain was found so far, with one seed. After 150 steps (`--steps=150 --fresh=1000`)
the network judges 93.9% of the texts right; of 16 heads two helped on held-out texts
and three harmed. On fresh texts the two together change -0.9 points (-2.1 to 0.3), with
the beginning turned down too 1.2 (-0.1 to 2.5), and all heads cost 19.8 (17.1 to 22.7).
After the default 1,000 steps all texts are judged right, no head can help, and all
together cost 16.5 points. Of the sinks, one a head and text, 4% to 14% are delimiters.
Of the paper, that all heads are too many shows; that chosen ones gain does not, nor
that the beginning is of use. Three seeds are still to be run.
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

from attn.act import ACT, calibrated
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.data.dataset import Batch, Dataset
from experiments.measure import seeds
from experiments.measure.provenance import provenance
from experiments.training.loop import fit
from experiments.training.mesh import whole
from experiments.training.plan import plan_of
from experiments.training.runs import open_folder, write_whole
from models.lm import LM
from models.view import look

BEGIN, STOP, JUDGE = 0, 1, 2
MOODS, WORDS, LABELS = np.arange(3, 15), np.arange(15, 47), np.arange(47, 50)
VOCAB = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clauses(Dataset):
    """BEGIN, then clauses of three words of which one may have a mood (4 words for each
    of 3), each with STOP behind; JUDGE, whose target is the mood of most."""

    length: int = 34

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        count = (self.length - 2) // 4
        mood = rng.integers(0, 3, (size, count))
        says = rng.random((size, count)) < 0.7
        tokens = np.full((size, count, 4), STOP, np.int32)
        tokens[..., :3] = rng.choice(WORDS, (size, count, 3))
        place = rng.integers(0, 3, (size, count, 1))
        word = MOODS[mood * 4 + rng.integers(0, 4, (size, count))]
        own = np.take_along_axis(tokens, place, 2)
        np.put_along_axis(tokens, place, np.where(says[..., None], word[..., None],
                                                  own), 2)
        votes = np.stack([(says & (mood == n)).sum(1) for n in range(3)], 1)
        ends = [np.full((size, 1), n, np.int32) for n in (BEGIN, JUDGE)]
        text = np.concatenate([ends[0], tokens.reshape(size, -1), ends[1]], 1)
        targets = np.full_like(text, -1)
        targets[:, -1] = LABELS[votes.argmax(1)]  # of equals the first
        return {"tokens": text, "targets": targets}


@dataclasses.dataclass(frozen=True)
class Config:
    """The network, and how heads are chosen."""

    layers: int = option(4, "layers L")
    heads: int = option(4, "heads H")
    width: int = option(64, "model width E")
    steps: int = option(1000, "training steps")
    batch: int = option(64, "sequences a step")
    rate: float = option(3e-3, "peak learning rate")
    beta: float = option(0.4, "the share of a sink's attention that stays")
    factor: float = option(5.0, "a sink receives more than factor / N")
    held_out: int = option(300, "texts that heads are chosen with")
    fresh: int = option(2000, "texts of the test")
    draws: int = option(2000, "of the bootstrap")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(3, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE
    )

    def __post_init__(self):
        seeds.check(self)
        if not self.factor > 0:
            raise ValueError(f"factor={self.factor}: expected more than 0")
        self.act()  # refuses what beta cannot be

    def network(self) -> LM:
        """What is trained."""
        return LM(vocab=VOCAB, width=self.width, heads=self.heads,
                  attention=(Softmax(),) * self.layers)

    def act(self) -> ACT:
        """What stands in the place of its attentions in the test."""
        return ACT(beta=self.beta, factor=self.factor)


TINY = Config(layers=2, heads=2, width=16, steps=2, batch=4, held_out=8, fresh=8,
              draws=10, seeds=1, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """Numbers by name, medians over seeds with the least and the greatest."""
    return seeds.repeated(config_, once, "calibrate")


def once(config_: Config) -> dict[str, Any]:
    """The same with one seed."""
    command = config.command(config_)
    folder = open_folder("calibrate", config_.folder, command,
                         config.settings(config_))
    fitted = fit(config_.network(), Clauses(seed=config_.seed), plan_of(config_),
                 label="calibrate", quiet=config_.quiet)
    params = whole(fitted.params)
    act = config_.act()
    model = config_.network().clone(attention=(act,) * config_.layers)
    data = Clauses(seed=config_.seed, split="valid")
    held_out, fresh = (data.batch(n, size) for n, size in enumerate(
        (config_.held_out, config_.fresh)))
    none = np.zeros((config_.layers, config_.heads))
    before = right(model, params, held_out, none)
    change = np.zeros_like(none)
    for at in np.ndindex(*none.shape):
        one = none.copy()
        one[at] = 1
        change[at] = right(model, params, held_out, one).mean() - before.mean()
    kept = (change > 0).astype(float)  # ties are left out (proposed)
    too = model.clone(attention=(
        dataclasses.replace(act, first="none"),) * config_.layers)
    plain = right(model, params, fresh, none)
    found = {"accuracy": float(plain.mean()), "heads kept": int(kept.sum()),
             "heads that help": float((change > 0).mean()),
             "heads that harm": float((change < 0).mean())}
    for name, network, heads in (
        ("kept heads", model, kept), ("all heads", model, none + 1),
        ("kept heads and the beginning", too, kept),
    ):
        with_them = right(network, params, fresh, heads)
        found |= interval(config_, name, with_them - plain)
    found |= sinks(act, config_, params, fresh["tokens"])
    text = provenance(command, [config_.seed]) | found | {"change": change.tolist()}
    write_whole(folder / "calibrate.json", json.dumps(text, indent=1) + "\n")
    return found | {"folder": str(folder)}


def right(model: LM, params: Any, batch: Batch, heads: np.ndarray) -> np.ndarray:
    """Which texts [B] are judged right with these heads [L,H] calibrated."""
    said = _said(model, params, batch["tokens"], heads)
    return (np.asarray(said) == batch["targets"][:, -1]).astype(float)


@functools.partial(jax.jit, static_argnames="model")
def _said(model, params, tokens, heads):
    states = calibrated(model.init_state(tokens.shape[1], tokens), heads)
    last = jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
    return model.apply(params, tokens, states, at=last)[1].argmax(-1)


def interval(config_: Config, name: str, change: np.ndarray) -> dict[str, float]:
    """The mean change of accuracy, with the middle 95% of a bootstrap over texts."""
    rng = np.random.default_rng((config_.seed, 3))
    drawn = rng.integers(0, len(change), (config_.draws, len(change)))
    low, high = np.quantile(change[drawn].mean(1), (0.025, 0.975))
    return {f"change, {name}": float(change.mean()),
            f"change, {name}, low": float(low),
            f"change, {name}, high": float(high)}


def sinks(act: ACT, config_: Config, params: Any, tokens) -> dict[str, float]:
    """Of all sinks that were found: the share that are delimiters, and how many a head
    and text has."""
    model = config_.network()
    names = [f"{n}/{name}" for n in range(config_.layers) for name in "qk"]

    @jax.jit
    def call(params):
        _, seen = look(model, params, tokens, read=names)
        found = [act.found(seen[f"{n}/q"], seen[f"{n}/k"])[1]
                 for n in range(config_.layers)]
        return jnp.stack(found)  # [L,B,H,S]

    found = np.asarray(call(params))
    stops = found & (tokens == STOP)[None, :, None]
    return {"sinks a head and text": float(found.sum(-1).mean()),
            "sinks that are delimiters": float(stops.sum() / max(found.sum(), 1))}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
