"""What the kernels of a linear memory are told of a chunk's tokens, and how it lies."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

F32 = jnp.float32
CHUNKS = 16, 32, 64  # tokens of a chunk that kernels are there for
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


def laid_out(numbers: Numbers, chunks: int) -> jax.Array:
    """`numbers` as one array [B,H,N',c+ROWS,c]: the weights of the tokens, a row each,
    and the fields of `Own`; N' is a multiple of `chunks`, with chunks that change
    nothing."""
    enter, carry, pair, held, moved = (a.astype(F32) for a in numbers)
    c, more = moved.shape[3], -moved.shape[2] % chunks

    def first(a):
        """[B,H,N] -> [B,H,N,c], in the first place."""
        return jnp.pad(a[..., None], [(0, 0)] * 3 + [(0, c - 1)])

    def filled(a, value=0.0):
        return jnp.pad(a, [(0, 0), (0, 0), (0, more), (0, 0)], constant_values=value)

    kept = [jnp.pad(a, [(0, 0), (0, 0), (0, more)], constant_values=value)
            for a, value in ((enter[..., -1], 1.0), (carry[..., -1], 0.0), (held, 1.0))]
    rows = [filled(a) for a in (
        enter[..., :-1], carry[..., :-1], pair[..., -1, :], moved)]
    rows += map(first, kept)
    rows += [jnp.zeros_like(rows[0])] * (ROWS - len(rows))
    weights = jnp.pad(
        pair[..., :-1, :], [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)])
    return jnp.concatenate([weights, jnp.stack(rows, 3)], 3)
