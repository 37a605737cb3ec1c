"""Chunks of the linear memory's kernels on GPU: what a program reads of one and of W
and S, and where its results go.

Arrays are read where they lie, [B,T,H,X] and [B,H,N,D,V]; what a tile has beyond the
last token or channel, or behind a chunk's own tokens, is 0 and is not written.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.machine.triton import load, power
from pallas_kernels.memory.chunk import Own
from pallas_kernels.tile import both

PIECE = 64  # key channels at a time


class Program(NamedTuple):
    """Which columns of which head and row of the batch a program has; chunk: tokens, of
    the c that a tile has; part: its place among those that add to one array, rows of
    the batch of its results."""

    chunk: int
    c: int
    columns: int
    b: Any
    h: Any
    part: Any
    rows: int

    @property
    def first(self):
        """The first of its columns."""
        return self.part * self.columns

    @property
    def row(self):
        """Its row of arrays in which each part has its own."""
        return self.part * self.rows + self.b

    def tokens(self, ref, n, piece: int | None = None):
        """Tokens of chunk n of a [B,T,H,X] array, 0 beyond the end [c,size]: those of a
        piece of the key channels or, for None, the program's columns."""
        return read(self._at(ref, self.b, n, piece))

    def write(self, ref, value, row, n, piece: int | None = None) -> None:
        """The reverse of `tokens`, into a row of the batch."""
        at, inside = self._at(ref, row, n, piece)
        triton.store(at, value.astype(ref.dtype), mask=inside)

    def _at(self, ref, row, n, piece: int | None):
        width = ref.shape[3]
        size = self.columns if piece is None else piece_size(width)
        # a traced first: a slice that is known to pass the end is an error
        first = self.first if piece is None else self.b * 0 + piece * size
        inside, start = None, n * self.chunk
        if self.chunk < self.c or ref.shape[1] % self.c:
            token = jax.lax.broadcasted_iota(jnp.int32, (self.c, size), 0)
            inside = (start + token < ref.shape[1]) & (token < self.chunk)
        if width % size:
            lane = jax.lax.broadcasted_iota(jnp.int32, (self.c, size), 1)
            inside = both(inside, first + lane < width)
        return ref.at[row, pl.ds(start, self.c), self.h, pl.ds(first, size)], inside

    def state(self, ref, *lead) -> tuple:
        """The program's columns of an array [..,D,V] in pieces [size,columns], 0 beyond
        the end."""
        return tuple(self.piece(ref, n, *lead) for n in range(many_of(ref.shape[-2])))

    def piece(self, ref, piece: int, *lead):
        """One of them."""
        return read(self._state(ref, piece, lead))

    def put(self, ref, pieces, *lead) -> None:
        """The reverse of `state`."""
        for n, value in enumerate(pieces):
            at, inside = self._state(ref, n, lead)
            triton.store(at, value.astype(ref.dtype), mask=inside)

    def _state(self, ref, piece: int, lead):
        (d, width), inside = ref.shape[-2:], None
        shape = piece_size(d), self.columns
        firsts = self.b * 0 + piece * shape[0], self.first
        for axis, (first, size) in enumerate(zip(firsts, (d, width))):
            if size % shape[axis]:
                number = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
                inside = both(inside, first + number < size)
        cut = tuple(pl.ds(first, size) for first, size in zip(firsts, shape))
        return ref.at[(self.b, self.h, *lead, *cut)], inside

    def weights(self, side, n):
        """G of chunk n [c,c]."""
        return load(side.at[self.b, self.h, n, pl.ds(self.b * 0, self.c)], None, 0)

    def own(self, side, n) -> Own:
        """Its other numbers."""
        rows = [self.c + at for at in range(len(Own._fields))]
        columns = (load(side.at[self.b, self.h, n, self.b * 0 + at], None, 0)[:, None]
                   for at in rows[:4])
        return Own(*columns, *(side[self.b, self.h, n, at, 0] for at in rows[4:]))


def piece_size(d: int) -> int:
    """Key channels at a time."""
    return min(power(d), PIECE)


def many_of(d: int) -> int:
    """How many pieces there are."""
    return -(-d // piece_size(d))


def added(found):
    """The sum of some arrays."""
    return functools.reduce(jnp.add, found)


def read(where):
    """What is at a place and inside, 0 elsewhere."""
    at, inside = where
    return load(at, inside, 0)
