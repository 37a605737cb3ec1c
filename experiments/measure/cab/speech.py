"""Text to speech, of CAB: all frames at once, and one after the other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measure.cab import scores
from experiments.measure.cab.task import HEADS, LAYERS, WIDTH, Task, called
from models.speech import FastSpeech, TransformerTTS


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
        frames, _ = called(model)(params, rows["phones"])  # lasts are predicted
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
