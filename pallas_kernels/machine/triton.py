"""Loads and stores of a Triton kernel: arrays are read where they lie,
[B,T,H,D], and what a tile has beyond the end of an array or of a head is not read.

Sizes of tiles are powers of two, so a head whose width is none is read in pieces, 192
as 128 and 64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.machine.product import F32
from pallas_kernels.tile import both


def power(n: int) -> int:
    """The least power of two that is not below n, at least 16: the smallest that the
    matrix units contract."""
    return max(1 << (n - 1).bit_length(), 16)


def load(at, inside, other):
    """A load of what is `inside`; all of it for None."""
    if inside is None:
        return triton.load(at)
    return triton.load(at, mask=inside, other=jnp.asarray(other, at.dtype))


def lanes(width: int, rows: int, inside):
    """`inside` [rows] and the lanes below `width`, as they broadcast; None for all."""
    found = None if inside is None else inside[:, None]
    if power(width) != width:
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, power(width)), 1)
        found = both(found, lane < width)  # lanes beyond the width
    return None if found is None else jnp.broadcast_to(found, (rows, power(width)))


def pieces(width: int) -> list[tuple[int, int]]:
    """First lane and size of the pieces of a head: powers of two from 16."""
    found, first = [], 0
    while width - first > 0:
        left = width - first
        size = power(left)
        # two pieces are worth it where they leave out a quarter of the lanes
        if size > 16 and power(left - size // 2) <= size // 4:
            size //= 2
        found.append((first, size))
        first += size
    return found


def zeros(rows: int, width: int) -> tuple[jax.Array, ...]:
    """Sums [rows,width] at their start, in pieces."""
    return tuple(jnp.zeros((rows, size), F32) for _, size in pieces(width))


def block(ref, b, start, size: int, h) -> tuple[jax.Array, ...]:
    """`size` tokens of a head of a [B,T,H,D] array in pieces, 0 beyond the end."""
    return tuple(load(at, inside, 0) for at, inside in _cuts(ref, b, start, size, h))


def write(ref, value, b, start, size: int, h) -> None:
    """The reverse of `block`."""
    for (at, inside), piece in zip(_cuts(ref, b, start, size, h), value):
        triton.store(at, piece.astype(ref.dtype), mask=inside)


def _cuts(ref, b, start, size: int, h):
    """Each piece of `size` tokens of a head, and what of it is inside."""
    inside = None
    if ref.shape[1] % size:
        inside = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0) < ref.shape[1]
    # a traced 0, since a slice that is known to pass the end is an error
    zero = start * 0
    for first, n in pieces(ref.shape[3]):
        at = ref.at[b, pl.ds(start, size), h, pl.ds(zero + first, n)]
        yield at, lanes(min(ref.shape[3] - first, n), size, inside)
