"""A stream of constant memory: generating with Aaren and with a cache, and its price.

Feng et al., 2024 (arXiv:2405.13956) say that attention of a learned query does what a
Transformer's does, while a new token costs the same time and memory however many came
before. Two parts of that fit on a laptop. A layer generates T vectors, each made of the
last, for growing T: the time of all of it, and what the layer has to remember. And a
small network has to name the class that one vector of 128 carries, with either
attention inside.

    python -m experiments.stream

takes 2 to 6 minutes on 2 cores. Time for T = 256 to 4096 grows as T^0.98 with Aaren
and as T^2.17 with softmax and a cache: from 11.0 to 10.6 us a step against from 93 to
2,356. (Beside other jobs, 5.5 minutes, the exponents were 1.24 and 2.17.) A sequence
needs 1,096 bytes at any length, against 8,405,000 at T = 4096. The cache has room for T
from the start and every step reads all of it, out of fast memory at first and not
later: hence more than 2. Both networks name 100% of the classes (chance 12.5%).

Read that with care. The strength of the marker (4) and the rate (1e-2) were chosen
because Aaren learns there: with a marker of 1 at `--rate=3e-3` softmax named 97.0% in
600 steps and Aaren 19.2%. And with `--distractors`, where every vector carries a class
and the marker tells which one counts, softmax reached 99.6% at that rate and Aaren
14.4%, hardly above chance. One seed each. "Comparable to Transformers" does not show
where what counts has to be found by comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attn.aaren import Aaren
from attn.layers import MultiHead
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.measure import seeds
from experiments.training.loop import TrainConfig
from experiments.training.runs import open_folder
from models.block import Block
from models.stack import Layers, Pattern, check_layers, unbound


@dataclasses.dataclass(frozen=True)
class Config:
    """Two attentions, the stream and the task."""

    attentions: tuple = option((Aaren(), Softmax()), "what is compared")
    lengths: tuple = option((256, 512, 1024, 2048, 4096), "vectors to generate")
    sequences: int = option(4, "sequences generated at once")
    width: int = option(256, "model width E of the stream")
    heads: int = option(8, "heads H of the stream")
    rounds: int = option(3, "runs of each length, of which the fastest counts")
    classes: int = option(8, "classes of the task")
    events: int = option(128, "vectors in a sequence of the task")
    features: int = option(16, "numbers of noise in a vector")
    layers: int = option(2, "layers of the network")
    small: int = option(32, "its width E")
    distractors: bool = option(
        False, "every vector has a class, not the marked one only"
    )
    steps: int = option(600, "training steps", most=STEPS)
    batch: int = option(32, "sequences a step")
    rate: float = option(1e-2, "peak learning rate", above=0)
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained, with seeds one after the other")
    folder: str | None = option(
        None, "where to keep the picture; a new folder if None", FREE
    )

    def __post_init__(self):
        seeds.check(self)
        check_layers("attentions", self.attentions)
        if len(self.lengths) < 2 or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths}: expected two or more, from 1 on")

    def layer(self, attention: Any) -> MultiHead:
        """The layer that generates."""
        return MultiHead(unbound(attention), self.heads, position=None)

    def network(self, attention: Any) -> Classifier:
        """The network of the task; where it needs to know an order, it has none."""
        mixer = MultiHead(unbound(attention), 4, position=None, parent=None)
        block = Block(mixer, 2 * self.small, parent=None)
        return Classifier(Pattern((block,) * self.layers), self.small, self.classes)

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate,
            weight_decay=0.0, warmup=self.steps // 10, seed=self.seed,
        )


TINY = Config(lengths=(4, 8), sequences=1, width=16, heads=2, rounds=1, events=8,
              features=2, layers=1, small=16, steps=2, batch=4)


class Classifier(nn.Module):
    """Vectors [B,T,F] -> logits [B,classes], read off at the last one."""

    pattern: Pattern
    width: int
    classes: int

    @nn.compact
    def __call__(self, x):
        """x [B,T,F] -> [B,classes]."""
        _, x = Layers(self.pattern)(nn.Dense(self.width, name="embed")(x))
        return nn.Dense(self.classes, name="head")(nn.RMSNorm()(x[:, -1]))


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    x = jax.ShapeDtypeStruct((1, 1, config_.width), jnp.float32)
    for attention in config_.attentions:  # what cannot stream ends here, no folder made
        config_.layer(attention).init_state(1, x)
    return seeds.repeated(config_, once, "stream", ("accuracy",))


def once(config_: Config) -> dict[str, Any]:
    """Streams and classifies -> plain numbers: for each attention the exponent of the
    time and of the memory, both at the longest stream, and the accuracy."""
    folder = open_folder(
        "stream", config_.folder, config.command(config_), config.settings(config_)
    )
    found: dict[str, Any] = {}
    curves = streams(config_)
    for attention, (seconds, sizes) in zip(config_.attentions, curves):
        name, longest = _name(attention), config_.lengths[-1]
        found |= {
            f"{name}_time_exponent": slope(config_.lengths, seconds),
            f"{name}_memory_exponent": slope(config_.lengths, sizes),
            f"{name}_seconds_{longest}": seconds[-1],
            f"{name}_us_a_step_{config_.lengths[0]}":
                1e6 * seconds[0] / config_.lengths[0],
            f"{name}_us_a_step_{longest}": 1e6 * seconds[-1] / longest,
            f"{name}_state_bytes_{longest}": sizes[-1],
        }
    picture(config_, curves, folder / "stream.png")
    for attention in config_.attentions:
        accuracy, parameters = learned(config_, attention)
        name = _name(attention)
        found |= {f"{name}_accuracy": accuracy, f"{name}_parameters": parameters}
    return found | {"chance": 1 / config_.classes, "folder": str(folder)}


def slope(lengths, values) -> float:
    """The exponent of the power law that fits best."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def streams(config_: Config) -> list[tuple[list[float], list[int]]]:
    """Of each attention, seconds and bytes of memory of a sequence, by length. The
    attentions take turns, so that what else the machine does hits all of them."""
    found: list[tuple[list[float], list[int]]] = [([], []) for _ in config_.attentions]
    for length in config_.lengths:
        runs = [_stream(config_, a, length) for a in config_.attentions]
        best = [np.inf] * len(runs)
        for _ in range(config_.rounds):
            for n, (generate, args, _) in enumerate(runs):
                clock = time.perf_counter()
                jax.block_until_ready(generate(*args))
                best[n] = min(best[n], time.perf_counter() - clock)
        for (seconds, sizes), value, (*_, size) in zip(found, best, runs):
            seconds.append(float(value))
            sizes.append(size)
    return found


def _stream(config_: Config, attention: Any, length: int):
    """(compiled function, arguments, bytes of memory of a sequence): the layer's answer
    to a vector, at unit size, is the next vector, `length` times over."""
    layer = config_.layer(attention)
    x = jax.random.normal(
        jax.random.key(config_.seed), (config_.sequences, 1, config_.width))
    params = layer.init(jax.random.key(config_.seed), x)

    @jax.jit
    def generate(params, x):
        def one(carry, _):
            state, y = layer.apply(params, carry[1], carry[0])
            y = y + x  # the beginning stays in sight: the stream does not settle
            y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
            return (state, y), None

        first = layer.init_state(length, x), x
        return jax.lax.scan(one, first, None, length=length)[0][1]

    state = jax.eval_shape(lambda: layer.init_state(length, x))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    return generate.lower(params, x).compile(), (params, x), size // config_.sequences


def examples(config_: Config, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [B,T,1+classes+features] and the class [B]. All of a vector is noise, but
    one has a marker, 4, in front and a class, which is asked for."""
    rng = np.random.default_rng((config_.seed, step))
    shape = size, config_.events
    codes = np.eye(config_.classes)[rng.integers(config_.classes, size=shape)]
    marker = np.zeros((*shape, 1))
    at = rng.integers(config_.events, size=size)
    marker[np.arange(size), at] = 1
    seen = codes if config_.distractors else codes * marker
    noise = rng.normal(size=(*shape, config_.features))
    x = np.concatenate([4 * marker, seen, noise], -1).astype(np.float32)
    return x, codes[np.arange(size), at].argmax(-1).astype(np.int32)


def learned(config_: Config, attention: Any) -> tuple[float, int]:
    """The accuracy on 1024 new sequences after training, and the parameters."""
    model, optimizer = config_.network(attention), config_.plan().optimizer()
    draw = functools.partial(examples, config_)
    params = jax.jit(model.init)(jax.random.key(config_.seed), draw(0, 1)[0])
    moments = optimizer.init(params)

    @jax.jit
    def update(params, moments, x, y):
        def loss(params):
            found: Any = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()

        change, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, change), moments

    for step in range(config_.steps):
        params, moments = update(params, moments, *draw(step, config_.batch))
    logits: Any = jax.jit(model.apply)
    hits = []
    for n in range(8):  # steps that training never comes to
        x, y = draw(config_.steps + 1 + n, 128)
        hits.append(float((np.asarray(logits(params, x)).argmax(-1) == y).mean()))
    size = sum(a.size for a in jax.tree.leaves(params))
    return float(np.mean(hits)), size


def picture(config_: Config, found, path: pathlib.Path) -> None:
    """Time and memory against the length of the stream."""
    from experiments.measure.panels import Panel, curves

    axes = {"xscale": "log", "yscale": "log", "xlabel": "vectors generated"}
    curves([
        Panel(title, {_name(attention): (config_.lengths, curve[n])
                      for attention, curve in zip(config_.attentions, found)}, axes)
        for n, title in enumerate(
            ("time of all of them (s)", "memory of a sequence (bytes)"))], path)


def _name(attention: Any) -> str:
    return type(attention).__name__.lower()


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
