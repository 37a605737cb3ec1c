"""Which heads do what: retrieval heads, and the circuits of two tasks.

Retrieval heads (Wu et al., 2024, arXiv:2404.15574) copy from the context: while a head
looks at the token that the network is about to say, it scores. Here a needle of 6
random tokens lies among others, and its first 2 come again at the end. The heads with
the greatest scores are masked, and as many others, drawn at random. Then path patching
finds the heads of two tasks, the indirect object and coloured objects (Merullo et al.,
2023, arXiv:2310.08744): movers, which write the answer, and from them back those that
tell the movers where to look; they say how many are shared, whether without them the
tasks fail, whether weights put elsewhere change the answer as they should, and whether
a network that has learned colours badly is repaired by them.

    python -m experiments.circuits                       # trains a network of 4 layers
    python -m experiments.circuits --model=small         # retrieval heads of a model

A model's layers without weights of attention (MLA, Delta) have no scores and are not
masked; they are named. Heads are masked by zeros and, where all layers are Softmax
without sinks and scores of their own, by a uniform look. Of three found needles or
fewer no split-half correlation is given.

The model that ships, asked for 100 needles in 58 tokens with each of three seeds,

    python -m experiments.circuits --model=small --trials=100 --haystack=58 --top=6

medians, least to greatest behind them: 96% of a needle's tokens are right, and 10 of 32
heads (9 to 10) have a score of 0.1, the paper's threshold, or more. That is 31%, where
20% at most were expected here and the paper has 5%: that they are few does not show.
Six have 0.6 or more, the same six with every seed: three in layer 2 (from 0) with 0.95
to 0.98, three in layer 3 with 0.61 to 0.85. They are also the six best induction heads
on repeated tokens (0.52 to 0.95); chance would be 19%. Split-half correlation: 0.947
(0.907 to 0.956). Right tokens with heads masked by zeros, and as many that are not
among the six:

    masked      1      2     3     4      5     6
    the best    96%    78%   25%   0.8%   0.2%  0.2%
    others      99%    99%   99%   95%    94%   80% (26 to 96)

So the three best carry it, as expected (30% or less), with a uniform look a little less
(96, 83, 32, 1, 0.5, 0). Others cost little up to five, of which the worst draw leaves
82%; which six leave 26% was not looked into.

The network that is trained here, three seeds (`python -m experiments.circuits`, half an
hour on 2 cores beside other runs), medians with the least and the greatest: 84% (80 to
98) of a needle's tokens are right, half of the 16 heads (8 to 9) have a retrieval score
of 0.1 or more, split-half correlation 0.983 (0.969 to 0.997), and the three best are
induction heads (two of three with one seed). Right tokens, heads masked by zeros: the
best 90, 78 and 39% (19 to 70) with 1, 2 and 3, others 90, 93 and 90%.

                            the indirect object     coloured objects
    right answers           100% (99 to 100)        49% (41 to 69)
    without three movers     88% (72 to 90)         42% (35 to 46)
    without three others     99% (98 to 99)         44% (37 to 67)
    movers look elsewhere   100% (7 to 100)         98% (96 to 100)   of answers follow
    nobody does               0% (0 to 0)           24% (15 to 29)    of them

What movers look at is what is said, as in the paper (but for one seed of six cases);
that a task fails without its movers, by 40 points, does not show: others take over.
Colours, of which a third is chance, are hardly learned after these steps (95% were
asked for), and half of the three movers and three inhibition heads of a task are the
other's too (33 to 67%; 38% by chance): that circuits are reused is not shown by so few.
Repair shows: a network that has seen ten times fewer colours says 41% (36 to 42), with
its movers on the right one 93% (93 to 100), with inhibition heads on the wrong ones 45%
(42 to 50; the paper: 50% to 94%).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import inside
from experiments.data.inside import NEEDLE, VOCAB, Inside, Pair
from experiments.measure import head_pictures, heads as measured, patching, retrieving
from experiments.measure import seeds
from experiments.measure.patching import Receivers
from experiments.measure.provenance import provenance
from experiments.sources import folder_of
from experiments.training.loop import fit
from experiments.training.mesh import whole
from experiments.training.plan import plan_of
from experiments.training.runs import open_folder, write_whole
from models.checkpoint import load
from models.lm import LM
from models.view import Rows, look, masked_heads


@dataclasses.dataclass(frozen=True)
class Config:
    """The network, and how long it is looked at."""

    model: str | None = option(
        None, "a folder or name, as small, for retrieval heads alone")
    layers: int = option(4, "layers L of the network that is trained")
    heads: int = option(4, "heads H")
    width: int = option(64, "model width E")
    steps: int = option(2500, "training steps", most=STEPS)
    batch: int = option(32, "sequences a step")
    rate: float = option(3e-3, "peak learning rate", above=0)
    scarce: int = option(10, "how many times rarer colours are, to be repaired")
    trials: int = option(200, "needles")
    haystack: int = option(26, "tokens of a prompt, its needle among them")
    texts: int = option(200, "texts of each task")
    top: int = option(3, "heads of a stage of a circuit, and heads masked at most")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(3, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE
    )

    def __post_init__(self):
        seeds.check(self)
        if self.haystack < NEEDLE:
            raise ValueError(f"haystack={self.haystack}: expected {NEEDLE} or more, "
                             "the tokens of a needle")
        if self.model is None and self.top > self.layers * self.heads // 2:
            raise ValueError(f"top={self.top}: expected at most half of the "
                             f"{self.layers * self.heads} heads")

    def network(self) -> LM:
        """What is trained."""
        return LM(vocab=VOCAB, width=self.width, heads=self.heads,
                  attention=(Softmax(),) * self.layers,
                  embed_scale=measured.EMBED_SCALE)


TINY = Config(layers=2, heads=2, width=16, steps=2, batch=4, trials=4, texts=4, top=1,
              seeds=1, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """Numbers by name, medians over seeds with the least and the greatest."""
    return seeds.repeated(config_, once, "circuits")


def once(config_: Config) -> dict[str, Any]:
    """The same with one seed, and pictures in its folder."""
    command = config.command(config_)
    folder = open_folder("circuits", config_.folder, command, config.settings(config_))
    if config_.model is None:
        model = config_.network()
        params = trained(config_, (1.0,) * 4, folder / "network")
    else:
        model, params = load(folder_of(config_.model))
        check(config_, model)
    found, scores = retrieving.retrieval(
        model, params, config_.trials, config_.haystack, config_.top, config_.seed)
    pictures: dict[str, np.ndarray] = {"retrieval": scores}
    kinds = measured.of_repeats(
        model, params, 12, seed=config_.seed, low=min(6, model.vocab // 2))
    pictures |= kinds
    found |= retrieving.kinds_of_heads(scores, kinds, config_.top)
    if config_.model is None:
        more, stages = circuits(config_, model, params, folder)
        found |= more
        pictures |= {name: a["score"] for name, a in stages.items()}
        head_pictures.graphs(stages, config_.top, folder / "circuits.png")
    head_pictures.maps(pictures, folder / "heads.png")
    kept = {name: np.nan_to_num(a).tolist() for name, a in pictures.items()}
    text = provenance(command, [config_.seed]) | found | {"heads": kept}
    write_whole(folder / "circuits.json", json.dumps(text, indent=1) + "\n")
    return found | {"folder": str(folder)}


def check(config_: Config, model: LM) -> None:
    """ValueError for a model that cannot be asked, or not so much."""
    count = len(measured.weighted(model)) * model.heads
    if not count:
        raise ValueError(f"{config_.model}: no layer has weights of attention: "
                         "expected one or more")
    if config_.top > count // 2:
        raise ValueError(f"top={config_.top}: expected at most half of the {count} "
                         "heads that have weights")
    if model.vocab < 2 * NEEDLE:
        raise ValueError(f"{config_.model} knows {model.vocab} tokens: expected "
                         f"{2 * NEEDLE} or more")
    if model.learned and config_.haystack + NEEDLE > model.learned:
        raise ValueError(f"haystack={config_.haystack}: expected at most "
                         f"{model.learned - NEEDLE}, as the model has {model.learned} "
                         "positions")


def trained(
    config_: Config, shares: tuple[float, ...], folder: pathlib.Path
) -> Any:
    """Parameters of a network trained on the tasks in these shares; its checkpoints in
    a folder of their own, from which a run that was stopped goes on."""
    data = Inside(seed=config_.seed, shares=shares)
    fitted = fit(config_.network(), data, plan_of(config_), folder, label="circuits",
                 quiet=config_.quiet)
    return whole(fitted.params)


def circuits(
    config_: Config, model: LM, params: Any, folder: pathlib.Path
) -> tuple[dict, dict]:
    """Numbers of both tasks, and scores of all stages by name; folder: of the run."""
    found: dict[str, float] = {}
    stages: dict[str, Any] = {}
    sets: dict[str, dict[str, np.ndarray]] = {}
    rng = np.random.default_rng((config_.seed, 2))
    pairs = {"ioi": inside.ioi(rng, config_.texts),
             "colours": inside.colours(rng, config_.texts)}
    for task, pair in pairs.items():
        own = stages_of(config_, model, params, pair)
        stages |= {f"{task} {name}": a for name, a in own.items()}
        sets[task] = {name: best(a, config_.top) for name, a in own.items()}
        found |= {f"{task}: {name}": a for name, a in effects(
            config_, model, params, pair, sets[task], rng).items()}
    both = {task: a["movers"] | a["inhibition"] for task, a in sets.items()}
    shared, chance = measured.overlap(both["ioi"], both["colours"])
    found |= {"heads shared": shared, "heads shared by chance": chance}
    shares = 1.0, 1 / config_.scarce, 1.0, 1.0
    scarce = trained(config_, shares, folder / "scarce")
    return found | repair(config_, model, scarce, pairs), stages


def stages_of(config_: Config, model: LM, params: Any, pair: Pair) -> dict[str, Any]:
    """Effects [L,H] on the last stream, "movers", and on the movers' queries,
    "inhibition"."""
    clean, corrupt, answers = map(jnp.asarray, pair[:3])
    last = Receivers(layer=config_.layers - 1)
    movers = patching.scores(model, params, clean, corrupt, answers, last)
    told = tuple((int(n), int(h)) for n, h in np.argwhere(best(movers, config_.top))
                 if n > 0)
    found = {"movers": movers, "inhibition": movers | {
        "score": np.full_like(movers["score"], np.nan)}}
    if told:
        queries = Receivers(told, "q")
        found["inhibition"] = patching.scores(
            model, params, clean, corrupt, answers, queries)
    return found


def best(stage: dict[str, np.ndarray], count: int) -> np.ndarray:
    """The heads with the greatest effects, of either sign."""
    size = np.nan_to_num(np.abs(stage["score"]), nan=-1.0)
    return measured.chosen(size, count) & (size >= 0)


def accuracy_of(model: LM, params: Any, pair: Pair, **more: Any) -> float:
    """The share of texts whose right answer is more likely than all others."""
    @jax.jit
    def call(params):
        logits, _ = look(model, params, jnp.asarray(pair.clean), **more)
        return (logits[:, -1].argmax(-1) == pair.answers[:, 0]).mean()

    return float(call(params))


def effects(config_: Config, model, params, pair: Pair, sets, rng) -> dict[str, float]:
    """Accuracy; without movers (the mean over texts in their place), without as many
    others; and how often the answer follows weights that are put on the wrong one."""
    names = [f"{n}/z" for n in range(config_.layers)]
    _, seen = jax.jit(lambda p: look(model, p, jnp.asarray(pair.clean), read=names))(
        params)
    means = {n: seen[name].mean((0, 1)) for n, name in enumerate(names)}
    found = {"accuracy": accuracy_of(model, params, pair)}
    others = retrieving.at_random(rng, sets["movers"] | sets["inhibition"], min(
        config_.top, int((~(sets["movers"] | sets["inhibition"])).sum())))
    for name, mask in (("movers", sets["movers"]), ("others", others)):
        edit = masked_heads(model, mask, "mean", means)
        found[f"accuracy without {name}"] = accuracy_of(model, params, pair, edit=edit)
    away = pair._replace(answers=pair.answers[:, ::-1])
    patterns = pointed(sets["movers"], pair, pair.spots[:, 1:2])
    found["answers that follow"] = accuracy_of(model, params, away, patterns=patterns)
    found["that follow unasked"] = accuracy_of(model, params, away)
    return found


def pointed(heads: np.ndarray, pair: Pair, spots: np.ndarray) -> dict[int, Rows]:
    """Weights of these heads [L,H] in the last row, alike on the spots [B,n]."""
    t = pair.clean.shape[1]
    p = np.zeros((len(spots), t), np.float32)
    np.put_along_axis(p, spots, 1 / spots.shape[1], 1)
    value = jnp.asarray(p)[:, None, None]  # [B,1,1,T]
    every = jnp.ones((1, 1, 1, 1), bool)
    return {n: Rows(heads=np.flatnonzero(own), rows=[t - 1], mask=every, value=value,
                    read=False)
            for n, own in enumerate(heads) if own.any()}


def repair(config_: Config, model: LM, params: Any, pairs) -> dict[str, float]:
    """Colours of a network that has seen few: as it is, with the inhibition heads of
    the other task looking at the wrong colours (as in the paper), and with its movers
    looking at the right one."""
    own = stages_of(config_, model, params, pairs["ioi"])
    pair = pairs["colours"]
    inhibition, movers = (best(own[name], config_.top) for name in
                          ("inhibition", "movers"))
    found = {"as it is": accuracy_of(model, params, pair)}
    for name, heads, spots in (("inhibition on the wrong", inhibition,
                                pair.spots[:, 1:]),
                               ("movers on the right", movers, pair.spots[:, :1])):
        patterns = pointed(heads, pair, spots)
        found[name] = accuracy_of(model, params, pair, patterns=patterns)
    return {f"scarce colours, {name}": a for name, a in found.items()}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
