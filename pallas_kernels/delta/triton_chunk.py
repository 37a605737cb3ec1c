"""Chunks of the delta rule's kernels on GPU: what a program reads of one and of the
states, and the products of a chunk's tokens with each other.

Arrays are read where they lie, [B,T,H,X] and [B,H,N,D,V]; what a tile has beyond the
last token or channel is 0 and is not written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.delta.chunk import CHUNK, Side
from pallas_kernels.machine.product import F32, NT, dot
from pallas_kernels.machine.triton import load, power
from pallas_kernels.tile import both


class ChunkContext(NamedTuple):
    """Of which head and row of the batch a program reads chunk n."""

    static: Any
    b: Any
    h: Any
    heads: int

    def at(self, ref, n, first, size: int):
        """Where the chunk's tokens are, lanes first to first + size, of an array
        [B,T,.,X]; and what of it is inside."""
        serves, width = self.heads // ref.shape[2], ref.shape[3]
        inside = None
        token = n * CHUNK
        if ref.shape[1] % CHUNK:
            number = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, size), 0)
            inside = token + number < ref.shape[1]
        if width % size:
            lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, size), 1)
            inside = both(inside, first + lane < width)
        # a traced 0, since a slice that is known to pass the end is an error
        cut = pl.ds(self.b * 0 + first, size)
        return ref.at[self.b, pl.ds(token, CHUNK), self.h // serves, cut], inside

    def tokens(self, ref, n, first=0, size: int | None = None):
        """The chunk's tokens [CHUNK,size], 0 beyond the end; all lanes without size."""
        return read(self.at(ref, n, first, size or power(ref.shape[3])))

    def write(self, ref, value, n, first=0) -> None:
        """The reverse of `tokens`."""
        at, inside = self.at(ref, n, first, value.shape[1])
        triton.store(at, value.astype(ref.dtype), mask=inside)

    def column(self, side, n, field: str):
        """One of the numbers of the chunk's tokens [CHUNK]."""
        # a traced number: the interpreter takes no other next to slices
        at = self.b * 0 + Side._fields.index(field)
        return load(side.at[self.b, self.h, n, at], None, 0)

    def columns(self, side, n, *fields: str):
        """Some of these numbers, as columns [CHUNK,1]."""
        return tuple(self.column(side, n, field)[:, None] for field in fields)

    def sides(self, side, n) -> tuple[Side, Side]:
        """All of these numbers, as columns and as rows."""
        found = Side(*(self.column(side, n, field) for field in Side._fields))
        return Side(*(a[:, None] for a in found)), Side(*(a[None] for a in found))

    def keep(self, side, n):
        """The factor between two states."""
        return side[self.b, self.h, n, Side._fields.index("keep"), 0]

    def pairs(self, n, rows: int, k_ref, *refs):
        """The products of the chunk's tokens in each of `refs` with its keys
        [CHUNK,CHUNK], over `rows` key channels at a time."""
        def step(i, found):
            def part(ref):
                return self.tokens(ref, n, i * rows, rows)

            k = part(k_ref)  # [CHUNK,rows]
            # keys by keys are read once
            others = (k if ref is k_ref else part(ref) for ref in refs)
            return tuple(a + dot(x, k, NT) for a, x in zip(found, others))  # x k^T

        zeros = tuple(jnp.zeros((CHUNK, CHUNK), F32) for _ in refs)
        return for_each_part(k_ref.shape[3], rows, step, zeros)


def for_each_part(width: int, size: int, step, carry):
    """step(i, carry) for each part of `size` channels."""
    many = -(-width // size)
    return step(0, carry) if many == 1 else jax.lax.fori_loop(0, many, step, carry)


def read(where):
    """What is at a place and inside, 0 elsewhere."""
    at, inside = where
    return load(at, inside, 0)


def part(ref, lead, top, rows: int, first, columns: int):
    """Where a tile [rows,columns] of a state [..,D,V] is, and what of it is inside."""
    inside = None
    for axis, (start, size) in enumerate(((top, rows), (first, columns))):
        width = ref.shape[len(ref.shape) - 2 + axis]
        if width % size:
            number = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis)
            inside = both(inside, start + number < width)
    zero = lead[0] * 0  # see `at`
    return ref.at[*lead, pl.ds(zero + top, rows), pl.ds(zero + first, columns)], inside


def put(ref, lead, first, value) -> None:
    """Writes columns of a state, all of their rows."""
    at, inside = part(ref, lead, 0, value.shape[0], first, value.shape[1])
    triton.store(at, value.astype(ref.dtype), mask=inside)
