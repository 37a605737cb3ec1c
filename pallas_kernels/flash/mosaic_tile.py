"""Tiles of a flash kernel by Mosaic GPU: the tiles that each block passes over, how
they are loaded, and what the elements of a tile are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.mosaic_scratch import ForwardScratch, QueryScratch
from pallas_kernels.machine.hopper import TILE, cast, drain, launch, spread, vector
from pallas_kernels.schedule import FULL, SKIP, Side, Tiling
from pallas_kernels.tile import LOG2E, NEVER, TileSpec, both, sink_logit


class Line(NamedTuple):
    """Which tiles of the inner axis a block passes over, for each tile of the outer.

    whole [B|1,N]: how many need no mask, count [B|1,N]: how many in all, at least one;
    where [B|1,N,n]: which, those without a mask first. A line that sees nothing holds
    one tile, in which the mask hides every element.
    """

    whole: Any
    count: Any
    where: Any

    def of(self, b, tile):
        """at(n): the n-th tile of a line; and how many need no mask, and are in all."""
        row = b if self.count.shape[0] > 1 else 0

        def at(n):
            return self.where[row, tile, n]

        return at, (self.whole[row, tile], self.count[row, tile])


class Call(NamedTuple):
    """What is static: the form, the tiles, query heads of a key head, warpgroups that
    compute, stages of the rings, how a tile lies over a warpgroup's registers, and
    candidates (`pallas_kernels/candidates.py`)."""

    form: TileSpec
    tiling: Tiling
    groups: int
    warpgroups: int
    stages: tuple[int, ...]
    interpret: bool
    layout: Any = TILE
    variant: tuple[str, ...] = ()

    def slot(self, n, ring: int = 0):
        """The place of the n-th tile that a ring takes."""
        return jax.lax.rem(n, jnp.int32(self.stages[ring]))

    @property
    def plain(self) -> bool:
        """Whether a logit is a positive multiple of q.k: then maxima are taken first,
        and scale and maximum enter 2^x by one multiply-add."""
        f = self.form
        return f.softcap is None and f.score is None and f.scale > 0


class Arrays(NamedTuple):
    """What a kernel reads; None for what the call does not use.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; heads [H]: global head numbers; q_pos [B,T'],
    kv_pos [B,K|1,S'], q_segment [B|1,T'], kv_segment [B|1,S'], T' and S' whole tiles;
    sink [H] float32 times log2 e; and backward do [B,T,H,V], lse (times log2 e), delta
    [B,H,T'].
    """

    q: Any
    k: Any
    v: Any
    heads: Any
    q_pos: Any = None
    kv_pos: Any = None
    q_segment: Any = None
    kv_segment: Any = None
    sink: Any = None
    do: Any = None
    lse: Any = None
    delta: Any = None


def line(table: np.ndarray, ask: jax.Array | None) -> Line:
    """The tiles that each row of `table` [N,M], or of `ask` [B,N,M], asks for."""
    xp: Any = np if ask is None else jnp
    asked = table[None] if ask is None else ask
    # whole tiles first, behind them those to mask, skipped ones last
    rank = xp.where(asked == SKIP, 2, xp.where(asked == FULL, 0, 1))
    wanted = (rank < 2).sum(-1)
    # a fixed list is as long as its longest line, a traced one may hold all tiles
    most = max(int(wanted.max()), 1) if ask is None else asked.shape[-1]
    where = xp.argsort(rank, axis=-1, stable=True)[..., :most]
    counts = (rank == 0).sum(-1), xp.maximum(wanted, 1), where
    return Line(*(jnp.asarray(a, jnp.int32) for a in counts))


def tokens(a, size: int, axis: int = 1, value=0):
    """a with whole tiles of tokens."""
    lack = -a.shape[axis] % size
    if not lack:
        return a
    pads = [(0, lack if n == axis else 0) for n in range(a.ndim)]
    return jnp.pad(a, pads, constant_values=value)


def arrays(call: Call, side: Side, q, k, v, sink, do=None) -> Arrays:
    """A call's arrays as a kernel reads them."""
    t = call.tiling

    def tile(a, size):
        # copies to swizzled memory take 8 tokens at a time
        a = tokens(tokens(a, 64, 3), 8)
        # a copy beyond the end reads 0, but an interpreted one is an error
        return tokens(a, size) if call.interpret or a.shape[1] < size else a

    def vector(a, size, axis=1):
        return None if a is None else tokens(a.astype(jnp.int32), size, axis, -1)

    kv_pos = None if side.kv_pos is None else side.kv_pos.swapaxes(1, 2)
    return Arrays(
        tile(q, t.rows), tile(k, t.columns), tile(v, t.columns),
        side.head.astype(jnp.int32), vector(side.q_pos, t.rows),
        vector(kv_pos, t.columns, 2), vector(side.q_segment, t.rows),
        vector(side.kv_segment, t.columns),
        None if sink is None else sink_logit(sink, LOG2E),
        None if do is None else tile(do, t.rows),
    )


class TileContext:
    """One head of one row of the batch. Tiles of logits lie as [queries, keys], or,
    `turned`, as [keys, queries]."""

    def __init__(self, call: Call, x: Arrays, b, h, turned: bool = False):
        self.call, self.x, self.b, self.h, self.turned = call, x, b, h, turned
        self.kv = jax.lax.div(h, jnp.int32(call.groups))
        self.head = x.heads[h]

    def places(self, first_row, first_key, shape):
        """Query and key positions of a tile [shape]."""
        x, t = self.x, self.call.tiling
        if t.offset is None:
            head = self.kv if x.kv_pos.shape[1] > 1 else 0
            i = self._vector(x.q_pos, (self.b,), first_row, shape, False)
            j = self._vector(x.kv_pos, (self.b, head), first_key, shape, True)
            return i, j
        rows, keys = (1, 0) if self.turned else (0, 1)
        i, j = self._count(shape, rows), self._count(shape, keys)
        return i + (first_row + t.offset), j + first_key

    def _count(self, shape, axis: int):
        number = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return cast(number, self.call.layout, self.call.interpret)

    def _vector(self, ref, before, first, shape, keys: bool):
        columns = keys != self.turned
        at = (*before, pl.ds(first, shape[1 if columns else 0]))
        found = vector(ref.at[at], columns, self.call.interpret, self.call.layout)
        return spread(found, shape, columns)

    def logits(self, raw, first_row, first_key, masked: bool):
        """Logits of a tile, NEVER where hidden, their unit, and their slope.

        A logit times log2(e) is the first times the unit, which is 1 unless `plain`.
        masked may be traced, where no product is under way: a branch."""
        if not isinstance(masked, bool):
            return self._branched(raw, first_row, first_key, masked)
        call = self.call
        i = j = slope = None
        # places take registers: only where somebody asks for them
        if call.form.score is not None or masked:
            i, j = self.places(first_row, first_key, raw.shape)
        unit = 1.0
        if call.plain:
            unit = call.form.scale * LOG2E  # left to `weights`: one multiply-add
        else:
            raw, slope = call.form.logits(raw, self.head, i, j, None, LOG2E)
        if masked:
            seen = self.seen(i, j, first_row, first_key, raw.shape)
            raw = raw if seen is None else jnp.where(seen, raw, NEVER)
        return raw, unit, slope

    def _branched(self, raw, first_row, first_key, masked):
        def way(masked):
            s, _, slope = self.logits(raw, first_row, first_key, masked)
            return s, slope

        s, slope = jax.lax.cond(masked, lambda: way(True), lambda: way(False))
        return s, self.call.form.scale * LOG2E if self.call.plain else 1.0, slope

    def seen(self, i, j, first_row, first_key, shape):
        """Who sees whom in a tile, None for everyone."""
        x, t, form = self.x, self.call.tiling, self.call.form
        seen = None if form.mask is None else form.mask(self.head, i, j)
        if t.offset is None:
            seen = both(seen, j >= 0)  # -1: an empty slot
        if x.q_segment is not None:
            def row(ref):
                return self.b if ref.shape[0] > 1 else 0,

            mine = self._vector(x.q_segment, row(x.q_segment), first_row, shape, False)
            other = self._vector(
                x.kv_segment, row(x.kv_segment), first_key, shape, True)
            seen = both(both(seen, mine == other), other > 0)  # segment 0 is padding
        if t.s % t.columns:
            number = self._count(shape, int(not self.turned))
            seen = both(seen, number + first_key < t.s)  # the tail is nobody's key
        return seen


def fetch_keys(ctx: TileContext, at, count,
               own: ForwardScratch | QueryScratch) -> None:
    """The warpgroup that loads: `count` tiles of k and v, at(n) the n-th, as room in
    the rings comes free."""
    size = ctx.call.tiling.columns
    rings, free = (own.k_ring, own.v_ring), (own.k_free, own.v_free)
    there = own.k_there, own.v_there
    stages = [jnp.int32(ring.shape[0]) for ring in rings]

    def load(n, carry):
        place = ctx.b, pl.ds(at(n) * size, size), ctx.kv
        for ref, ring, full, room, many in zip(
                (ctx.x.k, ctx.x.v), rings, there, free, stages):
            slot = jax.lax.rem(n, many)

            # until the tile that lies there has been used
            @pl.when(n >= many)
            def _():
                plgpu.barrier_wait(room.at[slot])
            plgpu.copy_gmem_to_smem(ref.at[place], ring.at[slot], full.at[slot])
        return carry

    jax.lax.fori_loop(0, count, load, None)
    for room, many in zip(free, stages):
        drain(room, many, count)


def weights(s, unit, base, columns: bool):
    """2^(s unit - base), base along the rows or the columns."""
    shift = spread(base, s.shape, columns)
    # a unit that is not 1 and the shift are one multiply-add. No logit is above base,
    # but by an error of rounding, with which 2^x of large ones would be infinite
    return jnp.exp2(jnp.minimum(s * unit - shift if unit != 1.0 else s - shift, 0.0))


def first_logit(sink, m, total):
    """m and total [rows] of a sink, a logit without value; -inf is none."""
    some = jnp.where(sink > NEVER, 1.0, 0.0)
    return jnp.maximum(m, sink), total + some


def online(s, unit, m, total):
    """A step of the online softmax: p, and the new maximum, sum, and by how much what
    was there fades. s [rows,keys]; m times log2(e) and total [rows]."""
    top = jnp.maximum(m, s.max(1) * unit if unit != 1.0 else s.max(1))  # [rows]
    p = weights(s, unit, top, False)  # P [rows,keys]
    rescale = jnp.exp2(m - top)  # 2^(m - m')
    return p, top, total * rescale + p.sum(1), rescale  # l' = l 2^(m - m') + rowsum P


def run(call: Call, kernel, grid: dict[str, int], x: Arrays, seen: Line, outs, scratch,
        name: str):
    """A kernel of the call: kernel(call, x, seen, outs, scratch)."""
    return launch(
        lambda given, *rest: kernel(call, *given, *rest), grid, (x, seen), outs,
        scratch,
        warpgroups=call.warpgroups, exact=call.form.softcap is not None,
        interpret=call.interpret, name=name)
