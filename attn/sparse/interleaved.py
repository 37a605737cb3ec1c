"""Interleaved: a text with a token of its own behind every so many tokens of it.

Where such tokens stand follows from the clock alone, so that a text may come in pieces:
one is due behind every `block` tokens of a sequence, whatever came in before.

Source: Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.contract.segments import locate


def interleave(
    tokens: jax.Array,
    segments: jax.Array | None = None,
    next_pos: jax.Array | None = None,
    last_segment: jax.Array | None = None,
    *,
    block: int,
    landmark: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A text with its landmarks -> tokens, segments [B,T+T//block+1], index [B,T].

    tokens [B,T] and segments as in `attn.contract.segments`; next_pos, last_segment
    [B]: the clock of the state that they follow, landmarks counted. A token with id
    `landmark` stands behind every `block` tokens of a sequence, what is left of the row
    is padding, and index says where each token of the text went.
    """
    b, t = tokens.shape
    length = t + t // block + 1
    # the clock counts landmarks, one in block + 1; a text does not
    text = None if next_pos is None else next_pos - next_pos // (block + 1)
    now = locate(segments, b, t, text, last_segment)
    if segments is None:
        before = jnp.ones((b,), jnp.int32)
        if last_segment is not None:
            before = jnp.maximum(last_segment, 1)
        segments = jnp.broadcast_to(before[:, None], (b, t))
    # the last token of a block, behind which its landmark stands
    closes = (now.segment > 0) & (now.pos % block == block - 1)
    # a token stands as much further on as blocks were closed before it
    index = jnp.arange(t)[None] + jnp.cumsum(closes, 1) - closes
    row = jnp.arange(b)[:, None]
    marks = jnp.where(closes, index + 1, length)  # length: no landmark, dropped
    empty = jnp.zeros((b, length), jnp.int32)

    def laid(text, of_mark):
        row_of = empty.at[row, index].set(text.astype(jnp.int32), mode="drop")
        return row_of.at[row, marks].set(of_mark, mode="drop")

    return laid(tokens, landmark), laid(segments, segments), index
