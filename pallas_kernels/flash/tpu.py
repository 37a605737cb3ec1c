"""Flash attention for TPU (Mosaic): tiles of logits lie as [keys, queries].

With queries along the lanes, the maximum and the sum over keys are plain vector
operations, m, l and lse are rows of registers, and the accumulator is o^T [V, queries],
turned round once a query tile. On a machine whose matrix unit is wider than V this form
also fills it: the long axes are the ones that the unit contracts and puts out.

A grid step visits one tile of the schedule (`GridOrder`). Tiles that the mask leaves
whole run without mask arithmetic; of tiles that it cuts in the same way, as those on a
diagonal, only the parts that it leaves are computed. Inside a tile, keys pass by in
chunks, and the logits of the next chunk are asked for before the softmax of the present
one, so that the matrix unit has work while the vector unit computes exponentials.

The backward pass visits tiles column by column, makes p and ds again once, and adds
dk, dv and, where a head's dq fits on the chip, dq as well: five matrix products. Where
it does not fit, dq has a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tables
from pallas_kernels.flash.tpu_bias import bias_gradient
from pallas_kernels.flash.tpu_portions import Portion, joined
from pallas_kernels.flash.tpu_tile import (
    Arrays, Call, Scalars, TileContext, current_inner, cut, launch, listed_column,
    listed_row, own_head, put, scalars, specs
)
from pallas_kernels.machine.product import F32, NN, TN, dot
from pallas_kernels.schedule import Side, Static, Tiling, all_tiles, grid_order
from pallas_kernels.tile import LOW, NEVER, sink_logit
from pallas_kernels.tile_patterns import TilePatterns, tile_patterns


def forward(static: Static, side: Side, q, k, v, bias, sink):
    """o [B,T,H,V] in v's dtype, m and l [B,H,T] float32, m in the unit of logits."""
    t, width = q.shape[1], v.shape[3]
    x = _arrays(static.tiling, side, q, k, v, bias)
    patterns, table, ask = tile_patterns(
        static.form.mask, static.tiling, static.tiles[0].block_kv_compute,
        *static.block_masks(static.tiling, side))
    call = _call(static, static.tiling, patterns, x, sink)
    first = None if sink is None else sink_logit(sink, static.form.unit)

    def info(part):
        return scalars(part.seen, 1, side.head, first, side.seed, side.batch)

    o, *sums = joined(
        grid_order(table, ask), 1, lambda part: rows_forward(call, info(part), x, part))
    o = o[:, :, :t, :width].transpose(0, 2, 1, 3)  # [B,T,H,V]
    return o, *(a[:, :, 0, :t] for a in sums)


def backward(static: Static, side: Side, q, k, v, bias, sink, base, delta, do):
    """dq, dk, dv, d(bias), given base, delta [B,H,T] and do [B,T,H,V]; base: what
    weights are made again from, in the unit of logits."""
    tiling = static.backward
    far = -q.shape[1] % tiling.rows

    # queries that only fill a tile get weights 2^(s + LOW) = 0
    def fill(a, value):
        a = jnp.pad(a, ((0, 0), (0, 0), (0, far)), constant_values=value)
        return a[:, :, None]

    x = _arrays(tiling, side, q, k, v, bias)._replace(
        do=_tokens(do, tiling.rows), lse=fill(base, -LOW), delta=fill(delta, 0))
    plain = static.block_masks(tiling, side)
    patterns, table, ask = tile_patterns(
        static.form.mask, tiling, static.tiles[1].block_kv_compute, *plain)
    call = _call(static, tiling, patterns, x, sink)

    def info(part, groups):
        return scalars(part.seen, groups, side.head, sink, side.seed, side.batch)

    # five products where a head's dq stays on the chip, seven where it does not
    fits = tables.holds_queries(static.vmem, x.q.shape, call.groups, q.dtype.itemsize)
    columns = grid_order(table, ask, True)
    # a head's dq is made by one call; where it fits, so does the list
    one = Portion(columns, 0, tiling.grid[1])

    def make(part):
        return keys_backward(call, info(part, call.groups), x, part, fits)

    grads = make(one) if fits else joined(columns, call.groups, make)
    if not fits:
        grads = *grads, *joined(grid_order(table, ask), 1, lambda part: (
            queries_backward(call, info(part, 1), x, part),))
    dk, dv, dq = (
        g[:, :, :a.shape[1], :a.shape[3]].transpose(0, 2, 1, 3)
        for g, a in zip(grads, (k, v, q))
    )
    # of all tiles, and whole: what a pattern leaves out is 0 in d(bias) too
    dbias = None if bias is None else bias_gradient(
        call._replace(patterns=TilePatterns(patterns.chunk)), side, sink, x, bias,
        lambda *kind: all_tiles(*plain, *kind))
    return dq, dk, dv, dbias


def _call(static: Static, tiling: Tiling, patterns: TilePatterns, x: Arrays,
          sink) -> Call:
    groups = x.q.shape[1] // x.k.shape[1]
    return Call(static.form, tiling, patterns, groups, sink is not None, static.vmem,
                static.interpret)


def _pad(a, axis: int, size: int, value=0):
    """`a` filled up with `value` to a multiple of `size`; None and axes of 1 stay."""
    if a is None or a.shape[axis] % size == 0 or a.shape[axis] == 1 and a.ndim == 4:
        return a
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, -a.shape[axis] % size)
    return jnp.pad(a, widths, constant_values=value)


def _tokens(a, size: int):
    """[B,T,H,D] -> [B,H,T,D] with T a multiple of `size` and D one of 8."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size), (0, 0), (0, -a.shape[3] % 8)))
    return a.transpose(0, 2, 1, 3)


def _arrays(tiling: Tiling, side: Side, q, k, v, bias) -> Arrays:
    rows, columns = tiling.rows, tiling.columns

    def line(a, size, value=0):
        if a is None:
            return None
        return _pad(a.astype(jnp.int32), 1, size, value)[:, None]

    kv_pos = side.kv_pos
    if kv_pos is not None:
        kv_pos = _pad(kv_pos.astype(jnp.int32).transpose(0, 2, 1), 2, columns, -1)
        kv_pos = kv_pos[:, :, None]  # [B,K|1,1,S]

    def matrix(a):
        return _pad(_pad(a, 2, rows), 3, columns)  # [B|1,H|1,T|1,S|1]

    keep = None if side.keep is None else matrix(side.keep.astype(jnp.int8))
    return Arrays(
        _tokens(q, rows), _tokens(k, columns), _tokens(v, columns), matrix(bias)
        if bias is not None else None, keep, line(side.q_pos, rows), kv_pos,
        line(side.q_segment, rows), line(side.kv_segment, columns),
    )


def _forward(call: Call, info, x: Arrays, o_ref, top_ref, sum_ref, m_ref, l_ref,
             acc_ref):
    info = Scalars(*info)
    ctx = TileContext(call, info, x, by_column=False)

    @pl.when(ctx.first)
    def _start():
        top: Any = LOW
        weight: Any = 0.0
        if call.sink:
            # a first logit without value; -inf is none
            sink = info.sink[ctx.local]
            top, weight = jnp.maximum(sink, LOW), jnp.where(sink > NEVER, 1.0, 0.0)
        m_ref[...] = jnp.full(m_ref.shape, top, F32)  # [1,queries]
        l_ref[...] = jnp.full(l_ref.shape, weight, F32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)  # o^T [V,queries]

    def step(parts, masked):
        # Dao, 2023, algorithm 1, turned: m, l [1,queries] and acc [V,queries]
        m, total, acc = m_ref[...], l_ref[...], acc_ref[...]
        ahead = ctx.logits(parts[0], masked)[0]  # s^T [keys,queries]
        for part, later in zip(parts, (*parts[1:], None)):
            s = ahead
            # asked for before this part's softmax: the units work side by side
            if later is not None:
                ahead = ctx.logits(later, masked)[0]
            old = cut(m, part)  # m of the part's queries
            top = jnp.maximum(old, s.max(0, keepdims=True))  # m' = max(m, colmax s^T)
            exp2 = call.form.exp2
            p, rescale = exp2(s - top), exp2(old - top)  # P, 2^(m - m')
            sums = cut(total, part) * rescale + p.sum(0, keepdims=True)  # [1,queries]
            total = put(total, sums, part)
            drop = ctx.drop(part)
            p = p if drop is None else p * drop  # l counts what is dropped
            v = x.v[0, 0, part.keys]  # [keys,V]
            # v^T p: [keys,V] by [keys,queries] is [V,queries]
            new = cut(acc, part) * rescale + dot(v, p.astype(v.dtype), TN)
            m, acc = put(m, top, part), put(acc, new, part)
        m_ref[...], l_ref[...], acc_ref[...] = m, total, acc

    ctx.run(step)

    @pl.when(ctx.last)
    def _finish():
        total = l_ref[...]
        safe = jnp.where(total > 0, total, 1)  # of queries that see a key
        o_ref[0, 0] = (acc_ref[...] / safe).T.astype(o_ref.dtype)  # [queries,V]
        # m and l apart: in L = m + log l a large m leaves nothing of l
        top_ref[0, 0], sum_ref[0, 0] = m_ref[...], total


def _by_column(call: Call, info, x: Arrays, *refs):
    """dk and dv of a key tile; and dq, where refs has room for a head's."""
    outs, accs = refs[:len(refs) // 2], refs[len(refs) // 2:]
    dk_ref, dv_ref = accs[:2]
    dq_ref = accs[2] if len(accs) > 2 else None
    info = Scalars(*info)
    ctx = TileContext(call, info, x, by_column=True)
    rows = call.tiling.rows
    if dq_ref is not None:
        @pl.when(ctx.p == 0)
        def _clear():
            dq_ref[...] = jnp.zeros(dq_ref.shape, F32)  # [G,T/rows,D,rows]

    @pl.when(ctx.first)
    def _start():
        dk_ref[...] = jnp.zeros(dk_ref.shape, F32)  # [keys,D]
        dv_ref[...] = jnp.zeros(dv_ref.shape, F32)  # [keys,V]

    def step(parts, masked):
        at = ctx.group, ctx.row
        # read and written once a tile, not once a part
        dq = None if dq_ref is None else dq_ref[at]
        for part in parts:
            q, do = x.q[0, 0, part.queries], x.do[0, 0, part.queries]
            p, _, ds = ctx.recompute(part, masked)  # [keys,queries]
            ds = ds.astype(q.dtype)
            # p do and ds q: [keys,queries] by [queries,V] and [queries,D]
            dv_ref[part.keys] += dot(p.astype(do.dtype), do, NN)
            dk_ref[part.keys] += dot(ds, q, NN)
            if dq is not None:
                # k^T ds: [keys,D] by [keys,queries] is [D,queries]
                more = dot(x.k[0, 0, part.keys], ds, TN)
                dq = put(dq, cut(dq, part) + more, part)
        if dq_ref is not None:
            dq_ref[at] = dq

    ctx.run(step)

    @pl.when(ctx.last)
    def _finish():
        # the scale of the logits last, once, in float32
        outs[0][0, 0] = (dk_ref[...] * call.form.scale).astype(outs[0].dtype)
        outs[1][0, 0] = dv_ref[...].astype(outs[1].dtype)

    if dq_ref is not None:
        @pl.when(ctx.p == info.order.shape[0] - 1)
        def _write():
            for g in range(dq_ref.shape[0]):
                for i in range(dq_ref.shape[1]):
                    dq = (dq_ref[g, i] * call.form.scale).T  # [rows,D]
                    outs[2][0, g, i * rows:(i + 1) * rows] = dq.astype(outs[2].dtype)


def _by_row(call: Call, info, x: Arrays, dq_ref, acc_ref):
    """dq of a query tile."""
    ctx = TileContext(call, Scalars(*info), x, by_column=False)

    @pl.when(ctx.first)
    def _start():
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)  # dq^T [D,queries]

    def step(parts, masked):
        acc = acc_ref[...]
        for part in parts:
            k, ds = x.k[0, 0, part.keys], ctx.recompute(part, masked)[2]
            # k^T ds: [keys,D] by [keys,queries] is [D,queries]
            more = dot(k, ds.astype(k.dtype), TN)
            acc = put(acc, cut(acc, part) + more, part)
        acc_ref[...] = acc

    ctx.run(step)

    @pl.when(ctx.last)
    def _finish():
        dq_ref[0, 0] = (acc_ref[...] * call.form.scale).T.astype(dq_ref.dtype)


def rows_forward(call: Call, info: Scalars, x: Arrays, part: Portion):
    """o [B,H,T,V] in v's dtype, m and l [B,H,1,T] float32, of a portion's queries."""
    b, h = x.q.shape[:2]
    t = part.lines * call.tiling.rows
    rows, width = call.tiling.rows, x.v.shape[3]

    def o_at(b, h, *step):
        return b, h, listed_row(b, h, *step) - part.first, 0

    def sums_at(b, h, *step):
        return b, h, 0, listed_row(b, h, *step) - part.first

    return launch(
        call, _forward, (b, h, info.order.shape[0]), info, x,
        specs(call, x, listed_row, current_inner, own_head),
        [pl.BlockSpec((1, 1, rows, width), o_at),
         *[pl.BlockSpec((1, 1, 1, rows), sums_at)] * 2],
        [jax.ShapeDtypeStruct((b, h, t, width), x.v.dtype),
         *[jax.ShapeDtypeStruct((b, h, 1, t), F32)] * 2],
        [pltpu.VMEM((1, rows), F32), pltpu.VMEM((1, rows), F32),  # m, l
         pltpu.VMEM((width, rows), F32)],  # o^T
        "flash_forward",
    )


def keys_backward(call: Call, info: Scalars, x: Arrays, part: Portion, with_dq: bool):
    """dk and dv of a portion's keys and, `with_dq`, dq."""
    b, h, t, d = x.q.shape
    heads, _, width = x.v.shape[1:]
    rows, columns = call.tiling.rows, call.tiling.columns

    def head(b, h, p, *info):
        return h * call.groups + info[2][p]

    def at(b, h, *step):
        return b, h, listed_column(b, h, *step) - part.first, 0

    out_specs = [pl.BlockSpec((1, 1, columns, n), at) for n in (d, width)]
    out_shape = [
        jax.ShapeDtypeStruct((b, heads, part.lines * columns, a.shape[3]), a.dtype)
        for a in (x.k, x.v)
    ]
    scratch = [pltpu.VMEM((columns, n), F32) for n in (d, width)]
    if with_dq:
        out_specs.append(  # all queries of a key head, written at its last step
            pl.BlockSpec((1, call.groups, t, d), lambda b, h, *a: (b, h, 0, 0))
        )
        out_shape.append(jax.ShapeDtypeStruct(x.q.shape, x.q.dtype))
        scratch.append(pltpu.VMEM((call.groups, t // rows, d, rows), F32))  # dq^T
    grid = (b, heads, info.order.shape[0])
    cut = specs(call, x, current_inner, listed_column, head)
    return launch(call, _by_column, grid, info, x, cut, out_specs, out_shape, scratch,
                  "flash_backward" if with_dq else "flash_backward_keys")


def queries_backward(call: Call, info: Scalars, x: Arrays, part: Portion):
    """dq alone of a portion's queries, for those that do not fit on the chip."""
    b, h, _, d = x.q.shape
    rows = call.tiling.rows

    def at(b, h, *step):
        return b, h, listed_row(b, h, *step) - part.first, 0

    return launch(
        call, _by_row, (b, h, info.order.shape[0]), info, x,
        specs(call, x, listed_row, current_inner, own_head),
        pl.BlockSpec((1, 1, rows, d), at),
        jax.ShapeDtypeStruct((b, h, part.lines * rows, d), x.q.dtype),
        [pltpu.VMEM((d, rows), F32)], "flash_backward_queries",  # dq^T
    )
