"""What a decoding program on GPU by Triton reads: one key head of one row of a cache, a
tile of its slots at a time, contiguous or by pages, plain, int8 or int4.

A tile that lies inside a page is read by the page's number; where pages are smaller, or
no power of two, each slot is read by its own page's. What is not there is not read:
slots beyond the row's length, pages that are -1, lanes beyond the width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.decode.triton_unpack import widened
from pallas_kernels.machine.product import NT, dot
from pallas_kernels.machine.triton import lanes, load, power
from pallas_kernels.tile import NEVER, TileSpec, both


class Call(NamedTuple):
    """What is static. R = T * H/K `queries` read one key head: `rows` of them are a
    tile, `columns` slots another. inner: a tile of slots lies inside a page."""

    form: TileSpec
    queries: int
    rows: int
    columns: int
    splits: int
    slots: int
    page: int
    inner: bool
    bits: int
    warps: int
    stages: int
    interpret: Any


class Arrays(NamedTuple):
    """What a kernel reads; None for what the call does not use.

    q [B,K,R,D]; k, v and what lies beside slots as `pallas_kernels.decode` says, the
    last axis of what lies beside them K or 1; lengths [B,K|1]; table [B,n]; head, row
    positions and segments [B,K,R]; sink, base and factor [B,K,R], the first two in the
    unit of logits.
    """

    q: Any
    k: Any
    v: Any
    lengths: Any
    table: Any = None
    head: Any = None
    q_pos: Any = None
    q_segment: Any = None
    sink: Any = None
    base: Any = None
    factor: Any = None
    pos: Any = None
    segment: Any = None
    bias: Any = None
    k_scale: Any = None
    v_scale: Any = None


class At(NamedTuple):
    """Where a tile lies: its first two indices, its slots, and which are there."""

    row: Any
    token: Any
    slot: Any
    inside: Any


class Head:
    """One key head `kv` of row `b`: its length and the run of tiles of a split."""

    def __init__(self, call: Call, x: Arrays, b, kv):
        self.call, self.x, self.b, self.kv = call, x, b, kv
        own = kv if x.lengths.shape[1] > 1 else kv * 0
        self.length = jnp.minimum(x.lengths[b, own], call.slots)

    def share(self, n):
        """First and last filled tile of the n-th split."""
        size = self.call.columns
        return self.shared(n, jax.lax.div(self.length + (size - 1), size))

    def shared(self, n, tiles):
        """Where the n-th split begins and ends in `tiles` that are spread evenly."""
        splits = self.call.splits
        return jax.lax.div(n * tiles, splits), jax.lax.div((n + 1) * tiles, splits)

    def at(self, tile) -> At:
        """Where a tile of slots lies."""
        call, size, table = self.call, self.call.columns, self.x.table
        start = tile * size
        slot = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)  # [columns]
        inside = slot < self.length
        if table is None:
            return At(self.b, pl.ds(start, size), slot, inside)
        if call.inner:
            page = table[self.b, jax.lax.div(start, call.page)]
            cut = pl.ds(jax.lax.rem(start, call.page), size)
            # -1 is no page: page 0 is named, and nothing is read
            return At(jnp.maximum(page, 0), cut, slot, inside & (page >= 0))
        # each slot's own page [columns]; the last tile may pass the table
        own = jnp.minimum(jax.lax.div(slot, call.page), table.shape[1] - 1)
        page = load(table.at[self.b, own], inside, -1)
        token = jax.lax.rem(slot, call.page)
        return At(jnp.maximum(page, 0), token, slot, inside & (page >= 0))

    def held(self, at: At) -> At:
        """A tile of which only the slots that hold a token are there: what else lies
        in a cache may be nan, which a weight of 0 does not hide."""
        inside, x = at.inside, self.x
        if x.pos is not None:
            inside = inside & (self.beside(x.pos, at, -1) >= 0)
        if x.segment is not None:
            inside = inside & (self.beside(x.segment, at) > 0)
        return at._replace(inside=inside)

    def tile(self, ref, at: At) -> list[Any]:
        """A tile of k or v [columns,width] in q's type; of int4 two of half the width.
        """
        size, width = self.call.columns, ref.shape[3]
        if isinstance(at.token, jax.Array):
            # the interpreter takes arrays of indices for all axes only
            def each(n):
                return jnp.broadcast_to(n, (size, power(width)))

            lane = jax.lax.broadcasted_iota(jnp.int32, (size, power(width)), 1)
            cut = ref.at[each(at.row[:, None]), each(at.token[:, None]), each(self.kv),
                         lane]
        else:
            # a traced 0, since a slice that is known to pass the end is an error
            cut = ref.at[at.row, at.token, self.kv, pl.ds(self.kv * 0, power(width))]
        a, dtype = load(cut, lanes(width, size, at.inside), 0), self.x.q.dtype
        if self.call.bits == 16:
            return [a]
        # a second operand has Triton convert what it loads at once, not byte by byte
        # as the matrix units want a turned tile
        ones = at.inside.astype(dtype)[:, None] if ref is self.x.v else None
        return widened(a, self.call.bits, dtype, ones, self.call.interpret)

    def beside(self, ref, at: At, other=0):
        """Entries [columns] of an array that lies beside slots."""
        own = self.kv if ref.shape[2] > 1 else self.kv * 0
        return load(ref.at[at.row, at.token, own], at.inside, other)

    def queries(self, tile) -> Queries:
        """The tile of queries, and what is known of each."""
        call, x = self.call, self.x
        start = tile * call.rows
        inside = None
        if call.queries % call.rows:
            row = jax.lax.broadcasted_iota(jnp.int32, (call.rows,), 0)
            inside = start + row < call.queries  # rows that there are
        rows = pl.ds(start, call.rows)

        def vector(ref, other):
            if ref is None:
                return None
            return load(ref.at[self.b, self.kv, rows], inside, other)[:, None]

        width = x.q.shape[3]
        halves, width = (2, width // 2) if call.bits == 4 else (1, width)
        parts = []
        for n in range(halves):
            cut = pl.ds(self.kv * 0 + n * width, power(width))  # a half of D
            parts.append(load(x.q.at[self.b, self.kv, rows, cut],  # [rows,width]
                              lanes(width, call.rows, inside), 0))
        return Queries(parts, inside, vector(x.head, 0), vector(x.q_pos, 0),
                       vector(x.q_segment, 0), vector(x.sink, 0),
                       vector(x.base, -NEVER),
                       vector(x.factor, 0))

    def logits(self, queries: Queries, k: list[Any], at: At):
        """Logits times their unit [rows,columns], NEVER where hidden."""
        call, x, form = self.call, self.x, self.call.form
        # q k^T: [rows,D] by [columns,D] is [rows,columns]; of int4 two halves of D
        raw = dot(queries.parts[0], k[0], NT)
        if call.bits == 4:
            raw = raw + dot(queries.parts[1], k[1], NT)
        if x.k_scale is not None:
            raw = raw * self.beside(x.k_scale, at)[None]  # one factor a slot
        j = at.slot if x.pos is None else self.beside(x.pos, at, -1)  # [columns]
        bias = None if x.bias is None else self.beside(x.bias, at)[None]
        s, _ = form.logits(raw, queries.head, queries.pos, j[None], bias)
        seen = at.inside if x.pos is None else at.inside & (j >= 0)  # -1: empty
        if x.segment is not None:
            segment = self.beside(x.segment, at)
            seen = (seen & (segment > 0))[None] & (queries.segment == segment[None])
        else:
            seen = seen[None]  # [1,columns]
        if form.mask is not None:
            seen = both(seen, form.mask(queries.head, queries.pos, j[None]))
        return jnp.where(seen, s, NEVER)


class Queries(NamedTuple):
    """A tile of queries [rows,width], one or of int4 two halves of the width, which
    queries are there, and vectors [rows,1]."""

    parts: list[Any]
    inside: Any
    head: Any
    pos: Any
    segment: Any
    sink: Any
    base: Any
    factor: Any
