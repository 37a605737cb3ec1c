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

from models.sampling import BAD, Sampling, sample, whole

__all__ = ["Sampling", "bucket", "check_stream", "generate", "sample",
           "stream", "read", "write"]
LARGEST = 2**30  # tokens of a prompt or of what is drawn: positions are int32


def generate(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    *,
    length: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[int] = (),
    seed: int = 0,
    chunk: int = 512,
) -> list[list[int]]:
    """Up to `length` new tokens for each prompt, without the stop token that ends one.

    prompts: lists or arrays of token ids, of any lengths from 1, or one array [B,T].
    chunk: how many prompt tokens are read at once. ValueError for an empty prompt, an
    id outside the vocabulary, or logits that are not numbers.
    """
    how = Sampling(temperature, top_k, top_p, min_p).checked()
    length, chunk = _length("length", length), _length("chunk", chunk)
    rows = [ids_of(prompt, n, model.vocab) for n, prompt in enumerate(_rows(prompts))]
    longest, most = max(len(row) for row in rows), getattr(model, "learned", None)
    if most is not None and longest + length > most:
        raise ValueError(f"length={length} after a prompt of {longest} tokens: "
                         f"expected at most {most} together, the positions that the "
                         "model has")
    padded = bucket(longest)
    chunk = min(chunk, padded)
    padded = -(-padded // chunk) * chunk  # whole chunks: one program reads them all
    tokens = np.zeros((len(rows), padded), np.int32)
    segments = np.zeros_like(tokens)
    for n, row in enumerate(rows):
        # 0 behind: padding
        tokens[n, : len(row)], segments[n, : len(row)] = row, 1
    room = bucket(length)
    like = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
    state = model.init_state(padded + room, like)
    logits = jnp.zeros((len(rows), model.vocab), jnp.float32)
    for at in range(0, padded, chunk):
        piece = slice(at, at + chunk)
        if not segments[:, piece].any():
            break  # every prompt has ended
        state, logits = read(
            model, params, state, logits, tokens[:, piece], segments[:, piece]
        )
    key, ends = key_of(seed), jnp.asarray(stops(stop), jnp.int32)
    found = write(model, how, room, params, state, logits, key, ends, length)
    return new_tokens(found)


def new_tokens(found: Written) -> list[list[int]]:
    """What was drawn, a list a row; ValueError for logits that were no numbers."""
    drawn, counts = np.asarray(found.drawn), np.asarray(found.counts)
    for row, at in np.argwhere(drawn == BAD)[:1]:
        raise ValueError(f"the logits of prompt {row} have NaN or inf after {at} new "
                         "tokens: expected a model whose parameters are finite")
    return [row[:n].tolist() for row, n in zip(drawn, counts)]


@functools.partial(jax.jit, static_argnames=("model", "prompt"))
def stream(model: Any, params: Any, tokens: jax.Array, prompt: int) -> jax.Array:
    """The logits [B,T,vocab] of a text that comes as a stream: the first `prompt`
    tokens in one piece, the others one by one. tokens [B,T]."""
    state = model.init_state(tokens.shape[1], tokens[:, :prompt])
    state, first = model.apply(params, tokens[:, :prompt], state)

    def step(state, token):
        state, logits = model.apply(params, token[:, None], state)
        return state, logits[:, 0]

    _, rest = jax.lax.scan(step, state, tokens[:, prompt:].T)  # [T - prompt,B]
    # [B,prompt,vocab] and [B,T - prompt,vocab]
    return jnp.concatenate([first, rest.swapaxes(0, 1)], 1)


def check_stream(model: Any, length: int) -> None:
    """ValueError or NotImplementedError unless the model reads a text of `length`
    tokens as a stream, in which no token sees a later one. Nothing is computed."""
    tokens = jax.ShapeDtypeStruct((1, max(length, 2)), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    jax.eval_shape(functools.partial(stream, model, prompt=1), params, tokens=tokens)


def bucket(n: int, least: int = 16) -> int:
    """`n` rounded up to a power of two."""
    return max(least, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(model, params, state, logits, tokens, segments):
    """One chunk of the prompts [B,T] -> state, logits [B,vocab] after each row's last
    token so far. The state is used up: it is the one that comes back."""
    real = (segments > 0).sum(1)
    at = jnp.maximum(real - 1, 0)  # of each row's last token here
    state, new = model.apply(params, tokens, state, segments=segments, at=at)
    # rows that have ended keep theirs
    return state, jnp.where(real[:, None] > 0, new, logits)


class Written(NamedTuple):
    """state and logits [B,vocab] after the new tokens; drawn [B,room] int32 and how
    many of them count [B]; done [B]: a stop token came."""

    state: Any
    logits: jax.Array
    drawn: jax.Array
    counts: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def write(model, how, room, params, state, logits, key, stop, length) -> Written:
    """Draws up to `length` tokens, at most `room`, which is static. The state is used
    up: it is the one that comes back. stop [stops] int32; a token that stops a row is
    neither drawn nor read."""
    b = logits.shape[0]

    def going(carry):
        n, done = carry[0], carry[-1]
        return (n < length) & ~done.all()

    def draw(carry):
        n, state, logits, drawn, counts, done = carry
        token = sample(logits, jax.random.fold_in(key, n), how)
        bad = ~done & (token == BAD)
        done = done | bad | (token[:, None] == stop[None]).any(1)  # [B,1] [1,stops]
        drawn = drawn.at[:, n].set(jnp.where(bad, BAD, jnp.where(done, 0, token)))
        counts = counts + ~done
        # a row that is done reads padding, which its state does not store
        alive = (~done).astype(jnp.int32)[:, None]
        state, logits = model.apply(params, token[:, None], state, segments=alive)
        return n + 1, state, logits[:, 0], drawn, counts, done

    drawn, counts = jnp.zeros((b, room), jnp.int32), jnp.zeros((b,), jnp.int32)
    start = jnp.int32(0), state, logits, drawn, counts, jnp.zeros((b,), bool)
    return Written(*jax.lax.while_loop(going, draw, start)[1:])


def _rows(prompts: Any) -> list:
    """The prompts, one by one."""
    if isinstance(prompts, (str, bytes)) or not _sized(prompts):
        raise ValueError(f"prompts={prompts!r}: expected lists of token ids, such as "
                         "[[1, 2], [3]]")
    rows = list(prompts)
    if not rows or any(_sized(row) and len(row) == 0 for row in rows):
        raise ValueError("prompts: expected at least one, none of them empty")
    return rows


def _sized(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def ids_of(prompt: Any, n: int, vocab: int) -> np.ndarray:
    """The ids [T] of prompt number n."""
    wanted = "expected a list of token ids (text is encoded by its tokenizer)"
    if isinstance(prompt, (str, bytes)) or not _sized(prompt):
        raise ValueError(f"prompts[{n}]={prompt!r}: {wanted}")
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of other lengths inside
        raise ValueError(f"prompts[{n}] is no list of numbers: {wanted}") from None
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"prompts[{n}] of shape {ids.shape} and dtype {ids.dtype}: "
                         f"{wanted}")
    for token in ids[(ids < 0) | (ids >= vocab)][:1]:
        raise ValueError(
            f"prompts hold token {token}: expected ids from 0 to {vocab - 1}"
        )
    return ids


def _length(name: str, value: Any) -> int:
    size = whole(name, value)
    if not 1 <= size <= LARGEST:
        raise ValueError(f"{name}={size}: expected 1 or more, at most {LARGEST}")
    return size


def stops(stop: Any) -> list[int]:
    ids = [stop] if isinstance(stop, str) or not hasattr(stop, "__iter__") else stop
    return [whole("stop", token) for token in ids]


def key_of(seed: Any) -> jax.Array:
    value = whole("seed", seed)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed={value}: expected an integer of 64 bits")
    return jax.random.key(value)
