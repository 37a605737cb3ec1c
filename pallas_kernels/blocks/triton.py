"""Chosen blocks on GPU by Triton, on sm80 and newer.

Forward and for dq a program owns rows of one query block, its tokens times the heads
that share the choice, and passes over the keys that were chosen. For dk and dv a
program owns a key block and passes over the query blocks that chose it. A block that
everybody chose would keep one program busy long after all others: lists are cut into
parts of about the mean length, a program each, and a second kernel adds up the parts
of a block in their order. No atomics, and so the same bits each time.

Sources: see `pallas_kernels/blocks/api.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.blocks.triton_tile import (
    Chosen, Keys, Parts, Queries, across, chosen_keys, fetch, keys, listed_rows, logits,
    of_block, put, queries
)
from pallas_kernels.flash.triton_tile import Arrays, Call, launch
from pallas_kernels.machine.product import F32, NN, NT, dot
from pallas_kernels.machine.triton import load, power
from pallas_kernels.schedule import Tiling
from pallas_kernels.tile import LOW
from pallas_kernels.tiles import FlashTriton


def forward(static, side, q, k, v):
    """o [B,T,H,V] in v's dtype, m and l [B,T,H] float32, m in the unit of logits."""
    b, t, h, _ = q.shape
    outs = [jax.ShapeDtypeStruct((b, t, h, v.shape[3]), v.dtype),
            *[jax.ShapeDtypeStruct((b, t, h), F32)] * 2]
    return _per_query_block(static, static.tiles[0], _forward, side,
                            _arrays(side, q, k, v), outs, "blocks_forward")


def queries_backward(static, side, q, k, v, base, delta, do):
    """dq [B,T,H,D]; base, delta [B,T,H], base in the unit of logits."""
    x = _arrays(side, q, k, v)._replace(do=do, lse=base, delta=delta)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return _per_query_block(static, static.tiles[1], _queries, side, x, out,
                            "blocks_backward_queries")


def keys_backward(static, side, lists, q, k, v, base, delta, do):
    """dk [B,S,K,D] and dv [B,S,K,V], by the lists of `blocks.inverse`."""
    b, s, heads, _ = k.shape
    x = _arrays(side, q, k, v)._replace(do=do, lse=base, delta=delta)
    call = _call(static, static.tiles[2], x)
    parts = divided(static, lists)
    pieces = -(-static.block // call.tiling.columns)
    slots = parts.block.shape[2]

    def out(a):
        return jax.ShapeDtypeStruct((b, heads, slots, static.block, a.shape[3]), F32)

    sums = launch(
        call, functools.partial(_keys, static), (slots * pieces, heads, b), x, parts,
        [out(k), out(v)], "blocks_backward_keys")
    return launch(
        call, functools.partial(_sum, static),
        (-(-s // static.block) * pieces, heads, b), x, (sums, parts.first),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (k, v)], "blocks_backward_sum")


def _per_query_block(static, tile: FlashTriton, kernel, side, x: Arrays, outs,
                     name: str):
    """A kernel with a program for each tile of rows of a query block."""
    b, c, n, _ = side.chosen.shape
    call = _call(static, tile, x)
    pieces = -(-static.heads * static.size // tile.block_q)
    return launch(call, functools.partial(kernel, static), (n * pieces, c, b), x,
                  compact(static, side.chosen), outs, name)


def _call(static, tile: FlashTriton, x: Arrays) -> Call:
    tiling = Tiling(static.t, static.s, tile.block_q, tile.block_kv, None)
    groups = x.q.shape[2] // x.k.shape[2]
    return Call(static.form, tiling, groups, tile.num_warps, tile.num_stages,
                static.interpret)


def _arrays(side, q, k, v) -> Arrays:
    """What the kernels read; here lse and delta lie as [B,T,H], kv_pos as [B,S]."""
    return Arrays(q, k, v, side.head, q_pos=side.q_pos, kv_pos=side.kv_pos,
                  q_segment=side.q_segment, kv_segment=side.kv_segment)


def compact(static, chosen: jax.Array) -> Chosen:
    """chosen [B,C,N,n] with the blocks that there are in front, in their order."""
    real = (chosen >= 0) & (chosen < -(-static.s // static.block))
    order = jnp.argsort(~real, axis=-1, stable=True)  # those that there are first
    where = jnp.take_along_axis(jnp.where(real, chosen, 0), order, -1)
    return Chosen(real.sum(-1, dtype=jnp.int32), where)


def divided(static, lists) -> Parts:
    """The inverse lists cut into parts no longer than the mean list, or a tile of rows.
    """
    entries, first = lists
    total, many = entries.shape[-1], first.shape[-1] - 1
    rows = -(-static.tiles[2].block_q // (static.heads * static.size))
    longest = max(-(-total // many), rows)
    each = -(-(first[..., 1:] - first[..., :-1]) // longest)  # parts of each list
    ends = jnp.cumsum(each, axis=-1, dtype=jnp.int32)
    starts = jnp.pad(ends, ((0, 0), (0, 0), (1, 0)))  # the first part of each block
    # sum of ceil(length / longest) over the lists that are not empty
    slots = jnp.arange(min(many, total) + total // longest, dtype=jnp.int32)
    find = functools.partial(jnp.searchsorted, side="right")
    block = jax.vmap(jax.vmap(lambda a: find(a, slots)))(ends).astype(jnp.int32)
    block = jnp.minimum(block, many - 1)

    def at(a, n):
        return jnp.take_along_axis(a, n, -1)

    # parts beyond the last start where the last list ends: they are empty
    start = at(first, block) + (slots[None, None] - at(starts, block)) * longest
    stop = jnp.minimum(start + longest, at(first, block + 1))
    return Parts(block, start, stop, starts, entries)


def _own(static, call: Call, x: Arrays) -> tuple[Queries, tuple[Any, Any, Any]]:
    """The rows of this program, and its row of the batch, choice and query block."""
    c, b = pl.program_id(1), pl.program_id(2)
    each, rows = static.heads * static.size, call.tiling.rows
    pieces = -(-each // rows)
    n = jax.lax.div(pl.program_id(0), pieces)
    r = jax.lax.rem(pl.program_id(0), pieces) * rows
    r = r + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    real = r < each if each % rows else None
    return queries(static, x, b, c, n, r, real), (b, c, n)


def _q(ref, b, at: Queries):
    """Rows of q or do."""
    return fetch(ref, (b, at.token, at.head), at.real, at.token.shape[0])


def _kv(call: Call, ref, b, c, at: Keys, shared: int):
    """Keys of k or v; `shared` query heads make one choice."""
    kv = jax.lax.div(c * shared, call.groups)
    return fetch(ref, (b, at.token, kv), at.real, at.token.shape[0])


def _forward(static, call: Call, x: Arrays, lists: Chosen, o_ref, m_ref, l_ref):
    query, (b, c, n) = _own(static, call, x)
    q, rows = _q(x.q, b, query), call.tiling.rows  # [rows,D]
    trips, tile = chosen_keys(static, call.tiling.columns, x, lists, b, c, n)

    def step(i, carry):
        m, total, acc = carry
        key = tile(i)
        # q k^T: [rows,D] by [columns,D] is [rows,columns]
        s = logits(static, dot(q, _kv(call, x.k, b, c, key, static.heads), NT), query,
                   key)
        top = jnp.maximum(m, s.max(1))  # m' = max(m, rowmax S)
        exp2 = static.form.exp2
        p, rescale = exp2(s - top[:, None]), exp2(m - top)  # P, 2^(m - m')
        v = _kv(call, x.v, b, c, key, static.heads)  # [columns,V]
        # p v: [rows,columns] by [columns,V] is [rows,V]
        acc = acc * rescale[:, None] + dot(p.astype(v.dtype), v, NN)
        return top, total * rescale + p.sum(1), acc  # l' = l 2^(m - m') + rowsum P

    m, total, acc = jax.lax.fori_loop(0, trips, step, (
        jnp.full((rows,), LOW, F32), jnp.zeros((rows,), F32),
        jnp.zeros((rows, power(o_ref.shape[3])), F32)))
    safe = jnp.where(total > 0, total, 1.0)
    index = b, query.token, query.head
    put(o_ref, acc / safe[:, None], index, query.real)  # O / l
    for ref, a in ((m_ref, m), (l_ref, total)):
        triton.store(ref.at[index], a, mask=query.real)


def _recompute(static, x: Arrays, b, query: Queries, key: Keys, tiles, turned: bool):
    """p and ds of a tile, made again from base; tiles: q, k, v and do."""
    q, k, v, do = tiles

    def product(a, c):
        return dot(c, a, NT) if turned else dot(a, c, NT)

    row, _ = across(turned)

    def of(ref, other):
        return row(load(ref.at[b, query.token, query.head], query.real, other))

    # rows that are not there get weights 2^(s + LOW) = 0
    s = logits(static, product(q, k), query, key, turned)
    p = static.form.recompute(s, of(x.lse, -LOW))
    # P = exp(S - L), dP = dO V^T, dS = P (dP - D)
    return p, p * (product(do, v) - of(x.delta, 0.0))


def _queries(static, call: Call, x: Arrays, lists: Chosen, dq_ref):
    """dq of rows of a query block."""
    query, (b, c, n) = _own(static, call, x)
    q, do = _q(x.q, b, query), _q(x.do, b, query)  # [rows,D], [rows,V]
    trips, tile = chosen_keys(static, call.tiling.columns, x, lists, b, c, n)

    def step(i, dq):
        key = tile(i)
        k, v = (_kv(call, a, b, c, key, static.heads) for a in (x.k, x.v))
        ds = _recompute(static, x, b, query, key, (q, k, v, do), False)[1]
        # ds k: [rows,columns] by [columns,D] is [rows,D]
        return dq + dot(ds.astype(k.dtype), k, NN)

    dq = jax.lax.fori_loop(0, trips, step, jnp.zeros(q.shape, F32))
    put(dq_ref, dq * call.form.scale, (b, query.token, query.head), query.real)


def _keys(static, call: Call, x: Arrays, parts: Parts, dk_ref, dv_ref):
    """dk and dv of a piece of a key block, over the query blocks of a part."""
    kv, b = pl.program_id(1), pl.program_id(2)
    columns = call.tiling.columns
    pieces = -(-static.block // columns)
    p, piece = (f(pl.program_id(0), pieces) for f in (jax.lax.div, jax.lax.rem))
    token, at, real = of_block(static, columns, parts.block[b, kv, p], piece)

    def run():
        key = keys(static, x, b, token, real)
        k, v = (fetch(a, (b, token, kv), key.real, columns) for a in (x.k, x.v))
        trips, tile = listed_rows(static, call.tiling.rows, x, parts, b, kv, p)

        def step(i, carry):
            dk, dv = carry
            query = tile(i)
            q, do = _q(x.q, b, query), _q(x.do, b, query)
            p, ds = _recompute(static, x, b, query, key, (q, k, v, do), True)
            # p do and ds q, turned: [columns,rows] by [rows,V] and [rows,D]
            dv = dv + dot(p.astype(do.dtype), do, NN)
            return dk + dot(ds.astype(q.dtype), q, NN), dv

        dk, dv = jax.lax.fori_loop(
            0, trips, step, (jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32)))
        put(dk_ref, dk * call.form.scale, (b, kv, p, at), real)
        put(dv_ref, dv, (b, kv, p, at), real)

    # parts beyond the last are empty: nobody reads what their programs leave
    pl.when(parts.start[b, kv, p] < parts.stop[b, kv, p])(run)


def _sum(static, call: Call, x: Arrays, given, *refs):
    """dk and dv of a piece of a key block: the sum of its parts, in order."""
    kv, b = pl.program_id(1), pl.program_id(2)
    columns = call.tiling.columns
    pieces = -(-static.block // columns)
    j, piece = (f(pl.program_id(0), pieces) for f in (jax.lax.div, jax.lax.rem))
    token, at, real = of_block(static, columns, j, piece)
    sums, first = given

    def step(p, carry):
        def part(ref):
            return fetch(ref, (b, kv, p, at), real, columns)  # [columns,D|V]

        return tuple(a + part(ref) for a, ref in zip(carry, sums))

    zeros = tuple(jnp.zeros((columns, power(a.shape[3])), F32) for a in refs)
    # one after the other, in order: the same bits each time
    found = jax.lax.fori_loop(first[b, kv, j], first[b, kv, j + 1], step, zeros)
    for ref, value in zip(refs, found):
        put(ref, value, (b, token, kv), keys(static, x, b, token, real).real)
