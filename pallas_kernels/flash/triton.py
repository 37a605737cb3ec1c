"""Flash attention for GPU by Triton: every feature, on sm80 and newer.

A program owns a tile of queries and passes over key tiles: first those that the mask
leaves whole, then those that need its arithmetic. The backward pass has a program per
key tile, which passes over query tiles and adds up dk and dv of a key head over its
query heads, and one per query tile for dq: seven matrix products, no atomics, and so
the same bits each time. Programs with the longest lines start first.

Sources: see `pallas_kernels/flash/api.py`; the two backward passes as in Dao, 2023,
arXiv:2307.08691.
"""

from __future__ import annotations


import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.flash.triton_tile import (
    Arrays, Call, TileContext, for_each_tile, launch, lines
)
from pallas_kernels.machine.product import F32, NN, dot
from pallas_kernels.machine.triton import write, zeros
from pallas_kernels.schedule import SKIP, Side, Static, Tiling
from pallas_kernels.tile import LOW, NEVER, sink_logit


def forward(static: Static, side: Side, q, k, v, bias, sink):
    """o [B,T,H,V] in v's dtype, m and l [B,H,T] float32, m in the unit of logits."""
    b, t, h, _ = q.shape
    call = _call(static, static.tiling, static.tiles[0], q, k)
    return launch(
        call, _forward, (call.tiling.grid[0], h, b),  # a program a query tile
        _arrays(side, q, k, v, bias,
                None if sink is None else sink_logit(sink, call.form.unit)),
        lines(*static.block_masks(call.tiling, side)),
        [jax.ShapeDtypeStruct((b, t, h, v.shape[3]), v.dtype),
         *[jax.ShapeDtypeStruct((b, h, t), F32)] * 2], "flash_forward",
    )


def backward(static: Static, side: Side, q, k, v, bias, sink, base, delta, do):
    """dq, dk, dv, d(bias), given base, delta [B,H,T] and do [B,T,H,V]; base: what
    weights are made again from, in the unit of logits."""
    b, _, h, _ = q.shape
    call = _call(static, static.backward, static.tiles[1], q, k)
    x = _arrays(side, q, k, v, bias, None)._replace(do=do, lse=base, delta=delta)
    table, ask = static.block_masks(call.tiling, side)
    turned = None if ask is None else ask.swapaxes(1, 2)  # [B,M,N]

    def like(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype)

    rows, columns = call.tiling.grid
    dk, dv = launch(call, _by_column, (columns, k.shape[2], b), x,
                    lines(table.T, turned), [like(k), like(v)], "flash_backward_keys")
    dq = launch(call, _by_row, (rows, h, b), x, lines(table, ask), like(q),
                "flash_backward_queries")
    if bias is None:
        return dq, dk, dv, None
    asked = jnp.asarray(table)[None] if ask is None else ask  # [B|1,N,M]
    grid = (rows if bias.shape[2] > 1 else 1, columns if bias.shape[3] > 1 else 1,
            bias.shape[0] * bias.shape[1])
    dbias = launch(call, _bias_tile, grid, x, asked,
                   jax.ShapeDtypeStruct(bias.shape, F32), "flash_backward_bias")
    return dq, dk, dv, dbias.astype(bias.dtype)


def _call(static: Static, tiling: Tiling, tile, q, k) -> Call:
    groups = q.shape[2] // k.shape[2]
    return Call(static.form, tiling, groups, tile.num_warps, tile.num_stages,
                static.interpret)


def _arrays(side: Side, q, k, v, bias, sink) -> Arrays:
    def whole(a):
        return None if a is None else a.astype(jnp.int32)

    return Arrays(
        q, k, v, whole(side.head), bias,
        None if side.keep is None else side.keep.astype(jnp.int8), whole(side.q_pos),
        whole(side.kv_pos), whole(side.q_segment), whole(side.kv_segment),
        sink, whole(side.seed), whole(side.batch),
    )


def _last_first(axis: int):
    """The program's number along an axis, from the last: under a causal mask, later
    query tiles have the longer lines."""
    return pl.num_programs(axis) - 1 - pl.program_id(axis)


def _forward(call: Call, x: Arrays, seen, o_ref, m_ref, l_ref):
    row, h, b = _last_first(0), pl.program_id(1), pl.program_id(2)
    ctx = TileContext(call, x, b, h)
    rows = call.tiling.rows
    q = ctx.queries(x.q, row)  # [rows,D], in pieces

    # the online softmax, in base 2
    def step(column, masked, carry):
        m, total, acc = carry
        s, _ = ctx.logits(q, ctx.keys(x.k, column), row, column, masked)
        top = jnp.maximum(m, s.max(1))  # m' = max(m, rowmax S)
        exp2 = call.form.exp2
        p, rescale = exp2(s - top[:, None]), exp2(m - top)  # P, 2^(m - m')
        total = total * rescale + p.sum(1)  # l' = l 2^(m - m') + rowsum P
        drop = ctx.drop(row, column)
        p = p if drop is None else p * drop  # l counts what is dropped
        p = p.astype(x.v.dtype)
        # p v: [rows,columns] by [columns,V] is [rows,V], in pieces of V
        acc = tuple(a * rescale[:, None] + dot(p, v, NN)
                    for a, v in zip(acc, ctx.keys(x.v, column)))
        return top, total, acc

    m, total = jnp.full((rows,), LOW, F32), jnp.zeros((rows,), F32)
    if x.sink is not None:
        # a first logit without value, of weight 2^0; -inf is none
        sink = jnp.full((rows,), x.sink[h], F32)
        m = jnp.maximum(sink, LOW)
        total = jnp.where(sink > NEVER, jnp.ones((rows,), F32), total)
    m, total, acc = for_each_tile(
        seen, b, row, step, (m, total, zeros(rows, o_ref.shape[3])))
    safe = jnp.where(total > 0, total, 1.0)
    # O / l, once at the end
    write(o_ref, [a / safe[:, None] for a in acc], b, row * rows, rows, h)
    inside = ctx.numbers(row, False) < call.tiling.t  # rows that there are
    # m and l apart: in L = m + log l a large m leaves nothing of l
    for ref, a in ((m_ref, m), (l_ref, total)):
        triton.store(ref.at[b, h, pl.ds(row * rows, rows)], a, mask=inside)


def _by_column(call: Call, x: Arrays, seen, dk_ref, dv_ref):
    """dk and dv of a key tile."""
    column, kv, b = (pl.program_id(n) for n in range(3))
    size = call.tiling.columns
    first = TileContext(call, x, b, kv * call.groups, turned=True)
    k, v = first.keys(x.k, column), first.keys(x.v, column)  # [columns,D], [columns,V]

    def head(g, carry):
        ctx = TileContext(call, x, b, kv * call.groups + g, turned=True)

        def step(row, masked, carry):
            dk, dv = carry
            q, do = ctx.queries(x.q, row), ctx.queries(x.do, row)  # [rows,D], [rows,V]
            p, _, ds = ctx.recompute(q, k, v, do, row, column, masked)
            p, ds = p.astype(x.do.dtype), ds.astype(x.q.dtype)  # [columns,rows]
            # p do and ds q, turned: [columns,rows] by [rows,V] and [rows,D]
            dv = tuple(a + dot(p, part, NN) for a, part in zip(dv, do))
            return tuple(a + dot(ds, part, NN) for a, part in zip(dk, q)), dv

        return for_each_tile(seen, b, column, step, carry)

    carry = zeros(size, dk_ref.shape[3]), zeros(size, dv_ref.shape[3])
    if call.groups == 1:
        dk, dv = head(0, carry)
    else:
        dk, dv = jax.lax.fori_loop(0, call.groups, head, carry)
    # the scale of the logits last, once, in float32
    write(dk_ref, [a * call.form.scale for a in dk], b, column * size, size, kv)
    write(dv_ref, dv, b, column * size, size, kv)


def _by_row(call: Call, x: Arrays, seen, dq_ref):
    """dq of a query tile."""
    row, h, b = _last_first(0), pl.program_id(1), pl.program_id(2)
    ctx = TileContext(call, x, b, h)
    rows = call.tiling.rows
    q, do = ctx.queries(x.q, row), ctx.queries(x.do, row)  # [rows,D], [rows,V]

    def step(column, masked, dq):
        k, v = ctx.keys(x.k, column), ctx.keys(x.v, column)  # [columns,D], [columns,V]
        ds = ctx.recompute(q, k, v, do, row, column, masked)[2].astype(x.k.dtype)
        # ds k: [rows,columns] by [columns,D] is [rows,D], in pieces of D
        return tuple(a + dot(ds, part, NN) for a, part in zip(dq, k))

    dq = for_each_tile(seen, b, row, step, zeros(rows, dq_ref.shape[3]))
    write(dq_ref, [a * call.form.scale for a in dq], b, row * rows, rows, h)


def _bias_tile(call: Call, x: Arrays, asked, db_ref):
    """The bias gradient of one tile, summed over the axes that are 1 in the bias."""
    t = call.tiling
    nb, nh, tall, wide = (n > 1 for n in db_ref.shape)  # which axes the bias has
    # the axes that are added up, and the place along those that are not
    sizes = (1 if nb else x.q.shape[0], 1 if nh else x.q.shape[2],
             1 if tall else t.grid[0], 1 if wide else t.grid[1])
    at, heads = pl.program_id(2), db_ref.shape[1]
    own = (jax.lax.div(at, heads), jax.lax.rem(at, heads), pl.program_id(0),
           pl.program_id(1))

    def step(n, acc):
        place = []
        # n counts rows of the batch, heads, query tiles and, fastest, key tiles
        for size, mine in zip(sizes[::-1], own[::-1]):
            place.append(mine if size == 1 else jax.lax.rem(n, size))
            n = jax.lax.div(n, size)
        column, row, h, b = place
        ctx = TileContext(call, x, b, h)

        def add():
            q, do = ctx.queries(x.q, row), ctx.queries(x.do, row)
            k, v = ctx.keys(x.k, column), ctx.keys(x.v, column)
            ds = ctx.recompute(q, k, v, do, row, column, True)[1]
            ds = ds if tall else ds.sum(0)[None]  # over queries
            return acc + (ds if wide else ds.sum(1)[:, None])  # over keys

        ask = asked[b if asked.shape[0] > 1 else 0, row, column]
        # a branch, so that what a skipped tile would need is not loaded
        return jax.lax.cond(ask != SKIP, add, lambda: acc)

    acc = jnp.zeros((t.rows if tall else 1, t.columns if wide else 1), F32)
    many = sizes[0] * sizes[1] * sizes[2] * sizes[3]
    acc = jax.lax.fori_loop(0, many, step, acc)
    cuts, inside = [], None
    for axis, size in ((2, t.rows), (3, t.columns)):
        if db_ref.shape[axis] == 1:  # an axis of 1 is one place
            cuts.append(pl.ds(0, 1))
            continue
        cuts.append(pl.ds(own[axis] * size, size))
        lane = jax.lax.broadcasted_iota(jnp.int32, acc.shape, axis - 2)
        near = own[axis] * size + lane < db_ref.shape[axis]
        inside = near if inside is None else inside & near
    triton.store(db_ref.at[own[0], own[1], *cuts], acc, mask=inside)
