"""Memories that learn while they read: what they store, lose and shrug off.

Titans (Behrouz et al., 2024, arXiv:2501.00663) and Miras (Behrouz et al., 2025,
arXiv:2504.13173) claim that a network trained at test time remembers more than a sum
does, that forgetting is worth learning, and that other errors than the square stand
outliers and colliding keys. Each claim in small is a part of this command:

- outliers: v = k A + noise, every twentieth v 20 times as large, one linear memory. The
  error of clean answers with Huber's error (of the length; as Yaad has it) and l2.
- collisions: 8 centres, keys near them; the error at the centres, lp (p = 3) and l2.
- redrawn: A is drawn anew halfway. alpha and theta learned through the memory, or
  theta alone.
- recall: key-value pairs, noise, queries, through two layers of LMM of depth 1 and 2,
  linear attention and a window.
- needle: a fact 10 segments back, MAC and the same with a memory that is not written.
- lm: text, for linear attention, gated DeltaNet, Moneta, Yaad and Memora.
- chunks: the same Yaad with chunks of 16 tokens and of 1.

    python -m experiments.memorise
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attn.delta import Delta
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.miras import Memora, Moneta, Yaad
from attn.recurrent.memory import Gates, Where, learn
from attn.recurrent.memory_axes import Bias
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_nets import MLP
from attn.softmax import Softmax
from attn.titans import Titans
from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.data import Needles, Recall, Text
from experiments.measure import seeds
from experiments.training.loop import TrainConfig, evaluate, fit
from models.lm import LM
from models.titans_context import MAC

ONLINE, TRAINED = ("outliers", "collisions", "redrawn"), (
    "recall", "needle", "lm", "chunks")
STEPS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # eta, of which each error gets its best
BIASES = {
    "l2": Bias("l2"), "huber": Bias("huber_norm"), "yaad": Bias("huber_switch"),
    "lp": Bias("lp"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which claims, and how large."""

    parts: tuple[str, ...] = option(ONLINE, "of outliers, collisions, redrawn, recall, "
                                    "needle, lm, chunks")
    tokens: int = option(384, "of an online stream")
    keys: int = option(16, "width D of an online memory")
    streams: int = option(8, "online streams at once")
    updates: int = option(80, "updates of alpha and theta in `redrawn`")
    pairs: int = option(8, "key-value pairs of `recall`")
    length: int = option(128, "tokens of `recall`, `lm` and `chunks`")
    segment: int = option(16, "tokens of a segment of `needle`, whose text has 12")
    width: int = option(64, "model width E")
    heads: int = option(2, "heads H")
    steps: int = option(300, "training steps of each network")
    batch: int = option(8, "rows a step")
    rate: float = option(3e-3, "peak learning rate")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "runs, with seeds one after the other")
    quiet: bool = option(False, "no progress bars", FREE)

    def __post_init__(self):
        seeds.check(self)
        if unknown := set(self.parts) - {*ONLINE, *TRAINED}:
            raise ValueError(
                f"parts={sorted(unknown)}: expected some of {(*ONLINE, *TRAINED)}")
        if self.tokens < 4 or self.keys < 2:
            raise ValueError(f"tokens={self.tokens}, keys={self.keys}: expected 4 or "
                             "more, and 2 or more")

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, seed=self.seed,
            warmup=self.steps // 10, weight_decay=0.0,
        )


TINY = Config(
    parts=(*ONLINE, "recall", "needle"), tokens=8, keys=4, streams=2, updates=2,
    pairs=2, length=16, segment=4, width=8, heads=1, steps=1, batch=2, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    return seeds.repeated(config_, once, None, ("_error", "_loss", "_recall"))


def once(config_: Config) -> dict[str, Any]:
    """Every part that is asked for -> plain numbers, named PART_WHO_WHAT."""
    found: dict[str, Any] = {}
    for part in config_.parts:
        found |= {f"{part}_{name}": float(value)
                  for name, value in PARTS[part](config_).items()}
    return found


def remembered(bias: Bias, q, k, v, step, log_keep=None):
    """o [B,T,V] of a linear memory that begins empty; q, k [B,T,D], step [B,T]."""
    d, width = k.shape[-1], v.shape[-1]
    one = lambda a: a[:, :, None]  # of one head
    delta = jnp.ones_like(one(step))
    gates = Gates(one(step), None if log_keep is None else one(log_keep), None, delta)
    where = Where(jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2]), None)
    _, o = learn(Rule(MLP(1), bias), one(q), one(k), one(v), gates,
                 {"W0": jnp.zeros((1, d, width))}, where, chunk=1)
    return o[:, :, 0]


def unit(rng, *shape) -> np.ndarray:
    """Random vectors of length 1."""
    a = rng.normal(size=shape)
    return (a / np.linalg.norm(a, axis=-1, keepdims=True)).astype(np.float32)


def relative(o, want) -> jax.Array:
    """Squared error over squared length, of the second half of streams [B,T,V]."""
    late = o.shape[1] // 2
    return ((o - want)[:, late:] ** 2).sum() / (want[:, late:] ** 2).sum()


def best(bias: Bias, q, k, v, want) -> float:
    """The least error over `STEPS`; the steps are chosen on one half of the streams and
    judged on the other."""
    @jax.jit
    def errors(step):
        o = remembered(bias, q, k, v, jnp.full(k.shape[:2], step))
        half = len(k) // 2
        return relative(o[:half], want[:half]), relative(o[half:], want[half:])

    found = np.asarray([errors(step) for step in STEPS], np.float64)
    found = np.where(np.isfinite(found), found, np.inf)  # a step that diverged
    return float(found[found[:, 0].argmin(), 1])


def mapped(config_: Config, rng, halves: int = 1):
    """Keys and fresh queries, and both through maps A of each stream, of which there
    are `halves` one after the other."""
    b, t, d = config_.streams, config_.tokens, config_.keys
    maps = rng.normal(size=(b, halves, d, d)).astype(np.float32) / d ** 0.5
    each = np.repeat(maps, -(-t // halves), 1)[:, :t]
    k, q = unit(rng, b, t, d), unit(rng, b, t, d)
    through = lambda a: np.einsum("btd,btdv->btv", a, each)
    return k, q, through(k), through(q)


def outliers(config_: Config) -> dict[str, float]:
    """The error of each bias with outliers (wild) and without (calm)."""
    rng, found = np.random.default_rng(config_.seed), {}
    k, q, v, want = mapped(config_, rng)
    calm = v + 0.05 * rng.normal(size=v.shape).astype(np.float32)
    wild = np.where(rng.random(v.shape[:2])[..., None] < 0.05, 20 * calm, calm)
    for name in ("l2", "huber", "yaad"):
        for kind, seen in (("wild", wild), ("calm", calm)):
            found[f"{kind}_{name}_error"] = best(BIASES[name], q, k, seen, want)
    return found


def collisions(config_: Config) -> dict[str, float]:
    """The error at the centres of noisy keys."""
    rng, found = np.random.default_rng(config_.seed), {}
    b, t, d = config_.streams, config_.tokens, config_.keys
    centres, values = unit(rng, b, 8, d), unit(rng, b, 8, d)
    pick = lambda a: np.take_along_axis(a, rng_at[..., None], 1)
    rng_at = rng.integers(8, size=(b, t))
    k = pick(centres) + 0.3 * unit(rng, b, t, d)
    k, v = k / np.linalg.norm(k, axis=-1, keepdims=True), pick(values)
    rng_at = rng.integers(8, size=(b, t))
    q, want = pick(centres), pick(values)
    for name in ("l2", "lp"):
        found[f"{name}_error"] = best(BIASES[name], q, k, v, want)
    return found


def redrawn(config_: Config) -> dict[str, float]:
    """The error where the map changes halfway, of gates learned through the memory."""
    rng, found = np.random.default_rng(config_.seed), {}
    k, q, v, want = mapped(config_, rng, halves=2)

    def error(gates, rows, forgets):
        shape = k[rows].shape[:2]
        keep = jnp.full(shape, jax.nn.log_sigmoid(-gates["alpha"])) if forgets else None
        step = jnp.full(shape, jax.nn.sigmoid(gates["theta"]))
        o = remembered(BIASES["l2"], q[rows], k[rows], v[rows], step, keep)
        return ((o - want[rows]) ** 2).sum() / (want[rows] ** 2).sum()

    half, optimizer = config_.streams // 2, optax.adam(0.1)
    for name, forgets in (("fixed", False), ("learned", True)):
        cost = functools.partial(error, forgets=forgets)

        @jax.jit
        def update(carry, cost=cost):
            gates, state = carry
            change, state = optimizer.update(
                jax.grad(cost)(gates, slice(half)), state)
            return optax.apply_updates(gates, change), state

        gates = {"alpha": jnp.asarray(-4.0), "theta": jnp.asarray(-2.0)}
        carry = gates, optimizer.init(gates)
        for _ in range(config_.updates):
            carry = update(carry)
        found[f"{name}_error"] = jax.jit(functools.partial(
            cost, rows=slice(half, None)))(carry[0])
        if forgets:
            found["alpha"] = jax.nn.sigmoid(carry[0]["alpha"])
    return found


def trained(config_: Config, model: LM, data: Any, label: str) -> dict[str, float]:
    """Loss and accuracy on held-out rows."""
    fitted = fit(model, data, config_.plan(), label=label, quiet=config_.quiet)
    held_out = dataclasses.replace(data, split="valid")
    return evaluate(model, fitted.params, held_out, 8, config_.batch)


def network(config_: Config, layer: Any, vocab: int) -> LM:
    """Two layers of an attention."""
    return LM(vocab=vocab, width=config_.width, heads=config_.heads,
              attention=(layer,) * 2, position=None)


def recall(config_: Config) -> dict[str, float]:
    """The share of right answers."""
    data = Recall(vocab=2 * config_.length, length=config_.length, pairs=config_.pairs,
                  power=1.0, seed=config_.seed)
    layers = {
        "lmm1": Titans(depth=1), "lmm2": Titans(norm=False),
        "linear": Lightning(slopes="none"),
        "window": Softmax(mask=Causal() & Window(config_.length // 8)),
    }
    return {f"{name}_recall": trained(
        config_, network(config_, layer, data.vocab), data, name)["accuracy"]
        for name, layer in layers.items()}


def needle(config_: Config) -> dict[str, float]:
    """The share of right answers about a fact ten segments back."""
    data = Needles(length=12 * config_.segment, hay=16, needles=1, answer=1, keys=4,
                   values=16, depth=0.12, seed=config_.seed)
    memories = {"mac": Titans(), "unwritten": Titans(theta_max=1e-9, forget=False)}
    found = {}
    for name, memory in memories.items():
        layer = MAC(memory, heads=config_.heads, segment=config_.segment)
        model = network(config_, layer, data.vocab)
        found[f"{name}_recall"] = trained(config_, model, data, name)["accuracy"]
    return found


def text_losses(config_: Config, layers: dict[str, Any]) -> dict[str, float]:
    """Nats a byte on held-out text."""
    data = Text(length=config_.length, seed=config_.seed)
    return {f"{name}_loss": trained(
        config_, network(config_, layer, data.vocab), data, name)["loss"]
        for name, layer in layers.items()}


def lm(config_: Config) -> dict[str, float]:
    """All instances on text."""
    return text_losses(config_, {
        "linear": Lightning(slopes="none"), "delta": Delta(gated=True),
        "moneta": Moneta(read="norm"), "yaad": Yaad(), "memora": Memora(read="start"),
    })


def chunks(config_: Config) -> dict[str, float]:
    """Chunks of 16 tokens and of one."""
    return text_losses(config_, {"of16": Yaad(chunk=16), "of1": Yaad(chunk=1)})


PARTS: dict[str, Callable[[Config], dict[str, float]]] = {
    "outliers": outliers, "collisions": collisions, "redrawn": redrawn,
    "recall": recall, "needle": needle, "lm": lm, "chunks": chunks,
}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
