"""Does a model answer better when chosen heads are pointed at a sentence?

PASTA (Zhang et al., 2023, arXiv:2311.02262) biases heads towards marked tokens;
AutoPASTA (Zhang et al., 2024, arXiv:2409.10790) lets the model mark them itself. A
small network is trained, not to the end, to look up facts among others that contradict
them: twelve sentences "source entity attribute value", in which each fact is told by
two sources with different values, and a question that says whom to trust. A second form
of question asks for the number of the sentence. Heads are searched from coarse to fine,
all heads of a layer first and then single ones of the best layers, and one by one; then
fresh questions are answered without steering, with the right sentence marked, the one
that the network names, one at random, and with all heads steered.

    python -m experiments.steer

Figures of three seeds are not shipped yet: no claim is made of what is found.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.pasta import Pasta, highlight
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.data.dataset import Batch, Dataset, chosen
from experiments.measure import seeds
from experiments.measure.provenance import provenance
from experiments.training.loop import fit
from experiments.training.mesh import whole
from experiments.training.plan import plan_of
from experiments.training.runs import open_folder, write_whole
from models.lm import LM

ASK, FIND = 0, 1  # the two forms of a question
SOURCES, ENTITIES, ATTRIBUTES, VALUES = 8, 24, 4, 24
SENTENCES, WORDS = 12, 4
AT = 2 + np.cumsum([0, SOURCES, ENTITIES, ATTRIBUTES, VALUES, SENTENCES])
LENGTH = SENTENCES * WORDS + 4
MARKED = "gold", "self-found", "random"


class Facts(NamedTuple):
    """tokens [B,T] of the context and a question that asks; sentence [B], the one that
    answers it; answer [B], the token of its value."""

    tokens: np.ndarray
    sentence: np.ndarray
    answer: np.ndarray


def facts(rng: np.random.Generator, size: int) -> Facts:
    """Six facts, each told by two sources with different values, in any order."""
    half = SENTENCES // 2
    entity = AT[1] + chosen(rng, size, ENTITIES, half)
    attribute = AT[2] + rng.integers(0, ATTRIBUTES, (size, half))
    source = AT[0] + chosen(rng, size, SOURCES, 2)
    value = AT[3] + chosen(rng, size, VALUES, SENTENCES)
    parts = np.stack([np.repeat(source, half, 1), np.tile(entity, 2),
                      np.tile(attribute, 2), value], 2)
    order = chosen(rng, size, SENTENCES, SENTENCES)
    parts = np.take_along_axis(parts, order[..., None], 1)
    sentence = rng.integers(0, SENTENCES, size)
    own = parts[np.arange(size), sentence]
    question = np.concatenate([np.full((size, 1), ASK), own[:, :3]], 1)
    tokens = np.concatenate([parts.reshape(size, -1), question], 1)
    return Facts(tokens.astype(np.int32), sentence, own[:, 3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup(Dataset):
    """Facts to train on: a question in one of the two forms, whose answer is the target
    of the last token."""

    length: int = LENGTH

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        found = facts(rng, size)
        tokens, targets = found.tokens.copy(), np.full_like(found.tokens, -1)
        find = rng.random(size) < 0.5
        tokens[:, -4] = np.where(find, FIND, ASK)
        targets[:, -1] = np.where(find, AT[4] + found.sentence, found.answer)
        return {"tokens": tokens, "targets": targets}


@dataclasses.dataclass(frozen=True)
class Config:
    """The network, the search and the test."""

    layers: int = option(3, "layers L")
    heads: int = option(4, "heads H")
    width: int = option(64, "model width E")
    steps: int = option(2500, "training steps: few enough to leave room")
    batch: int = option(64, "sequences a step")
    rate: float = option(3e-3, "peak learning rate")
    alpha: float = option(0.01, "what an unmarked token counts for")
    profiled: int = option(500, "questions that heads are chosen with")
    asked: int = option(1000, "fresh questions of the test")
    best_layers: int = option(1, "layers whose heads are tried one by one")
    most: int = option(4, "heads that are steered at most")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(3, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE
    )

    def __post_init__(self):
        seeds.check(self)
        if not 1 <= self.best_layers <= self.layers:
            raise ValueError(f"best_layers={self.best_layers}: expected 1 to "
                             f"layers={self.layers}")
        self.steered()  # refuses what alpha cannot be

    def network(self) -> LM:
        """What is trained."""
        return LM(vocab=int(AT[-1]), width=self.width, heads=self.heads,
                  attention=(Softmax(),) * self.layers)

    def steered(self) -> Pasta:
        """What stands in the place of its attentions in the test."""
        return Pasta(alpha=self.alpha)


TINY = Config(layers=2, heads=2, width=16, steps=2, batch=4, profiled=8, asked=8,
              most=1, seeds=1, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """Numbers by name, medians over seeds with the least and the greatest."""
    return seeds.repeated(config_, once, "steer")


def once(config_: Config) -> dict[str, Any]:
    """The same with one seed."""
    command = config.command(config_)
    folder = open_folder("steer", config_.folder, command, config.settings(config_))
    fitted = fit(config_.network(), Lookup(seed=config_.seed), plan_of(config_),
                 label="steer", quiet=config_.quiet)
    model = config_.network().clone(
        attention=(config_.steered(),) * config_.layers)
    score = functools.partial(accuracy, model, whole(fitted.params))
    rng = np.random.default_rng((config_.seed, 1))
    known, asked = facts(rng, config_.profiled), facts(rng, config_.asked)
    coarse, tried = coarse_to_fine(config_, functools.partial(score, known))
    every, all_tried = one_by_one(config_, functools.partial(score, known))
    named = answers(model, whole(fitted.params), asked.tokens, FIND) - AT[4]
    marked = {"gold": asked.sentence, "self-found": np.clip(named, 0, SENTENCES - 1),
              "random": rng.integers(0, SENTENCES, config_.asked)}
    none = np.zeros((config_.layers, config_.heads))
    found = {"no steering": score(asked, none, asked.sentence)}
    found |= {name: score(asked, coarse, spot) for name, spot in marked.items()}
    found |= {
        "all heads, gold": score(asked, none + 1, asked.sentence),
        "one by one, gold": score(asked, every, asked.sentence),
        "sentences found": float((named == asked.sentence).mean()),
        "evaluations": tried, "evaluations, one by one": all_tried,
        "heads": int(coarse.sum()), "heads, one by one": int(every.sum()),
        "interval": 1.96 * (found["no steering"] * (1 - found["no steering"])
                            / config_.asked) ** 0.5,
    }
    text = provenance(command, [config_.seed]) | found
    text |= {"steered": np.argwhere(coarse).tolist()}
    write_whole(folder / "steer.json", json.dumps(text, indent=1) + "\n")
    return found | {"folder": str(folder)}


def coarse_to_fine(config_: Config, score) -> tuple[np.ndarray, int]:
    """Heads [L,H] and how many sets were tried: layers as a whole, the heads of the
    best ones, then as many of these as answer best together. score(heads)."""
    shape = config_.layers, config_.heads
    layers = []
    for n in range(shape[0]):
        own = np.zeros(shape)
        own[n] = 1
        layers.append(score(own))
    best = np.argsort(-np.array(layers), kind="stable")[:config_.best_layers]
    heads = [(int(n), h) for n in best for h in range(shape[1])]
    found, tried = together(config_, score, heads)
    return found, tried + shape[0]


def one_by_one(config_: Config, score) -> tuple[np.ndarray, int]:
    """The same among all heads."""
    heads = [(n, h) for n in range(config_.layers) for h in range(config_.heads)]
    return together(config_, score, heads)


def together(config_: Config, score, heads) -> tuple[np.ndarray, int]:
    """The best of these heads, as many as answer best together, at most `most`."""
    shape = config_.layers, config_.heads

    def mask(some):
        own = np.zeros(shape)
        own[tuple(np.array(some).T)] = 1
        return own

    alone = [score(mask([head])) for head in heads]
    order = [heads[n] for n in np.argsort(-np.array(alone), kind="stable")]
    sets = [mask(order[:n]) for n in range(1, min(config_.most, len(order)) + 1)]
    scores = [max(alone), *map(score, sets[1:])]
    return sets[int(np.argmax(scores))], len(heads) + len(sets) - 1


def accuracy(model: LM, params: Any, asked: Facts, heads: np.ndarray,
             sentence: np.ndarray | None = None) -> float:
    """The share of right answers with these heads [L,H] steered to these sentences [B],
    by default the right ones."""
    spot = asked.sentence if sentence is None else sentence
    said = answers(model, params, asked.tokens, ASK, heads, spot)
    return float((said == asked.answer).mean())


def answers(model, params, tokens, form, heads=None, sentence=None) -> np.ndarray:
    """The token [B] that is said behind a question of this form."""
    if heads is None:
        heads = np.zeros((len(model.attention), model.heads))
        sentence = np.zeros(len(tokens), int)
    tokens = tokens.copy()
    tokens[:, -4] = form
    return np.asarray(_answers(model, params, tokens, heads, sentence))


@functools.partial(jax.jit, static_argnames="model")
def _answers(model, params, tokens, heads, sentence):
    at = jnp.arange(tokens.shape[1])[None] // WORDS
    spans = (at == sentence[:, None])[:, None]  # [B,1,T]
    # the question is seen as it is: of the context alone others count less
    marks = model.attention[0].marks(spans, SENTENCES * WORDS)
    states = highlight(model.init_state(tokens.shape[1], tokens), marks, heads)
    last = jnp.full(tokens.shape[:1], tokens.shape[1] - 1)
    return model.apply(params, tokens, states, at=last)[1].argmax(-1)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
