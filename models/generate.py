"""Generation: a prompt is read in chunks, then tokens are drawn one by one.

Prompts of different lengths share a batch: they are filled up with padding on the
right, which is not stored. Lengths are rounded up to buckets, so that a new length
within the same bucket compiles nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np


class Sampling(NamedTuple):
    """How a token is drawn. temperature 0 takes the most likely one; top_k keeps the k
    most likely, top_p the fewest whose probabilities add up to p."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def sample(logits: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """One token [B] from logits [B,vocab]."""
    if how.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_k is not None:
        # the k-th largest [B,1]
        worst = jax.lax.top_k(logits, min(how.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    if how.top_p is not None:
        order = jnp.sort(logits, -1, descending=True)
        p = jax.nn.softmax(order)
        # the token that crosses the line is the last one kept
        kept = jnp.cumsum(p, -1) - p < how.top_p
        worst = jnp.where(kept, order, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def generate(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    seed: int = 0,
    chunk: int = 512,
) -> list[list[int]]:
    """Up to `length` new tokens for each prompt, without the stop token that ends one.

    prompts: lists of token ids, of any lengths from 1. chunk: how many prompt tokens
    are read at once. ValueError for an empty prompt or an id outside the vocabulary.
    """
    how = Sampling(temperature, top_k, top_p)
    _check(model, prompts, length, how, chunk)
    longest = max(len(p) for p in prompts)
    padded = bucket(longest)
    chunk = min(chunk, padded)
    padded = -(-padded // chunk) * chunk  # whole chunks: one program reads them all
    tokens = np.zeros((len(prompts), padded), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        # 0 behind: padding
        tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
    room = bucket(length)
    whole = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
    state = model.init_state(padded + room, whole)
    logits = jnp.zeros((len(prompts), model.vocab), jnp.float32)
    for at in range(0, padded, chunk):
        piece = slice(at, at + chunk)
        if not segments[:, piece].any():
            break  # every prompt has ended
        state, logits = _read(
            model, params, state, logits, tokens[:, piece], segments[:, piece]
        )
    key, ends = jax.random.key(seed), jnp.asarray(stop, jnp.int32)
    drawn, counts = _write(model, how, room, params, state, logits, key, ends, length)
    drawn, counts = np.asarray(drawn), np.asarray(counts)
    return [row[:n].tolist() for row, n in zip(drawn, counts)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def stream(model: Any, params: Any, tokens: jax.Array, prompt: int) -> jax.Array:
    """The logits [B,T,vocab] of a text that comes as a stream: the first `prompt`
    tokens in one piece, the others one by one. tokens [B,T]."""
    tokens = jnp.asarray(tokens)
    state = model.init_state(tokens.shape[1], tokens[:, :prompt])
    state, first = model.apply(params, tokens[:, :prompt], state)

    def step(state, token):
        state, logits = model.apply(params, token[:, None], state)
        return state, logits[:, 0]

    _, rest = jax.lax.scan(step, state, tokens[:, prompt:].T)  # [T - prompt,B]
    # [B,prompt,vocab] and [B,T - prompt,vocab]
    return jnp.concatenate([first, rest.swapaxes(0, 1)], 1)


def bucket(n: int, least: int = 16) -> int:
    """`n` rounded up to a power of two."""
    return max(least, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(model, params, state, logits, tokens, segments):
    """One chunk of the prompts: logits [B,vocab] after each row's last token so far."""
    real = (segments > 0).sum(1)
    at = jnp.maximum(real - 1, 0)  # of each row's last token here
    state, new = model.apply(params, tokens, state, segments=segments, at=at)
    # rows that have ended keep theirs
    return state, jnp.where(real[:, None] > 0, new, logits)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(model, how, room, params, state, logits, key, stop, length):
    """Draws up to `length` tokens into [B,room] -> tokens, number that counts."""
    b = logits.shape[0]

    def going(carry):
        n, done = carry[0], carry[-1]
        return (n < length) & ~done.all()

    def draw(carry):
        n, state, logits, drawn, counts, done = carry
        token = sample(logits, jax.random.fold_in(key, n), how)
        done = done | (token[:, None] == stop[None]).any(1)  # [B,1] [1,stops]
        drawn = drawn.at[:, n].set(jnp.where(done, 0, token))
        counts = counts + ~done
        # a row that is done reads padding, which its state does not store
        alive = (~done).astype(jnp.int32)[:, None]
        state, logits = model.apply(params, token[:, None], state, segments=alive)
        return n + 1, state, logits[:, 0], drawn, counts, done

    drawn, counts = jnp.zeros((b, room), jnp.int32), jnp.zeros((b,), jnp.int32)
    start = jnp.int32(0), state, logits, drawn, counts, jnp.zeros((b,), bool)
    return jax.lax.while_loop(going, draw, start)[3:5]


def _check(model, prompts, length: int, how: Sampling, chunk: int) -> None:
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError("prompts: expected at least one, none of them empty")
    ids = np.concatenate([np.asarray(p) for p in prompts])
    if ids.min() < 0 or ids.max() >= model.vocab:
        raise ValueError(
            f"prompts hold token {ids.max()}: expected ids from 0 to {model.vocab - 1}"
        )
    if length < 1 or chunk < 1:
        raise ValueError(f"length={length}, chunk={chunk}: expected 1 or more")
    if how.temperature < 0:
        raise ValueError(f"temperature={how.temperature}: expected 0 or more")
    if how.top_k is not None and how.top_k < 1:
        raise ValueError(f"top_k={how.top_k}: expected 1 or more")
    if how.top_p is not None and not 0 < how.top_p <= 1:
        raise ValueError(f"top_p={how.top_p}: expected above 0 and at most 1")
