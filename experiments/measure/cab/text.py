"""The tasks of CAB that are language: summaries, masked bytes, next bytes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.measure.cab import scores
from experiments.measure.cab.task import HEADS, LAYERS, WIDTH, Task, called, lossed
from models.lm import LM, loss as nats
from models.seq2seq import NORM, MaskedLM, Seq2Seq, feed


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
        return {"perplexity": float(jnp.exp(lossed(self.loss, model)(
            params, {"tokens": jnp.asarray(rows["tokens"])}, key)))}


class LMTask(Task):
    """Language modelling; judged by the first half, once and twice as many tokens of a
    row as it was trained with."""

    name = "lm"
    patterns = ("CS",)
    measures = {"perplexity": -1}
    inputs = ("tokens",)
    writes = True

    def network(self, places):
        one = places.at("CS")
        return LM(self.data.vocab, WIDTH, (one,) * LAYERS, HEADS, use_bias=True,
                  norms=NORM, feed=feed(WIDTH), scan=True)

    @staticmethod
    def loss(model, params, batch, key):
        total, count = nats(model.apply(params, batch["tokens"]), batch["targets"])
        return total / count

    def judged(self, model, params, rows, key):
        # nothing that comes later matters, so rows of twice the length hold all three
        data = dataclasses.replace(self.data, length=2 * self.data.length,
                                   split="valid")
        rows = data.batch(0, self.tests)
        logits = called(model)(params, jnp.asarray(rows["tokens"]))
        nats = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(rows["targets"]))  # [B,2T]
        half = self.data.length // 2
        return {name: float(jnp.exp(nats[:, :n * half].mean())) for name, n in
                (("half", 1), ("perplexity", 2), ("twice", 4))}


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
