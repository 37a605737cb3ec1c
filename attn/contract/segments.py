"""Segments: where each token stands in a row of packed sequences.

A row may hold several sequences one after the other. `segments [B,T]` gives each token
the id of its sequence; 0 is padding. Padding has no position: the token after it goes
on where the token before it stopped, so that ragged prompts, padded on either side, are
followed by decoding without a gap.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TokenPositions(NamedTuple):
    """Where the tokens of one call stand.

    pos [B,T] int32: position inside the token's sequence, from 0.
    segment [B,T] int32: the segment index, which sequence of the row, rising along it;
        1 is the one that a state carries in from earlier calls, 0 is padding.
    next_pos [B] int32: the position that the next token of the row will have.
    last_segment [B] int32: the id of the row's last token; -1 before the first.
    """

    pos: jax.Array
    segment: jax.Array
    next_pos: jax.Array
    last_segment: jax.Array


def locate(
    segments: jax.Array | None,
    batch: int,
    length: int,
    next_pos: jax.Array | None = None,
    last_segment: jax.Array | None = None,
) -> TokenPositions:
    """Positions and segment indices of the next `length` tokens of `batch` rows.

    segments [B,T] int or None: ids, 0 for padding; None goes on with the same sequence.
    NotImplementedError for a pair of them: these tokens ask and answer in step.
    next_pos, last_segment [B]: of the state that these tokens follow; None for the
    start of a row. A token continues the sequence of the token before it if both have
    the same id.
    """
    if isinstance(segments, tuple):
        raise NotImplementedError(
            "a pair of segments: queries and keys are read in step, one array"
        )
    if next_pos is None:
        next_pos = jnp.zeros((batch,), jnp.int32)
    if last_segment is None:
        last_segment = jnp.full((batch,), -1, jnp.int32)
    if segments is not None:
        return _located(segments, batch, length, next_pos, last_segment)
    return TokenPositions(
        # [B,1] + [1,T]
        pos=next_pos[:, None] + jnp.arange(length, dtype=jnp.int32)[None],
        segment=jnp.ones((batch, length), jnp.int32),
        next_pos=next_pos + length,
        # without ids there is one sequence, of id 1
        last_segment=jnp.where(last_segment < 0, 1, last_segment),
    )


def _located(segments, batch, length, next_pos, last_segment) -> TokenPositions:
    if segments.shape != (batch, length):
        raise ValueError(
            f"segments has shape {segments.shape}: expected {(batch, length)}"
        )
    segments = segments.astype(jnp.int32)
    t = jnp.arange(length, dtype=jnp.int32)[None]
    real = segments > 0
    # the index of the last real token before each one, -1 if that is in the state
    seen = jax.lax.cummax(jnp.where(real, t, -1), axis=1)
    before = jnp.concatenate([jnp.full((batch, 1), -1, jnp.int32), seen], 1)
    # [B,1+T]
    ids = jnp.take_along_axis(segments, jnp.maximum(before, 0), 1).astype(jnp.int32)
    ids = jnp.where(before < 0, last_segment[:, None], ids)
    begins = real & (segments != ids[:, :-1])
    # time counts real tokens, so that padding stops the clock; it is 0 at the first
    # token of the call, and -next_pos at the first of the sequence that came in
    time = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # [B,T]
    carried = -next_pos[:, None]
    start = jax.lax.cummax(jnp.where(begins, time, carried), axis=1)
    start = jnp.maximum(start, carried)
    return TokenPositions(
        pos=jnp.where(real, time - start, 0),  # since the sequence began
        # rises with every sequence, and is 1 for the one that came in
        segment=jnp.where(real, start - carried + 1, 0),
        next_pos=time[:, -1] + 1 - start[:, -1],
        last_segment=ids[:, -1],
    )


def align_last(q_segment, kv_segment) -> jax.Array:
    """How much further on the queries of a pair of segments [B,T], [B,S] stand, [B,T],
    so that the last query of a sequence stands at its last key."""
    mine = count(kv_segment, q_segment)
    return jnp.where(q_segment > 0, mine - count(q_segment, q_segment), 0)


def count(keys: jax.Array, ids: jax.Array) -> jax.Array:
    """How often each of ids [B,T] stands in keys [B,S], in memory linear in T and S."""
    ordered = jnp.sort(keys, axis=1)

    def find(side: str) -> jax.Array:
        return jax.vmap(functools.partial(jnp.searchsorted, side=side))(ordered, ids)

    # equal ids stand side by side
    return (find("right") - find("left")).astype(jnp.int32)


def segment_indices(segments: Any, q: Any, ordered: bool = True) -> tuple[Any, Any]:
    """Segment indices [B,T] and [B,S] of queries like q [B,T,...] and of keys, None
    without segments. ordered: queries and keys are read in step, one array for both;
    without an order the ids of a pair are indices themselves."""
    if segments is None:
        return None, None
    if isinstance(segments, tuple) and not ordered:
        return tuple(a.astype(jnp.int32) for a in segments)
    index = locate(segments, q.shape[0], q.shape[1]).segment
    return index, index
