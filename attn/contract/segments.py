"""Segments: where each token stands in a row of packed sequences.

A row may hold several sequences one after the other. `segments [B,T]` gives each token
the id of its sequence; 0 is padding. Padding has no position: the token after it goes
on where the token before it stopped, so that ragged prompts, padded on either side, are
followed by decoding without a gap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Place(NamedTuple):
    """Where the tokens of one call stand.

    pos [B,T] int32: position inside the token's sequence, from 0.
    run [B,T] int32: which sequence, numbered along the row; 1 is the one that a state
        carries in from earlier calls, 0 is padding.
    end [B] int32: the position that the next token of the row will have.
    last [B] int32: the segment id of the row's last token; -1 before the first.
    """

    pos: jax.Array
    run: jax.Array
    end: jax.Array
    last: jax.Array


def place(
    segments: jax.Array | None,
    batch: int,
    length: int,
    end: jax.Array | None = None,
    last: jax.Array | None = None,
) -> Place:
    """Positions and runs of the next `length` tokens of `batch` rows.

    segments [B,T] int or None: ids, 0 for padding; None goes on with the same sequence.
    NotImplementedError for a pair of them: these tokens ask and answer in step.
    end, last [B]: of the state that these tokens follow; None for the start of a row.
    A token continues the sequence of the token before it if both have the same id.
    """
    if isinstance(segments, tuple):
        raise NotImplementedError(
            "a pair of segments: queries and keys are read in step, one array"
        )
    end = jnp.zeros((batch,), jnp.int32) if end is None else end
    last = jnp.full((batch,), -1, jnp.int32) if last is None else last
    t = jnp.arange(length, dtype=jnp.int32)[None]
    if segments is None:
        run = jnp.ones((batch, length), jnp.int32)
        fresh = jnp.where(last < 0, 1, last)
        return Place(end[:, None] + t, run, end + length, fresh)
    if segments.shape != (batch, length):
        raise ValueError(
            f"segments has shape {segments.shape}: expected {(batch, length)}"
        )
    segments = segments.astype(jnp.int32)
    real = segments > 0
    # the index of the last real token before each one, -1 if that is in the state
    seen = jax.lax.cummax(jnp.where(real, t, -1), axis=1)
    before = jnp.concatenate([jnp.full((batch, 1), -1, jnp.int32), seen], 1)
    ids = jnp.take_along_axis(segments, jnp.maximum(before, 0), 1).astype(jnp.int32)
    ids = jnp.where(before < 0, last[:, None], ids)
    begins = real & (segments != ids[:, :-1])
    # time counts real tokens, so that padding stops the clock
    time = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    none = -end[:, None]
    start = jax.lax.cummax(jnp.where(begins, time, none), axis=1)
    start = jnp.maximum(start, none)
    run = jnp.where(real, start - none + 1, 0)
    pos = jnp.where(real, time - start, 0)
    after = time[:, -1] + 1 - start[:, -1]
    return Place(pos, run, after, ids[:, -1])


def runs(segments: Any, q: Any, ordered: bool = True) -> tuple[Any, Any]:
    """Runs [B,T] and [B,S] of queries like q [B,T,...] and of keys, None without
    segments. ordered: queries and keys are read in step, one array for both; without
    an order the ids of a pair are runs themselves."""
    if segments is None:
        return None, None
    if isinstance(segments, tuple) and not ordered:
        return tuple(a.astype(jnp.int32) for a in segments)
    run = place(segments, q.shape[0], q.shape[1]).run
    return run, run
