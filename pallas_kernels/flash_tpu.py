"""Flash attention for TPU (Mosaic): tiles of logits lie as [keys, queries].

With queries along the lanes, the maximum and the sum over keys are plain vector
operations, m, l and lse are rows of registers, and the accumulator is o^T [V, queries],
turned round once a query tile. On a machine whose matrix unit is wider than V this form
also fills it: the long axes are the ones that the unit contracts and puts out.

A grid step visits one tile of the schedule (`Visits`). Tiles that the mask leaves whole
run without mask arithmetic; of tiles that it cuts in the same way, as those on a
diagonal, only the parts that it leaves are computed. Inside a tile, keys pass by in
chunks, and the logits of the next chunk are asked for before the softmax of the present
one, so that the matrix unit has work while the vector unit computes exponentials.

The backward pass visits tiles column by column, makes p and ds again once, and adds
dk, dv and, where a head's dq fits on the chip, dq as well: five matrix products. Where
it does not fit, dq has a kernel of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tables
from pallas_kernels.schedule import (
    Part, Paths, Side, Static, Tiling, all_tiles, paths, visits
)
from pallas_kernels.steps_tpu import (
    F32, Arrays, Call, Here, Scalars, column, cut, dot, held, launch, put, scalars,
    specs, unpack
)
from pallas_kernels.tile import LOG2E, LOW, NEVER


def forward(static: Static, side: Side, q, k, v, bias, sink):
    """o [B,T,H,V] in v's dtype and lse [B,H,T] float32."""
    t, width = q.shape[1], v.shape[3]
    x = _arrays(static.tiling, side, q, k, v, bias)
    ways, table, ask = paths(static.form.mask, static.tiling, static.how[0][0],
                             *static.asks(static.tiling, side))
    call = _call(static, static.tiling, ways, x, sink)
    info = scalars(visits(table, ask), 1, side.head, sink, side.seed, side.batch)
    o, lse = rows_forward(call, info, x)
    return o[:, :, :t, :width].transpose(0, 2, 1, 3), lse[:, :, 0, :t]


def backward(static: Static, side: Side, q, k, v, bias, sink, lse, delta, do):
    """dq, dk, dv, d(bias), given lse, delta [B,H,T] and do [B,T,H,V]."""
    tiling = static.backward
    far = -q.shape[1] % tiling.rows
    # queries that only fill a tile get weights 2^(s - 1e30) = 0
    fill = lambda a, value: jnp.pad(
        a, ((0, 0), (0, 0), (0, far)), constant_values=value)[:, :, None]
    base = jnp.where(jnp.isfinite(lse), lse * LOG2E, 0)
    x = _arrays(tiling, side, q, k, v, bias)._replace(
        do=_tokens(do, tiling.rows), lse=fill(base, -LOW), delta=fill(delta, 0))
    plain = static.asks(tiling, side)
    ways, table, ask = paths(static.form.mask, tiling, static.how[1][0], *plain)
    call = _call(static, tiling, ways, x, sink)
    info = lambda seen, groups: scalars(
        seen, groups, side.head, sink, side.seed, side.batch)
    fits = tables.holds_queries(static.vmem, x.q.shape, call.groups, q.dtype.itemsize)
    grads = keys_backward(call, info(visits(table, ask, True), call.groups), x, fits)
    if not fits:
        grads = (*grads, queries_backward(call, info(visits(table, ask), 1), x))
    dk, dv, dq = (
        g[:, :, :a.shape[1], :a.shape[3]].transpose(0, 2, 1, 3)
        for g, a in zip(grads, (k, v, q))
    )
    dbias = None if bias is None else _bias_gradient(
        call._replace(paths=Paths(ways.chunk)), side, sink, x, bias,
        lambda *kind: all_tiles(*plain, *kind))
    return dq, dk, dv, dbias


def _call(static: Static, tiling: Tiling, ways: Paths, x: Arrays, sink) -> Call:
    groups = x.q.shape[1] // x.k.shape[1]
    return Call(static.form, tiling, ways, groups, sink is not None, static.vmem,
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
    line = lambda a, size, value=0: None if a is None else _pad(
        a.astype(jnp.int32), 1, size, value)[:, None]
    kv_pos = side.kv_pos
    if kv_pos is not None:
        kv_pos = _pad(kv_pos.astype(jnp.int32).transpose(0, 2, 1), 2, columns, -1)
        kv_pos = kv_pos[:, :, None]
    matrix = lambda a: _pad(_pad(a, 2, rows), 3, columns)
    keep = None if side.keep is None else matrix(side.keep.astype(jnp.int8))
    return Arrays(
        _tokens(q, rows), _tokens(k, columns), _tokens(v, columns), matrix(bias)
        if bias is not None else None, keep, line(side.q_pos, rows), kv_pos,
        line(side.q_run, rows), line(side.kv_run, columns),
    )


def _bias_gradient(call, side: Side, sink, x, bias, listed) -> jax.Array:
    """d(bias), in memory of the order of the bias: where it broadcasts over the batch
    or over heads, their contributions are added one after the other."""
    b, h = x.q.shape[:2]
    seen = listed(bias.shape[2] > 1, bias.shape[3] > 1)

    def of(rows, heads):
        # x of some rows of the batch and some heads, each [first, count]
        def part(a, n):
            if a is None:
                return None
            a = a if a.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(a, *rows)
            if a.ndim < 4 or a.shape[1] == 1:
                return a
            first, count = heads
            if a.shape[1] != h:
                first, count = first // call.groups, max(count // call.groups, 1)
            return jax.lax.dynamic_slice_in_dim(a, first, count, 1)

        own = Arrays(*(part(a, n) for n, a in enumerate(x)))
        cut = lambda a, at: None if a is None else jax.lax.dynamic_slice_in_dim(a, *at)
        mine = seen if seen.ask.shape[0] == 1 else seen._replace(
            ask=cut(seen.ask, rows), hold=cut(seen.hold, rows))
        info = scalars(mine, 1, cut(side.head, heads), cut(sink, heads), side.seed,
                       cut(side.batch, rows))
        groups = own.q.shape[1] // own.k.shape[1]
        return bias_backward(call._replace(groups=groups), info, own, bias.shape)

    over_rows, over_heads = bias.shape[0] == 1 < b, bias.shape[1] == 1 < h
    row_parts = [(n, 1) for n in range(b)] if over_rows else [(0, b)]
    head_parts = [(n, 1) for n in range(h)] if over_heads else [(0, h)]
    firsts = jnp.asarray([(i[0], j[0]) for i in row_parts for j in head_parts])
    counts = row_parts[0][1], head_parts[0][1]
    one = lambda at: of((at[0], counts[0]), (at[1], counts[1]))
    if len(firsts) == 1:
        total = one(firsts[0])
    else:
        start = jnp.zeros(jax.eval_shape(one, firsts[0]).shape, F32)
        total = jax.lax.scan(lambda sum, at: (sum + one(at), None), start, firsts)[0]
    return total[:, :, :bias.shape[2], :bias.shape[3]].astype(bias.dtype)


def _forward(call: Call, info, x: Arrays, o_ref, lse_ref, m_ref, l_ref, acc_ref):
    info = Scalars(*info)
    here = Here(call, info, x, by_column=False)

    @pl.when(here.first)
    def _start():
        top = info.sink[here.local] * LOG2E if call.sink else LOW
        m_ref[...] = jnp.full(m_ref.shape, top, F32)
        l_ref[...] = jnp.full(l_ref.shape, 1.0 if call.sink else 0.0, F32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)

    def step(parts, masked):
        m, total, acc = m_ref[...], l_ref[...], acc_ref[...]
        ahead = here.logits(parts[0], masked)[0]
        for part, later in zip(parts, (*parts[1:], None)):
            s = ahead
            if later is not None:
                ahead = here.logits(later, masked)[0]
            old = cut(m, part)
            top = jnp.maximum(old, s.max(0, keepdims=True))
            p, fade = jnp.exp2(s - top), jnp.exp2(old - top)
            total = put(total, cut(total, part) * fade + p.sum(0, keepdims=True), part)
            drop = here.drop(part)
            p = p if drop is None else p * drop
            v = x.v[0, 0, part.keys]
            new = cut(acc, part) * fade + dot(v, p.astype(v.dtype), ((0,), (0,)))
            m, acc = put(m, top, part), put(acc, new, part)
        m_ref[...], l_ref[...], acc_ref[...] = m, total, acc

    here.run(step)

    @pl.when(here.last)
    def _finish():
        total = l_ref[...]
        some = total > 0
        safe = jnp.where(some, total, 1)
        o_ref[0, 0] = (acc_ref[...] / safe).T.astype(o_ref.dtype)
        lse = (m_ref[...] + jnp.log2(safe)) * (1 / LOG2E)
        lse_ref[0, 0] = jnp.where(some, lse, NEVER)


def _again(here: Here, part: Part, masked: bool):
    """p, dropped p and ds of a part [keys,queries], made again from q, k and lse."""
    x = here.x
    s, slope = here.logits(part, masked)
    p = jnp.exp2(s - x.lse[0, 0, :, part.queries])
    dp = dot(x.v[0, 0, part.keys], x.do[0, 0, part.queries], ((1,), (1,)))
    drop = here.drop(part)
    dropped, dp = (p, dp) if drop is None else (p * drop, dp * drop)
    ds = p * (dp - x.delta[0, 0, :, part.queries])
    return dropped, ds, (ds if slope is None else ds * slope)


def _by_column(call: Call, info, x: Arrays, *refs):
    """dk and dv of a key tile; and dq, where refs has room for a head's."""
    outs, accs = refs[:len(refs) // 2], refs[len(refs) // 2:]
    dk_ref, dv_ref = accs[:2]
    dq_ref = accs[2] if len(accs) > 2 else None
    info = Scalars(*info)
    here = Here(call, info, x, by_column=True)
    rows = call.tiling.rows
    if dq_ref is not None:
        @pl.when(here.p == 0)
        def _clear():
            dq_ref[...] = jnp.zeros(dq_ref.shape, F32)

    @pl.when(here.first)
    def _start():
        dk_ref[...] = jnp.zeros(dk_ref.shape, F32)
        dv_ref[...] = jnp.zeros(dv_ref.shape, F32)

    def step(parts, masked):
        at = here.group, here.row
        dq = None if dq_ref is None else dq_ref[at]
        for part in parts:
            q, do = x.q[0, 0, part.queries], x.do[0, 0, part.queries]
            p, _, ds = _again(here, part, masked)
            ds = ds.astype(q.dtype)
            dv_ref[part.keys] += dot(p.astype(do.dtype), do, ((1,), (0,)))
            dk_ref[part.keys] += dot(ds, q, ((1,), (0,)))
            if dq is not None:
                more = dot(x.k[0, 0, part.keys], ds, ((0,), (0,)))
                dq = put(dq, cut(dq, part) + more, part)
        if dq_ref is not None:
            dq_ref[at] = dq

    here.run(step)

    @pl.when(here.last)
    def _finish():
        outs[0][0, 0] = (dk_ref[...] * call.form.scale).astype(outs[0].dtype)
        outs[1][0, 0] = dv_ref[...].astype(outs[1].dtype)

    if dq_ref is not None:
        @pl.when(here.p == info.order.shape[0] - 1)
        def _write():
            for g in range(dq_ref.shape[0]):
                for i in range(dq_ref.shape[1]):
                    dq = (dq_ref[g, i] * call.form.scale).T
                    outs[2][0, g, i * rows:(i + 1) * rows] = dq.astype(outs[2].dtype)


def _by_row(call: Call, info, x: Arrays, dq_ref, acc_ref):
    """dq of a query tile."""
    here = Here(call, Scalars(*info), x, by_column=False)

    @pl.when(here.first)
    def _start():
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)

    def step(parts, masked):
        acc = acc_ref[...]
        for part in parts:
            k, ds = x.k[0, 0, part.keys], _again(here, part, masked)[2]
            more = dot(k, ds.astype(k.dtype), ((0,), (0,)))
            acc = put(acc, cut(acc, part) + more, part)
        acc_ref[...] = acc

    here.run(step)

    @pl.when(here.last)
    def _finish():
        dq_ref[0, 0] = (acc_ref[...] * call.form.scale).T.astype(dq_ref.dtype)


def _bias_tile(call: Call, shape, info, x: Arrays, db_ref, acc_ref):
    """The bias gradient of one tile, summed over the axes that are 1 in `shape`."""
    here = Here(call, Scalars(*info), x, by_column=False)

    @pl.when(here.first)
    def _start():
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)

    def step(parts, masked):
        for part in parts:
            ds = _again(here, part, masked)[1]
            ds = ds.sum(1, keepdims=True) if shape[2] == 1 else ds
            if shape[3] == 1:
                acc_ref[...] += ds.sum(0, keepdims=True)
            else:
                acc_ref[part.keys] += ds

    here.run(step)

    @pl.when(here.last)
    def _finish():
        acc = acc_ref[...]
        if shape[2] == 1:
            db_ref[0, 0] = jnp.broadcast_to(acc, (acc.shape[0], 8)).T[:1]
        else:
            db_ref[0, 0] = column(acc) if shape[3] == 1 else acc.T


def rows_forward(call: Call, info: Scalars, x: Arrays):
    """o [B,H,T,V] in v's dtype and lse [B,H,1,T] float32."""
    b, h, t, _ = x.q.shape
    rows, width = call.tiling.rows, x.v.shape[3]
    outer = lambda b, h, p, *info: unpack(info[0][p])[0]
    inner = lambda b, h, p, *info: held(b, p, info)
    cut = specs(call, x, outer, inner, lambda b, h, *a: h, lambda b, *a: b)
    row = lambda b, h, p, *info: (b, h, 0, outer(b, h, p, *info))
    return launch(
        call, _forward, (b, h, info.order.shape[0]), info, x, cut,
        [pl.BlockSpec((1, 1, rows, width),
                      lambda b, h, p, *info: (b, h, outer(b, h, p, *info), 0)),
         pl.BlockSpec((1, 1, 1, rows), row)],
        [jax.ShapeDtypeStruct((b, h, t, width), x.v.dtype),
         jax.ShapeDtypeStruct((b, h, 1, t), F32)],
        [pltpu.VMEM((1, rows), F32), pltpu.VMEM((1, rows), F32),
         pltpu.VMEM((width, rows), F32)],
        "flash_forward",
    )


def keys_backward(call: Call, info: Scalars, x: Arrays, with_dq: bool):
    """dk, dv and, `with_dq`, dq."""
    b, h, t, d = x.q.shape
    heads, s, width = x.v.shape[1:]
    rows, columns = call.tiling.rows, call.tiling.columns
    column_ = lambda b, h, p, *info: unpack(info[0][p])[1]
    rows_ = lambda b, h, p, *info: held(b, p, info)
    head = lambda b, h, p, *info: h * call.groups + info[2][p]
    cut = specs(call, x, rows_, column_, head, lambda b, *a: b)
    at = lambda b, h, p, *info: (b, h, column_(b, h, p, *info), 0)
    out_specs = [pl.BlockSpec((1, 1, columns, n), at) for n in (d, width)]
    out_shape = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x.k, x.v)]
    scratch = [pltpu.VMEM((columns, n), F32) for n in (d, width)]
    if with_dq:
        out_specs.append(
            pl.BlockSpec((1, call.groups, t, d), lambda b, h, *a: (b, h, 0, 0))
        )
        out_shape.append(jax.ShapeDtypeStruct(x.q.shape, x.q.dtype))
        scratch.append(pltpu.VMEM((call.groups, t // rows, d, rows), F32))
    grid = (b, heads, info.order.shape[0])
    return launch(call, _by_column, grid, info, x, cut, out_specs, out_shape, scratch,
                  "flash_backward" if with_dq else "flash_backward_keys")


def queries_backward(call: Call, info: Scalars, x: Arrays):
    """dq alone, for queries that do not fit on the chip."""
    b, h, _, d = x.q.shape
    rows = call.tiling.rows
    outer = lambda b, h, p, *info: unpack(info[0][p])[0]
    inner = lambda b, h, p, *info: held(b, p, info)
    cut = specs(call, x, outer, inner, lambda b, h, *a: h, lambda b, *a: b)
    return launch(
        call, _by_row, (b, h, info.order.shape[0]), info, x, cut,
        pl.BlockSpec((1, 1, rows, d),
                     lambda b, h, p, *info: (b, h, outer(b, h, p, *info), 0)),
        jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
        [pltpu.VMEM((d, rows), F32)], "flash_backward_queries",
    )


def bias_backward(call: Call, info: Scalars, x: Arrays, shape: tuple[int, ...]):
    """The gradient [B,H,T|1,S|1] of a bias of `shape`, float32; every tile of the list
    is written, so the list has to hold all of them."""
    b, h = x.q.shape[:2]
    rows, columns = call.tiling.rows, call.tiling.columns
    row = lambda b, h, p, *info: unpack(info[0][p])[0]
    column_ = lambda b, h, p, *info: unpack(info[0][p])[1]
    cut = specs(call, x, row, column_, lambda b, h, *a: h, lambda b, *a: b)
    tall, wide = shape[2] > 1, shape[3] > 1
    index = lambda *a: (
        a[0], a[1], row(*a) if tall else 0, column_(*a) if wide else 0
    )
    sizes = x.q.shape[2] if tall else 1, x.k.shape[2] if wide else 1
    block = rows if tall else 1, columns if wide else 1
    return launch(
        call, lambda call, *refs: _bias_tile(call, shape, *refs),
        (b, h, info.order.shape[0]), info, x, cut,
        pl.BlockSpec((1, 1, *block), index),
        jax.ShapeDtypeStruct((b, h, *sizes), F32),
        [pltpu.VMEM(block[::-1], F32)], "flash_backward_bias",
    )
