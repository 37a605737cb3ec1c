"""Calibrating: what turning sinks down changes in a loaded model, in text and answers.

Which tokens are sinks follows from all rows that vote, so that a text that is read at
once would know what comes. Here half of a text is read at once and the other half, the
judged one, token by token; so are answers behind their question.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.act import calibrated
from experiments.measure.asked import Reader, batches
from experiments.measure.head_choice import exact_layers
from experiments.measure.told import Told
from experiments.measure.reading import Loaded
from models.view import look


class Judged(NamedTuple):
    """ids [B,T], of which the first `prompt` are read at once and the others judged;
    bytes [B]: of the judged ones, in UTF-8."""

    ids: np.ndarray
    prompt: int
    bytes: np.ndarray


def of_text(reader: Reader, rng: np.random.Generator, size: int, length: int) -> Judged:
    """Rows of the reader's hay, whose second half is judged. ValueError for rows longer
    than the model's."""
    if not len(reader.start) + 4 <= length <= reader.length:
        raise ValueError(f"length={length}: expected {len(reader.start) + 4} to "
                         f"{reader.length}")
    rows = [reader.piece(rng, length - len(reader.start)) for _ in range(size)]
    ids = np.stack([np.concatenate([reader.start, row]) for row in rows])
    half = length // 2
    count = [len(reader.text.decode(row[half:].tolist()).encode()) for row in ids]
    return Judged(ids.astype(np.int32), half, np.maximum(count, 1))


def of_answers(asked: Told) -> Judged:
    """Questions with their answers behind."""
    ids = np.concatenate([asked.prompt, asked.answer], 1)
    return Judged(ids, asked.prompt.shape[1], np.ones(len(ids)))


def bits(model: Any, params: Any, batch: int, rows: Judged, heads: np.ndarray
         ) -> np.ndarray:
    """Bits per byte of each row [B], less than 0: more is better. heads [L,H]."""
    return -judged(model, params, batch, rows, heads)[0] / np.log(2) / rows.bytes


def right(model: Any, params: Any, batch: int, rows: Judged, heads: np.ndarray
          ) -> np.ndarray:
    """Which rows [B] have all judged tokens right: 1 or 0."""
    return judged(model, params, batch, rows, heads)[1]


def judged(model: Any, params: Any, batch: int, rows: Judged, heads: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray]:
    """nats [B] of the judged tokens of each row, and whether all are the likeliest."""
    found, size = [], len(rows.ids)
    for at in batches(size, batch):
        found.append(np.asarray(_judged(
            model, params, rows.ids[at], heads, rows.prompt)))
    nats, hits = np.concatenate(found, 1)[:, :size]
    return nats, hits


@functools.partial(jax.jit, static_argnums=(0, 4))
def _judged(model, params, ids, heads, prompt: int) -> jax.Array:
    b, t = ids.shape
    state = calibrated(model.init_state(t, ids[:, :prompt]), heads)
    state, logits = model.apply(
        params, ids[:, :prompt], state, at=jnp.full(b, prompt - 1))

    def one(carry, token):
        state, logits, nats, hits = carry
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
        hits = hits & (logits.argmax(-1) == token)
        state, logits = model.apply(params, token[:, None], state)
        return (state, logits[:, 0], nats - own, hits), None

    start = state, logits, jnp.zeros(b), jnp.ones(b, bool)
    (*_, nats, hits), _ = jax.lax.scan(one, start, ids[:, prompt:].T)
    return jnp.stack([nats, hits.astype(jnp.float32)])


def interval(change: np.ndarray, name: str, seed: int, draws: int) -> dict[str, float]:
    """The mean of what changes in each row [B], with the middle 95% of a bootstrap over
    rows."""
    rng = np.random.default_rng((seed, 3))
    drawn = rng.integers(0, len(change), (draws, len(change)))
    low, high = np.quantile(change[drawn].mean(1), (0.025, 0.975))
    return {f"change, {name}": float(change.mean()),
            f"change, {name}, low": float(low),
            f"change, {name}, high": float(high)}


def sinks(model: Any, found: Loaded, ids: np.ndarray) -> dict[str, float]:
    """Of texts ids [B,T], read at once: sinks that are turned down, a head and text;
    the share of them without a letter or a digit, and what it is of all tokens."""
    layers = exact_layers(found.model)

    @functools.partial(jax.jit, static_argnums=0)
    def call(plain, params, ids):
        _, seen = look(plain, params, ids, read=[
            f"{n}/{name}" for n in layers for name in "qk"])
        return jnp.stack([model.attention[n].found(seen[f"{n}/q"], seen[f"{n}/k"])[1]
                          for n in layers], 1)  # [B,L,H,S]

    at = np.concatenate([np.asarray(call(found.model, found.params, ids[n : n + 8]))
                         for n in range(0, len(ids), 8)])
    words = {n: found.text.decode([int(n)]) for n in np.unique(ids)}
    marks = np.asarray([[not any(map(str.isalnum, words[n])) for n in row]
                        for row in ids])
    # the first token begins the text and is no sink that is turned down
    mine = at & marks[:, None, None]
    return {"sinks a head and text": float(at.sum(-1).mean()),
            "sinks without letters": float(mine.sum() / max(at.sum(), 1)),
            "tokens without letters": float(marks.mean())}
