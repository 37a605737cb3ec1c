"""The gradient of a bias in flash attention for TPU: see `pallas_kernels/flash/tpu.py`.

Every tile is made again, and what it adds is summed over the axes that are 1 in the
bias: inside a kernel over queries and keys, one after the other over rows of the batch
and heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.tpu_tile import (
    Arrays, Call, Scalars, TileContext, launch, listed_column, listed_row, own_head,
    scalars, specs
)
from pallas_kernels.machine.product import F32
from pallas_kernels.machine.tpu import column
from pallas_kernels.schedule import Side


def bias_gradient(call, side: Side, sink, x, bias, listed) -> jax.Array:
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
                # the key heads that these query heads read
                first, count = first // call.groups, max(count // call.groups, 1)
            return jax.lax.dynamic_slice_in_dim(a, first, count, 1)

        own = Arrays(*(part(a, n) for n, a in enumerate(x)))

        def cut(a, at):
            return None if a is None else jax.lax.dynamic_slice_in_dim(a, *at)

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

    def one(at):
        return of((at[0], counts[0]), (at[1], counts[1]))

    if len(firsts) == 1:
        total = one(firsts[0])
    else:
        # one after the other: all at once are B H times the bias
        start = jnp.zeros(jax.eval_shape(one, firsts[0]).shape, F32)
        total = jax.lax.scan(lambda sum, at: (sum + one(at), None), start, firsts)[0]
    return total[:, :, :bias.shape[2], :bias.shape[3]].astype(bias.dtype)


def _bias_tile(call: Call, shape, info, x: Arrays, db_ref, acc_ref):
    """The bias gradient of one tile, summed over the axes that are 1 in `shape`."""
    ctx = TileContext(call, Scalars(*info), x, by_column=False)

    @pl.when(ctx.first)
    def _start():
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)  # [keys|1,queries|1]

    def step(parts, masked):
        for part in parts:
            ds = ctx.recompute(part, masked)[1]  # [keys,queries]
            ds = ds.sum(1, keepdims=True) if shape[2] == 1 else ds  # over queries
            if shape[3] == 1:
                acc_ref[...] += ds.sum(0, keepdims=True)  # over keys
            else:
                acc_ref[part.keys] += ds

    ctx.run(step)

    @pl.when(ctx.last)
    def _finish():
        acc = acc_ref[...]
        if shape[2] == 1:
            # [keys,1] -> [1,keys], by way of 8 lanes
            db_ref[0, 0] = jnp.broadcast_to(acc, (acc.shape[0], 8)).T[:1]
        else:
            db_ref[0, 0] = column(acc) if shape[3] == 1 else acc.T


def bias_backward(call: Call, info: Scalars, x: Arrays, shape: tuple[int, ...]):
    """The gradient [B,H,T|1,S|1] of a bias of `shape`, float32; every tile of the list
    is written, so the list has to hold all of them."""
    b, h = x.q.shape[:2]
    rows, columns = call.tiling.rows, call.tiling.columns
    cut = specs(call, x, listed_row, listed_column, own_head)
    tall, wide = shape[2] > 1, shape[3] > 1

    def index(b, h, *step):
        return (b, h, listed_row(b, h, *step) if tall else 0,
                listed_column(b, h, *step) if wide else 0)

    sizes = x.q.shape[2] if tall else 1, x.k.shape[2] if wide else 1
    block = rows if tall else 1, columns if wide else 1
    return launch(
        call, lambda call, *refs: _bias_tile(call, shape, *refs),
        (b, h, info.order.shape[0]), info, x, cut,
        pl.BlockSpec((1, 1, *block), index),
        jax.ShapeDtypeStruct((b, h, *sizes), F32),
        [pltpu.VMEM(block[::-1], F32)], "flash_backward_bias",
    )
