"""Does turning attention sinks down in chosen heads help, without training?

ACT (Yu et al., 2024, arXiv:2406.15765) finds tokens in the middle of a text that
receive much attention, and gives part of it to others, in those heads in which that
helped on held-out texts. A small network is trained to say which of three moods most
clauses of a text have; clauses end with a delimiter. Then each head is calibrated
alone, those that help are kept and calibrated together, and fresh texts judge them,
beside all heads at once and the beginning of the text turned down too.

    python -m experiments.calibrate
    python -m experiments.calibrate --model=small --held_out=32 --fresh=96

A model that is given is judged by the bits per byte of text (a change above 0 is so
many fewer) and by its answers to `experiments.steer`'s questions; each chooses heads of
its own, in layers of exact attention that see everything. Texts are read half at once
and half token by token, so that no sink is known from what is judged. Seeds are then
draws of texts. By default a network is trained, as texts that are judged as a whole are
what the paper calibrates.

The model that ships, medians of three draws of texts, least to greatest behind them:

    python -m experiments.calibrate --model=small --facts=8 --length=192 \\
        --batch=16 --held_out=16 --fresh=48

    change             bits per byte saved, of 1.284     answers right, of 65%
    kept heads         -0.008 (-0.016 to -0.003)         0 points (0 to 2)
    and the beginning  -0.007 (-0.017 to -0.003)         0 points (0 to 2)
    all heads          -0.479 (-0.516 to -0.457)         -56 points (-65 to -46)

3 of 32 heads (1 to 5) helped held-out text and the others harmed it; answers were
helped by none (0 to 1) and harmed by 9 (7 to 10). So no gain shows: what is kept on 16
texts costs with every draw on 48 fresh ones (of no draw is 0 within the middle 95% of
the bootstrap), and all heads together harm greatly. Of the 25 sinks a head and text,
49% have no letter or digit, as do 36% of all tokens: punctuation is among them more
often, not mostly.

Of a network that is trained here no gain was found. After 150 steps, three seeds,

    python -m experiments.calibrate --steps=150 --fresh=1000

the network judges 99.8% (93.9 to 99.8) of the texts right. Of 16 heads none (0 to 2)
helped on held-out texts, 4 (3 to 4) harmed. What is kept changes 0 points on fresh
texts (-0.9 to 0), with the beginning turned down too 0 (0 to 1.2), and all heads cost
19.8 (18.5 to 25.4). After the default 1,000 steps (one seed) all texts are judged
right, no head can help, and all together cost 16.5 points. Of the sinks, one a head and
text, 15% (4 to 17) are delimiters. Of the paper, that all heads are too many shows;
that chosen ones gain does not, nor that the beginning is of use.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.act import ACT, calibrated
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus
from experiments.data.clauses import STOP, VOCAB, Clauses
from experiments.data.dataset import Batch
from experiments.measure import calibrating, seeds, told
from experiments.measure.head_choice import everywhere, exact_layers
from experiments.measure.provenance import provenance
from experiments.measure.reading import HELD_OUT, reader_of
from experiments.sources import loaded
from experiments.training.loop import fit
from experiments.training.mesh import whole
from experiments.training.plan import plan_of
from experiments.training.runs import open_folder, write_whole
from models.lm import LM
from models.view import look


@dataclasses.dataclass(frozen=True)
class Config:
    """The network, and how heads are chosen."""

    model: str | None = option(None, "a folder or name, to be asked in its own words")
    facts: int = option(12, "facts in a row, for a model that is given")
    shared: int = option(2, "facts whose keys share their last word")
    length: int = option(256, "tokens of its rows of text")
    text: Corpus = option(HELD_OUT, "text, and hay between the facts: the valid split")
    layers: int = option(4, "layers L")
    heads: int = option(4, "heads H")
    width: int = option(64, "model width E")
    steps: int = option(1000, "training steps", most=STEPS)
    batch: int = option(64, "sequences a step")
    rate: float = option(3e-3, "peak learning rate", above=0)
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
    found, change = (
        of_training(config_, folder) if config_.model is None else of_model(config_))
    kept = {name: a.tolist() for name, a in change.items()}
    text = provenance(command, [config_.seed]) | found | kept
    write_whole(folder / "calibrate.json", json.dumps(text, indent=1) + "\n")
    return found | {"folder": str(folder)}


def of_training(
    config_: Config, folder: pathlib.Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A network that is trained here, its checkpoints in the run's folder: its numbers,
    and what each head changes."""
    fitted = fit(config_.network(), Clauses(seed=config_.seed), plan_of(config_),
                 folder / "network", label="calibrate", quiet=config_.quiet)
    params = whole(fitted.params)
    act = config_.act()
    model = config_.network().clone(attention=(act,) * config_.layers)
    data = Clauses(seed=config_.seed, split="valid")
    held_out, fresh = (data.batch(n, size) for n, size in enumerate(
        (config_.held_out, config_.fresh)))
    too = model.clone(attention=(
        dataclasses.replace(act, first="none"),) * config_.layers)
    shape = config_.layers, config_.heads
    found, change = tried(
        config_, functools.partial(right, model, params),
        functools.partial(right, too, params), (held_out, fresh),
        list(range(config_.layers)), shape)
    found = {"accuracy": found.pop("before")} | found
    return found | sinks(act, config_, params, fresh["tokens"]), {"change": change}


def of_model(config_: Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same of a model that is given: bits per byte of text, and answers."""
    name, source = str(config_.model), loaded(str(config_.model))
    told.check(name, source, config_.facts, config_.shared)
    reader, _ = reader_of(source, ("needles",), config_.text, source.limit,
                          config_.seed)
    act, rng = config_.act(), np.random.default_rng((config_.seed, 1))
    layers = exact_layers(source.model)
    model, too = (everywhere(source.model, one)
                  for one in (act, dataclasses.replace(act, first="none")))
    shape, sizes = (len(model.attention), model.heads), (
        config_.held_out, config_.fresh)
    text = [calibrating.of_text(reader, rng, size, config_.length) for size in sizes]
    asked = [calibrating.of_answers(told.told(
        reader, rng, size, config_.facts, config_.shared, limit=source.limit))
        for size in sizes]
    found: dict[str, Any] = {}
    change: dict[str, np.ndarray] = {}
    for task, rows, gain in (("text", text, calibrating.bits),
                             ("answers", asked, calibrating.right)):
        own, wider = (functools.partial(gain, one, source.params, config_.batch)
                      for one in (model, too))
        more, change[task] = tried(config_, own, wider, rows, layers, shape)
        found |= {f"{task}: {name}": a for name, a in more.items()}
    found = {"bits per byte": -found.pop("text: before"),
             "answers right": found.pop("answers: before")} | found
    found |= calibrating.sinks(model, source, text[1].ids)
    return found, change


def tried(config_: Config, gain, too, rows, layers: list[int], shape
          ) -> tuple[dict[str, Any], np.ndarray]:
    """Heads [L,H] of `layers` are chosen on the first rows, one by one, and judged on
    the second. gain(rows, heads) -> [B], greater where it is better; too: the same, the
    beginning turned down as well. Numbers, and what each head changes, 0 of others.
    """
    held_out, fresh = rows
    none = np.zeros(shape)
    before, change = gain(held_out, none), np.zeros(shape)
    for n in layers:
        for h in range(shape[1]):
            one = none.copy()
            one[n, h] = 1
            change[n, h] = gain(held_out, one).mean() - before.mean()
    kept = (change > 0).astype(float)  # ties are left out (proposed)
    every = none.copy()
    every[layers] = 1
    plain = gain(fresh, none)
    found = {"before": float(plain.mean()), "heads kept": int(kept.sum()),
             "heads that help": float((change[layers] > 0).mean()),
             "heads that harm": float((change[layers] < 0).mean())}
    for name, call, heads in (
        ("kept heads", gain, kept), ("all heads", gain, every),
        ("kept heads and the beginning", too, kept),
    ):
        found |= calibrating.interval(
            call(fresh, heads) - plain, name, config_.seed, config_.draws)
    return found, change


def right(model: LM, params: Any, batch: Batch, heads: np.ndarray) -> np.ndarray:
    """Which texts [B] are judged right with these heads [L,H] calibrated."""
    said = _said(model, params, batch["tokens"], heads)
    return (np.asarray(said) == batch["targets"][:, -1]).astype(float)


@functools.partial(jax.jit, static_argnames="model")
def _said(model, params, tokens, heads):
    states = calibrated(model.init_state(tokens.shape[1], tokens), heads)
    last = jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
    return model.apply(params, tokens, states, at=last)[1].argmax(-1)


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
