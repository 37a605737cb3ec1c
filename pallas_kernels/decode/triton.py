"""Decoding on GPU by Triton, on sm80 and newer: see `pallas_kernels/decode/api.py`.

A program reads a run of one key head's slots for all queries of that head, R = T * H/K
of them in one tile, and leaves a normalised part of the output in float32 with its
log-sum-exp; a second kernel adds the parts up, always in the same order. There are as
many splits of S as it takes to keep two programs on every multiprocessor, so that one
sequence is enough to fill the device, and each row's splits share its filled tiles
evenly. Key heads are neighbours in the grid, as they are in memory.

Limits. Bytes: the filled slots of k and v once, slots * K * (D + V) * bits/8, and their
scales, over the bandwidth; the next tiles are on their way while one is computed.
Flops: at least 16 rows a key head (those of the matrix units), so slots * K * 2 * 16 *
(D + V) over the rate: at 16 bits 16 flops a byte, where an H200 has 200, and so bytes
are what counts. Instructions: an H200 brings a multiprocessor 32 KiB in about 1600
cycles, in which it issues 6400 instructions; by the PTX of D = V = 128 those bytes take
1300 at 16 bits, 5000 at int8 and 8500 at int4, which is bound by them.

Sources: Dao et al., 2023, flash-decoding; Kwon et al., 2023, arXiv:2309.06180 (pages).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import Refused, tables
from pallas_kernels.decode.triton_cache import Arrays, Call, Head
from pallas_kernels.machine.product import F32, NN, dot
from pallas_kernels.machine.triton import lanes, load, power
from pallas_kernels.tile import LOW, NEVER, sink_logit

PARTS = 16  # how many parts the second kernel takes at once
AN_SM = 2  # programs
MORE = {"four_programs": 4, "six_programs": 6}  # candidates, and what they set
STAGES = {"two_stages": 2, "three_stages": 3}
LEAST = 16  # slots of a tile: what the matrix units contract
LARGE = 64  # slots of a page that a tile may be cut down to
MOST_ROWS = 512


def sized(static, paged: bool, tile: int | None, splits: int | None, q, k, v):
    """`static` with the tile of a program, which divides a large page, and what decides
    how many programs there are. Raises Refused for what this kernel does not do."""
    if static.queries * static.heads > MOST_ROWS * static.key_heads:
        raise Refused(f"T={static.queries}, H={static.heads}, K={static.key_heads}: at "
                      f"most {MOST_ROWS} queries of a key head")
    for name, a in (("k", k), ("v", v)):
        # Triton counts elements in 32 bits up to 2^32 bytes, and in 64 beyond
        if a.dtype.itemsize == 1 and 2**31 <= a.size <= 2**32:
            raise Refused(f"{name} has {a.size} bytes: fewer than 2^31 or over 2^32")
    kind = {16: "f16", 8: "i8", 4: "i4"}[static.bits]
    if q.dtype == F32:
        kind = "f32" if static.bits == 16 else "f32 i8"
    wide = tables.width(q.shape[3], v.shape[3] * (2 if static.bits == 4 else 1))
    found = tables.read(tables.device_kind(), "decode", f"{wide} {kind}", "triton")
    columns = 1 << (max(tile or found.block_kv, LEAST).bit_length() - 1)
    # smaller pages are read slot by slot: a tile of one would keep too little in flight
    even = static.page >= LARGE and static.page & (static.page - 1) == 0
    most = static.page if paged and even else power(static.slots)
    found = dataclasses.replace(found, block_kv=min(columns, most))
    for word, stages in STAGES.items():
        if word in static.variant:
            found = dataclasses.replace(found, num_stages=stages)
    return static._replace(tile=found, splits=splits or 0, cores=tables.cores())


def attend(static, lengths, table, rows, beside, q, k, v) -> tuple[Any, Any]:
    """o [B,T,H,V], m and l [B,H,T], m in the unit of logits."""
    b, t, h, _ = q.shape
    call, x = _prepared(static, lengths, table, rows, beside, q, k, v)
    heads, width = k.shape[2], v.shape[3] * (2 if static.bits == 4 else 1)
    lead = (call.splits, b, heads, call.queries)  # [splits,B,K,R]
    tiles = -(-call.queries // call.rows)
    one = call.splits == 1
    o, *sums = _launch(
        call, _attend, (heads * tiles, call.splits, b), x,
        [jax.ShapeDtypeStruct((*lead, width), q.dtype if one else F32),
         *[jax.ShapeDtypeStruct(lead, F32)] * 2], "decode", call.warps, call.stages)
    if one:
        o, *sums = o[0], *(a[0] for a in sums)
    else:
        o, *sums = _launch(
            call, _merge, (call.queries, heads, b), (o, *sums),
            [jax.ShapeDtypeStruct((*lead[1:], width), q.dtype),
             *[jax.ShapeDtypeStruct(lead[1:], F32)] * 2], "decode_merge", 4, 1)
    o = o.reshape(b, heads, t, -1, width).transpose(0, 2, 1, 3, 4)  # [B,T,K,G,V]
    sums = (a.reshape(b, heads, t, -1).transpose(0, 1, 3, 2) for a in sums)  # [B,K,G,T]
    return o.reshape(b, t, h, width), *(a.reshape(b, h, t) for a in sums)


def weights(static, lengths, table, rows, beside, q, k, base, factor) -> jax.Array:
    """The sum of each slot's weights over a key head's queries, [B,S,K]; base, factor
    [B,R]: what weights are made of, the base in the unit of logits."""
    b, heads = q.shape[0], k.shape[2]
    call, x = _prepared(static, lengths, table, rows, beside, q, k, None)
    x = x._replace(base=_by_head(static, base), factor=_by_head(static, factor))
    return _launch(
        call, _weights, (heads, call.splits, b), x,
        jax.ShapeDtypeStruct((b, call.slots, heads), F32), "decode_weights",
        call.warps, call.stages)


def splits(programs: int, tiles: int, cores: int, each: int = AN_SM) -> int:
    """How many splits each of `programs` gets, `each` of them to a multiprocessor: the
    fewest that leave 5% of the device idle or less, else those that leave the least."""
    places = each * cores
    most = max(min(tiles, max(places // programs, 8)), 1)

    def busy(n: int) -> float:
        # the share of places in use, over whole waves of programs
        full = n * programs / (-(-n * programs // places) * places)
        return min(full, 0.95)  # 5% idle count as none

    return max(range(1, most + 1), key=lambda n: (busy(n), -n))


def _by_head(static, a):
    """[B,T*H] -> [B,K,R]: the queries of each key head."""
    b, heads = a.shape[0], static.key_heads
    a = a.reshape(b, static.queries, heads, static.heads // heads)
    return a.transpose(0, 2, 1, 3).reshape(b, heads, -1)


def _prepared(static, lengths, table, rows, beside, q, k, v):
    """What is static, and the arrays as programs read them."""
    (b, t, h, d), heads = q.shape, k.shape[2]
    count = t * h // heads
    tile, columns = static.tile, static.tile.block_kv
    own = min(tile.block_q, power(count))
    programs = b * heads * (-(-count // own))
    each = next((n for word, n in MORE.items() if word in static.variant), AN_SM)
    split = static.splits or splits(
        programs, -(-static.slots // columns), static.cores, each)
    inner = table is not None and static.page % columns == 0
    call = Call(static.form, count, own, columns, split, static.slots, static.page,
                inner, static.bits, tile.num_warps, tile.num_stages,
                static.interpret)
    mine = functools.partial(_by_head, static)
    placed = static.form.mask is not None or static.form.score is not None
    q = q.reshape(b, t, heads, h // heads, d).transpose(0, 2, 1, 3, 4)  # [B,K,T,G,D]
    x = Arrays(
        q.reshape(b, heads, count, d), k, v, lengths,
        None if table is None else table.astype(jnp.int32),
        mine(rows.head) if placed else None, mine(rows.pos) if placed else None,
        None if beside.segment is None else mine(rows.segment),
        mine(sink_logit(rows.sink, static.form.unit)) if static.sink else None, None,
        None, *beside)
    return call, x


def _launch(call: Call, kernel, grid, x, out_shape, name: str, warps: int, stages: int):
    return pl.pallas_call(
        lambda x, *outs: kernel(call, x, *outs),
        grid=grid, out_shape=out_shape, interpret=call.interpret, name=name,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    )(x)


def _attend(call: Call, x: Arrays, o_ref, m_ref, l_ref):
    tiles = -(-call.queries // call.rows)
    at, n, b = (pl.program_id(axis) for axis in range(3))
    kv, row = (at, at * 0) if tiles == 1 else (jax.lax.div(at, tiles),
                                               jax.lax.rem(at, tiles))
    ctx = Head(call, x, b, kv)
    queries, exp2 = ctx.queries(row), call.form.exp2

    def step(tile, carry):
        m, total, *accs = carry
        place = ctx.at(tile)
        # q k^T [rows,columns], in the unit of logits
        s = ctx.logits(queries, ctx.tile(x.k, place), place)
        top = jnp.maximum(m, s.max(1)[:, None])  # m' = max(m, rowmax S)
        p, rescale = exp2(s - top), exp2(m - top)  # P, 2^(m - m')
        total = total * rescale + p.sum(1)[:, None]
        place = ctx.held(place)
        if x.v_scale is not None:
            p = p * ctx.beside(x.v_scale, place)[None]  # one factor a slot
        p = p.astype(queries.parts[0].dtype)
        # p v: [rows,columns] by [columns,V] is [rows,V]; of int4 two halves of V
        outs = [dot(p, v, NN) for v in ctx.tile(x.v, place)]
        return top, total, *(acc * rescale + out for acc, out in zip(accs, outs))

    def full(value):
        return jnp.full((call.rows, 1), value, F32)  # [rows,1]

    m, total = full(LOW), full(0.0)
    if x.sink is not None:
        # a sink is counted once; -inf is none
        once = (n == 0) & (queries.sink > NEVER)
        m = jnp.where(once, queries.sink, LOW)
        total = jnp.where(once, 1.0, 0.0)
    acc = jnp.zeros((call.rows, power(x.v.shape[3])), F32)
    first, last = ctx.share(n)
    m, total, *accs = jax.lax.fori_loop(
        first, last, step, (m, total, *[acc] * len(queries.parts)))
    safe = jnp.where(total > 0, total, 1.0)
    rows, width = pl.ds(row * call.rows, call.rows), x.v.shape[3]
    for half, acc in enumerate(accs):
        out = acc / safe  # of this split alone
        cut = pl.ds(kv * 0 + half * width, power(width))
        triton.store(o_ref.at[n, b, kv, rows, cut], out.astype(o_ref.dtype),
                     mask=lanes(width, call.rows, queries.inside))
    for ref, a in ((m_ref, m), (l_ref, total)):
        triton.store(ref.at[n, b, kv, rows], a.sum(1), mask=queries.inside)


def _merge(call: Call, x, o_ref, m_ref, l_ref):
    """Adds up the parts of one query."""
    parts, tops, sums = x
    exp2 = call.form.exp2
    row, kv, b = (pl.program_id(axis) for axis in range(3))
    many, width = call.splits, power(o_ref.shape[3])

    def found(start, size):
        inside = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0) < many
        cut = pl.ds(start, size), b, kv, row
        return load(tops.at[cut], inside, LOW), load(sums.at[cut], inside, 0), inside

    zero = row * 0  # a traced 0
    m, l, _ = found(zero, power(many))  # of all splits
    top = m.max(0)
    total = (exp2(m - top) * l).sum(0)  # sum of 2^(m_n - m) l_n

    def step(n, acc):
        m, l, inside = found(n * PARTS, PARTS)
        inside = lanes(o_ref.shape[3], PARTS, inside)
        part = load(parts.at[pl.ds(n * PARTS, PARTS), b, kv, row, pl.ds(zero, width)],
                    inside, 0)
        # O = sum of O_n 2^(m_n - m) l_n over sum of 2^(m_n - m) l_n
        return acc + part * (exp2(m - top) * l)[:, None]

    acc = jax.lax.fori_loop(0, -(-many // PARTS), step, jnp.zeros((PARTS, width), F32))
    safe = jnp.where(total > 0, total, 1.0)
    out, inside = acc.sum(0) / safe, None
    if width != o_ref.shape[3]:
        inside = jax.lax.broadcasted_iota(jnp.int32, (width,), 0) < o_ref.shape[3]
    triton.store(o_ref.at[b, kv, row, pl.ds(zero, width)], out.astype(o_ref.dtype),
                 mask=inside)
    m_ref[b, kv, row], l_ref[b, kv, row] = top, total


def _weights(call: Call, x: Arrays, w_ref):
    kv, n, b = (pl.program_id(axis) for axis in range(3))
    ctx = Head(call, x, b, kv)
    size, many = call.columns, -(-call.queries // call.rows)
    first = ctx.queries(kv * 0) if many == 1 else None

    def write(tile, value):
        slot = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        triton.store(w_ref.at[b, pl.ds(tile * size, size), kv], value,
                     mask=slot < call.slots)

    def step(tile, none):
        place = ctx.at(tile)
        k = ctx.tile(x.k, place)

        def add(row, found):
            queries = ctx.queries(row) if first is None else first
            s = ctx.logits(queries, k, place)
            # P = exp(S - L)
            p = call.form.recompute(s, queries.base) * queries.factor
            return found + p.sum(0)

        found = jnp.zeros((size,), F32)
        found = add(0, found) if many == 1 else jax.lax.fori_loop(0, many, add, found)
        write(tile, found)
        return none

    start, end = ctx.share(n)
    jax.lax.fori_loop(start, end, step, ())

    def nothing(tile, none):
        write(tile, jnp.zeros((size,), F32))
        return none

    # tiles beyond the length, spread in the same way
    filled = jax.lax.div(ctx.length + (size - 1), size)
    start, end = ctx.shared(n, -(-call.slots // size) - filled)
    jax.lax.fori_loop(filled + start, filled + end, nothing, ())
