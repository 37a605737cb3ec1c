"""Tiles of a flash kernel on GPU by Triton: the tiles each program passes over, what is
loaded of each array, and what the elements of a tile are.

Arrays are read where they lie, [B,T,H,D]; what a tile has beyond the end of an array or
of a head is not read. Sizes of tiles are powers of two, so a head whose width is none
is read in pieces, 192 as 128 and 64: tiles of q, k, v and do are tuples of pieces.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.machine.product import F32, NT, dot
from pallas_kernels.machine.triton import block, load
from pallas_kernels.schedule import FULL, MASKED, Tiling
from pallas_kernels.tile import LOW, NEVER, TileSpec, both, dropout_keep


class Arrays(NamedTuple):
    """What a kernel reads; None for what the call does not use.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; heads [H]: global head numbers; bias
    [B|1,H|1,T|1,S|1]; keep [B,H,T,S] int8; q_pos [B,T], kv_pos [B,S,K|1]; q_segment
    [B|1,T], kv_segment [B|1,S]; sink [H] float32; seed: two int32 words, batch [B]; and
    backward do [B,T,H,V], lse and delta [B,H,T]. sink and lse are in the unit of
    logits.
    """

    q: Any
    k: Any
    v: Any
    heads: Any
    bias: Any = None
    keep: Any = None
    q_pos: Any = None
    kv_pos: Any = None
    q_segment: Any = None
    kv_segment: Any = None
    sink: Any = None
    seed: Any = None
    batch: Any = None
    do: Any = None
    lse: Any = None
    delta: Any = None


class Line(NamedTuple):
    """Which tiles of the inner axis a program passes over, for each tile of the outer.

    count [B|1,N]: how many; where: the first [B|1,N] of neighbours, or all [B|1,N,n].
    """

    count: Any
    where: Any


class Call(NamedTuple):
    """What is static: the form, the tiles, warps and stages."""

    form: TileSpec
    tiling: Tiling
    groups: int
    warps: int
    stages: int
    interpret: Any


def lines(static: np.ndarray, ask: jax.Array | None) -> tuple[Line | None, Line | None]:
    """Per row of `static` [N,M] the tiles to take whole and those to mask, where `ask`
    [B,N,M] says at run time what is asked of each; None where there is no such tile."""
    if ask is None:
        return _fixed(static == FULL), _fixed(static == MASKED)

    def count(kind):
        return (ask == kind).sum(-1, dtype=jnp.int32)  # [B,N]

    def order(kind):
        return jnp.argsort(ask != kind, axis=-1, stable=True)  # [B,N,M]

    def line(kind):
        return Line(count(kind), order(kind).astype(jnp.int32))

    return line(FULL), line(MASKED)


def _fixed(wanted: np.ndarray) -> Line | None:
    count = wanted.sum(1, dtype=np.int32)
    most = int(count.max())  # the longest line
    if not most:
        return None
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :most].astype(np.int32)
    some = np.arange(most)[None] < count[:, None]  # [N,most]
    # where a line's tiles are neighbours, the number of the first is enough
    if (~some | (order == order[:, :1] + np.arange(most))).all():
        order = order[:, 0]
    return Line(jnp.asarray(count[None]), jnp.asarray(order[None]))


def for_each_tile(seen, b, n, body: Callable, carry):
    """body(tile, masked, carry) for each tile of line `n`."""
    for line, masked in zip(seen, (False, True)):
        if line is None:
            continue
        row = b if line.count.shape[0] > 1 else 0
        near = len(line.where.shape) == 2
        first = line.where[row, n] if near else None  # read once, before the loop

        def step(i, carry, masked=masked, first=first, line=line, row=row):
            at = line.where[row, n, i] if first is None else first + i
            return body(at, masked, carry)

        carry = jax.lax.fori_loop(0, line.count[row, n], step, carry)
    return carry


class TileContext:
    """One head of one row of the batch. Tiles of logits lie as [queries, keys], or,
    `turned`, as [keys, queries]."""

    def __init__(self, call: Call, x: Arrays, b, h, turned: bool = False):
        self.call, self.x, self.b, self.h, self.turned = call, x, b, h, turned
        self.kv = h // call.groups  # grouped heads share keys
        self.head = x.heads[h]

    def along(self, a, keys: bool):
        """A vector of queries or of keys, as it broadcasts against a tile."""
        return a[None, :] if keys != self.turned else a[:, None]

    def product(self, a, b):
        """Products of queries `a` and keys `b` over their width, a tile of logits."""
        pairs = zip(b, a) if self.turned else zip(a, b)  # s^T = k q^T, or s = q k^T
        # q k^T: [rows,D] by [columns,D] is [rows,columns], a piece of D at a time
        parts = [dot(*pair, NT) for pair in pairs]
        return functools.reduce(jnp.add, parts)

    def numbers(self, tile, keys: bool):
        """Numbers of a tile's queries or keys."""
        t = self.call.tiling
        size = t.columns if keys else t.rows
        return tile * size + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)

    def queries(self, ref, tile):
        """A tile of q or do, pieces [rows,width]."""
        return block(ref, self.b, tile * self.call.tiling.rows, self.call.tiling.rows,
                     self.h)

    def keys(self, ref, tile):
        """A tile of k or v, pieces [columns,width]."""
        size = self.call.tiling.columns
        return block(ref, self.b, tile * size, size, self.kv)

    def vector(self, ref, tile, keys: bool, other, *after):
        """Entries of a [B|1,T] array, or of [B,S,K|1] with the head `after`."""
        t = self.call.tiling
        size, end = (t.columns, t.s) if keys else (t.rows, t.t)
        row = self.b if ref.shape[0] > 1 else self.b * 0  # a traced 0: see `matrix`
        at = ref.at[(row, pl.ds(tile * size, size), *after)]  # [size]
        inside = self.numbers(tile, keys) < end if end % size else None
        return load(at, inside, other)

    def row(self, ref, tile, other):
        """Entries [rows] of a [B,H,T] array."""
        t = self.call.tiling
        at = ref.at[self.b, self.h, pl.ds(tile * t.rows, t.rows)]  # [rows]
        inside = self.numbers(tile, False) < t.t if t.t % t.rows else None
        return load(at, inside, other)

    def matrix(self, ref, row, column, other):
        """The part of a [B|1,H|1,T|1,S|1] array that lies on a tile."""
        t = self.call.tiling
        # a traced 0: the interpreter takes no other next to slices
        b, h = (i * 0 if n == 1 else i for n, i in zip(ref.shape, (self.b, self.h)))
        inside, cuts = None, []
        for axis, tile, size in ((2, row, t.rows), (3, column, t.columns)):
            if ref.shape[axis] == 1:
                cuts.append(pl.ds(0, 1))
                continue
            cuts.append(pl.ds(tile * size, size))
            if ref.shape[axis] % size:
                near = self.numbers(tile, axis == 3) < ref.shape[axis]
                inside = both(inside, near[None] if axis == 3 else near[:, None])
        at = ref.at[b, h, *cuts]  # [rows|1,columns|1]
        if inside is not None:
            inside = jnp.broadcast_to(inside, at.shape)
        found = load(at, inside, other)
        return found.T if self.turned else found  # as logits lie

    def logits(self, q, k, row, column, masked: bool):
        """Logits times their unit of a tile, NEVER where hidden, and their slope."""
        x, t, form = self.x, self.call.tiling, self.call.form
        raw = self.product(q, k)  # [rows,columns], or turned
        i, j = self.positions(row, column)  # [rows,1], [1,columns], or turned
        bias = None if x.bias is None else self.matrix(x.bias, row, column, 0)
        s, slope = form.logits(raw, self.head, i, j, bias)
        if not masked:
            return s, slope
        seen = None if form.mask is None else form.mask(self.head, i, j)
        if t.offset is None:
            seen = both(seen, j >= 0)  # -1: an empty slot
        if x.q_segment is not None:
            mine = self.along(self.vector(x.q_segment, row, False, 0), False)
            segment = self.along(self.vector(x.kv_segment, column, True, 0), True)
            seen = both(seen, (mine == segment) & (segment > 0))  # segment 0 is padding
        if t.s % t.columns:
            # the tail of the last tile is nobody's key
            seen = both(seen, self.along(self.numbers(column, True), True) < t.s)
        # masked last, after scale, cap and bias: 2^(NEVER - m) is 0 and no nan
        return (s if seen is None else jnp.where(seen, s, NEVER)), slope

    def positions(self, row, column):
        """Query and key positions of a tile, as they broadcast against it."""
        t, x = self.call.tiling, self.x
        if t.offset is None:
            head = self.kv * 0 if x.kv_pos.shape[2] == 1 else self.kv
            i = self.vector(x.q_pos, row, False, 0)
            j = self.vector(x.kv_pos, column, True, -1, head)
        else:
            i, j = self.numbers(row, False) + t.offset, self.numbers(column, True)
        return self.along(i, False), self.along(j, True)

    def drop(self, row, column):
        """What dropout multiplies the weights of a tile with; None for nothing."""
        rate, x = self.call.form.dropout, self.x
        if x.keep is not None:
            # what stays is scaled up, so that the mean of a weight is what it was
            return self.matrix(x.keep, row, column, 0).astype(F32) / (1 - rate)
        if not rate:
            return None
        seed = [x.seed[n].astype(jnp.uint32) for n in range(2)]
        i = self.along(self.numbers(row, False), False)
        j = self.along(self.numbers(column, True), True)
        stay = dropout_keep(rate, seed, x.batch[self.b], self.head, i, j)
        return jnp.where(stay, 1 / (1 - rate), 0.0)

    def recompute(self, q, k, v, do, row, column, masked: bool):
        """Dropped p, d(bias) and d(scale q.k) of a tile, made again from lse."""
        s, slope = self.logits(q, k, row, column, masked)

        def of(ref, other):
            return self.along(self.row(ref, row, other), False)

        # queries beyond the end get weights 2^(s + LOW) = 0
        # P = exp(S - L), dP = dO V^T, dS = P (dP - D): Dao, 2023, algorithm 2
        p = self.call.form.recompute(s, of(self.x.lse, -LOW))
        # do v^T, [rows,columns] as the logits
        dp = self.product(do, v)
        drop = self.drop(row, column)
        # O = (P drop) V, so dP = drop (dO V^T)
        dropped, dp = (p, dp) if drop is None else (p * drop, dp * drop)
        ds = p * (dp - of(self.x.delta, 0.0))
        # d(bias) is dS; d(scale q.k) lies before the cap, whose slope it takes
        return dropped, ds, (ds if slope is None else ds * slope)


def launch(call: Call, kernel, grid, x: Arrays, more, out_shape, name: str):
    """pallas_call on whole arrays: kernel(call, x, more, *outs)."""
    return pl.pallas_call(
        lambda x, more, *outs: kernel(call, x, more, *outs),
        grid=grid, out_shape=out_shape, interpret=call.interpret, name=name,
        compiler_params=triton.CompilerParams(
            num_warps=call.warps, num_stages=call.stages),
    )(x, more)
