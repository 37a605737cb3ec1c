"""What the kernels of a linear memory are told of a chunk's tokens, and how it lies."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

F32 = jnp.float32
TILES = 16, 32, 64  # tokens that a chunk takes, those behind its own are empty
ROWS = 8  # rows of a chunk's numbers below its weights


class Numbers(NamedTuple):
    """Of N chunks of c tokens, float32, see `memory`; of c+1 the last one is the end.
    enter [B,H,N,c+1]: W, and carry [B,H,N,c+1]: S that the chunk begins with, in W_t;
    pair [B,H,N,c+1,c]: what token i wrote, in W_t; held [B,H,N]: S that the chunk
    begins with, and moved [B,H,N,c]: what token i wrote, in S at the end."""

    enter: Any
    carry: Any
    pair: Any
    held: Any
    moved: Any


class Own(NamedTuple):
    """The rows below a chunk's weights, as columns [c,1] or, of the last three, whose
    number stands in a row's first place, [1,1]: factors of W, S and what a token wrote
    for the tokens (enter, carry), for W at the end (end, keep, feed) and for S there
    (moved, held)."""

    enter: Any
    carry: Any
    end: Any
    moved: Any
    keep: Any
    feed: Any
    held: Any


def laid_out(numbers: Numbers, tile: int, chunks: int) -> jax.Array:
    """`numbers` as one array [B,H,N',R,tile], R = tile + ROWS: the weights of a chunk's
    tokens, a row each, and the fields of `Own`; tokens behind a chunk's own, and
    chunks that make N' a multiple of `chunks`, change nothing."""
    enter, carry, pair, held, moved = (a.astype(F32) for a in numbers)
    c, more = moved.shape[3], -moved.shape[2] % chunks

    def filled(a, value=0.0):
        """[B,H,N,...] -> [B,H,N',...]."""
        widths: Any = [(0, 0)] * a.ndim
        widths[2] = (0, more)
        return jnp.pad(a, widths, constant_values=value)

    def row(a):
        """[B,H,N',n] -> [B,H,N',tile]."""
        return jnp.pad(a, [(0, 0)] * 3 + [(0, tile - a.shape[3])])

    rows = [row(filled(a)) for a in (
        enter[..., :-1], carry[..., :-1], pair[..., -1, :], moved)]
    kept = (enter[..., -1], 1.0), (carry[..., -1], 0.0), (held, 1.0)
    rows += [row(filled(a, value)[..., None]) for a, value in kept]
    rows += [jnp.zeros_like(rows[0])] * (ROWS - len(rows))
    inner = [(0, 0)] * 3 + [(0, tile - c)] * 2
    weights = jnp.pad(filled(pair[..., :-1, :]), inner)
    return jnp.concatenate([weights, jnp.stack(rows, 3)], 3)
