"""The arithmetic of one chunk of the delta rule: who decays how much against whom, and
the inverse of its triangular system. The same on TPU and GPU, on values in a kernel.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
BLOCK = 16  # rows of a triangular system that are solved one after the other
ROWS = 8  # numbers a token and head
F32 = jnp.float32


class Side(NamedTuple):
    """Numbers of a chunk's tokens, as rows [1,CHUNK] or columns [CHUNK,1].

    beta; coarse + fine: the log decay since the chunk began; segment: 0 for padding;
    enter: the factor that the state the chunk begins with has at the token; leave: the
    factor that the token has in the state the chunk ends with; keep: the factor
    between the two states, in the first place of a row.
    """

    beta: Any
    coarse: Any
    fine: Any
    segment: Any
    enter: Any
    leave: Any
    keep: Any


def grid(c: int = CHUNK) -> tuple[jax.Array, jax.Array]:
    """Numbers of row and column [c,c]."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (c, c), n) for n in (0, 1))
    return i, j


def decays(own: Side, row: Side, gated: bool) -> jax.Array:
    """What token j (a column) still counts at token i (a row): exp of the log decay
    between them where j <= i and both are of one segment, else 0."""
    i, j = grid()
    seen = (i >= j) & (own.segment == row.segment) & (own.segment > 0)  # [CHUNK,CHUNK]
    if not gated:
        return jnp.where(seen, 1.0, 0.0)
    # coarse sums are multiples of 1/256, whose difference is exact
    between = (own.coarse - row.coarse) + (own.fine - row.fine)
    # masked before exp, too: for j > i the exponent is positive and may overflow
    return jnp.where(seen, jnp.exp(jnp.where(seen, between, 0.0)), 0.0)


def strict(a: jax.Array) -> jax.Array:
    """`a` below its diagonal."""
    i, j = grid()
    return jnp.where(i > j, a, 0.0)


def merged(xs: list, systems: list, dot: Callable, block: int = BLOCK) -> list:
    """(I + a)^-1 of each system a [CHUNK,CHUNK] from x, the inverses of its blocks on
    the diagonal: two blocks and the corner E below them are one, with corner -x E x."""
    (i, j), size = grid(), block.bit_length() - 1
    while 1 << size < CHUNK:
        # corners E: rows of an odd block, columns of the even one before it
        below = ((i >> size) == (j >> size) + 1) & (((i >> size) & 1) == 1)
        corners = [jnp.where(below, a, 0.0) for a in systems]
        # -x E x, the corner below two inverted blocks: [CHUNK,CHUNK] each
        corners = [dot(corner, x) for corner, x in zip(corners, xs)]  # E x
        xs = [x - dot(x, corner) for corner, x in zip(corners, xs)]  # x - x E x
        size += 1
    return xs


def halved(dot: Callable) -> Callable:
    """`dot` of float32 matrices by their first 16 bits, on units that multiply
    bfloat16: three products of parts."""
    def product(a, b):
        (a, a_rest), (b, b_rest) = _halves(a), _halves(b)
        # all but the product of both rests
        return dot(a, b) + (dot(a, b_rest) + dot(a_rest, b))

    return product


def _halves(a):
    high = a.astype(jnp.bfloat16)  # its first 8 bits
    return high, (a - high.astype(F32)).astype(jnp.bfloat16)
