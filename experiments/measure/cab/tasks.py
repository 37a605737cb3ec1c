"""The seven tasks of CAB, small: data, network, what is learned, how it is judged.

Speech counts as one task with two networks. Data are synthetic but for the two of
language, which read the source of Python's standard library; what each stands for is
said where it is made (`experiments/data`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attn.contract.attention import said
from experiments.data.dataset import Dataset
from experiments.data.speech import Speech
from experiments.data.summaries import Summaries
from experiments.data.text import Text
from experiments.measure.cab import scores
from experiments.training.plan import TrainConfig
from models.lm import LM, loss as nats
from models.places import Places
from models.seq2seq import NORM, MaskedLM, Seq2Seq, feed
from models.speech import FastSpeech, TransformerTTS

WIDTH, HEADS, LAYERS = 64, 4, 2


@dataclasses.dataclass(frozen=True)
class Task:
    """A task. patterns: where an attention can stand. measures: name -> whether more is
    better (1) or less (-1). data: rows of training and, with split "valid", of the
    test. steps, batch, rate: of the training, on `rows` rows. tests: rows of the test.
    """

    data: Dataset
    steps: int = 300
    batch: int = 8
    rate: float = 2e-3
    rows: int = 512
    tests: int = 16
    name: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    measures: ClassVar[dict[str, int]]
    inputs: ClassVar[tuple[str, ...]]
    writes: ClassVar[bool] = False  # one token or frame after the other

    def plan(self, seed: int) -> TrainConfig:
        """The training: AdamW without decay."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, seed=seed,
            warmup=self.steps // 10, weight_decay=0.0)

    def drawn(self, split: str, seed: int) -> dict[str, np.ndarray]:
        """The rows of a split."""
        data = dataclasses.replace(self.data, split=split, seed=seed)
        return data.batch(0, self.rows if split == "train" else self.tests)

    def network(self, places: Places) -> nn.Module:
        """The network with attentions at their places."""
        raise NotImplementedError

    @staticmethod
    def loss(model, params, batch: dict, key) -> jax.Array:
        """What the training makes small."""
        raise NotImplementedError

    def judged(self, model, params, rows: dict, key) -> dict[str, float]:
        """The measures on rows of the test."""
        raise NotImplementedError

    def check(self, attention: Any) -> None:
        """ValueError for an attention that cannot be judged here."""
        if self.writes and said(attention, "ahead") != 0:
            raise ValueError(
                f"{self.name}: {type(attention).__name__} chooses what it reads by "
                "later tokens, which are not written yet: expected ahead=0")


class FastSpeechTask(Task):
    """Text to speech, all frames at once."""

    name = "speech"
    patterns = ("NS",)
    measures = {"mcd": -1, "msd": -1}
    inputs = ("phones", "lasts")

    def network(self, places):
        return FastSpeech(frames=self.data.length, width=WIDTH, heads=HEADS,
                          layers=LAYERS, places=places)

    @staticmethod
    def loss(model, params, batch, key):
        frames, log = model.apply(params, batch["phones"], batch["lasts"])
        lasts = jnp.square(log - jnp.log(batch["lasts"].astype(jnp.float32)))
        return jnp.square(frames - batch["frames"]).mean() + 0.1 * lasts.mean()

    def judged(self, model, params, rows, key):
        frames, _ = _call(model)(params, rows["phones"])  # lasts are predicted
        return scores.spectral(np.asarray(frames), rows["frames"])


class TransformerTTSTask(Task):
    """Text to speech, frame after frame: 10% of the frames that it is told in training
    are none, and all have noise, so that it has to read the phones."""

    name = "speech_ar"
    patterns = ("NS", "CS", "CC")
    measures = {"mcd": -1, "msd": -1}
    inputs = ("phones", "frames")
    writes = True

    def network(self, places):
        return TransformerTTS(width=WIDTH, heads=HEADS, layers=LAYERS, places=places)

    @staticmethod
    def loss(model, params, batch, key):
        frames = batch["frames"]
        before = jnp.pad(frames[:, :-1], ((0, 0), (1, 0), (0, 0)))
        noise, none = jax.random.split(key)
        before = before + 0.3 * jax.random.normal(noise, before.shape)
        there = jax.random.bernoulli(none, 0.9, (*before.shape[:2], 1))
        found = model.apply(params, batch["phones"], before * there)
        return jnp.square(found - frames).mean()

    def judged(self, model, params, rows, key):
        frames = _spoken(model, params, rows["phones"], self.data.length)
        return scores.spectral(np.asarray(frames), rows["frames"])


class SummaryTask(Task):
    """Summarisation, greedy."""

    name = "summary"
    patterns = ("NS", "CS", "CC")
    measures = {"r1": 1, "r2": 1, "rl": 1}
    inputs = ("source", "before")
    writes = True

    def network(self, places):
        return Seq2Seq(self.data.vocab, WIDTH, HEADS, LAYERS, places)

    @staticmethod
    def loss(model, params, batch, key):
        logits = model.apply(params, batch["source"], batch["before"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["summary"]).mean()

    def judged(self, model, params, rows, key):
        many = rows["summary"].shape[1]
        written = _written(model, params, rows["source"], many)
        return scores.rouge(np.asarray(written), rows["summary"])


class MaskedLMTask(Task):
    """Masked language modelling: of 15% of the bytes, 80% are masked, 10% others."""

    name = "mlm"
    patterns = ("NS",)
    measures = {"perplexity": -1}
    inputs = ("tokens",)

    def network(self, places):
        return MaskedLM(self.data.vocab, WIDTH, HEADS, LAYERS, places)

    @staticmethod
    def loss(model, params, batch, key):
        tokens, vocab = batch["tokens"], model.vocab
        chosen, kind, other = jax.random.split(key, 3)
        chosen = jax.random.bernoulli(chosen, 0.15, tokens.shape)
        kind = jax.random.uniform(kind, tokens.shape)
        wrong = jax.random.randint(other, tokens.shape, 0, vocab)
        given = jnp.where(kind < 0.8, vocab, jnp.where(kind < 0.9, wrong, tokens))
        logits = model.apply(params, jnp.where(chosen, given, tokens))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return (each * chosen).sum() / jnp.maximum(chosen.sum(), 1)

    def judged(self, model, params, rows, key):
        return {"perplexity": float(jnp.exp(_loss(self.loss, model)(
            params, {"tokens": jnp.asarray(rows["tokens"])}, key)))}


class LMTask(Task):
    """Language modelling; judged at half, once and twice the length of the training."""

    name = "lm"
    patterns = ("CS",)
    measures = {"perplexity": -1}
    inputs = ("tokens",)

    def network(self, places):
        one = places.at("CS")
        return LM(self.data.vocab, WIDTH, (one,) * LAYERS, HEADS, use_bias=True,
                  norms=NORM, feed=feed(WIDTH))

    @staticmethod
    def loss(model, params, batch, key):
        total, count = nats(model.apply(params, batch["tokens"]), batch["targets"])
        return total / count

    def judged(self, model, params, rows, key):
        found = {}
        for name, times in (("half", 0.5), ("perplexity", 1), ("twice", 2)):
            data = dataclasses.replace(
                self.data, length=int(self.data.length * times), split="valid")
            rows = data.batch(0, max(1, int(self.tests / times)))
            one = {n: jnp.asarray(rows[n]) for n in ("tokens", "targets")}
            found[name] = float(jnp.exp(_loss(self.loss, model)(params, one, key)))
        return found


@functools.cache
def _call(model):
    return jax.jit(model.apply)


@functools.cache
def _loss(loss, model):
    return jax.jit(functools.partial(loss, model))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _spoken(model, params, phones, frames: int):
    """Frames [B,T,bands] of phones [B,S], each made of those before."""
    context = model.apply(params, phones, method="encode")
    first = jnp.zeros((phones.shape[0], frames + 1, model.bands))

    def step(before, at):
        found = model.apply(params, context, before[:, :-1], method="decode")
        new = jax.lax.dynamic_index_in_dim(found, at, 1, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(before, new, at + 1, 1), None

    return jax.lax.scan(step, first, jnp.arange(frames))[0][:, 1:]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _written(model, params, source, many: int):
    """The most probable tokens [B,T] for sources [B,S], one after the other."""
    context = model.apply(params, source, method="encode")
    first = jnp.zeros((source.shape[0], many + 1), jnp.int32)

    def step(before, at):
        logits = model.apply(params, context, before[:, :-1], method="decode")
        new = jax.lax.dynamic_index_in_dim(logits, at, 1, keepdims=True).argmax(-1)
        return jax.lax.dynamic_update_slice_in_dim(
            before, new.astype(jnp.int32), at + 1, 1), None

    return jax.lax.scan(step, first, jnp.arange(many))[0][:, 1:]
