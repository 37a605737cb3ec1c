"""Flash attention for Hopper by Mosaic GPU, forward: TMA, wgmma, parted warpgroups.

A block owns 64 queries for each warpgroup that computes, two or three of them; one more
warpgroup loads tiles of k and v into a ring of shared memory. Logits come from shared
memory, weights stay in registers and are the left side of the product with v. That
product runs beside the logits of the next tile, and while a warpgroup is at its
softmax another has the matrix units: they take turns. Under a causal mask the longest
lines start first. bfloat16 and float16, D and V up to 256 (padded to 64s); no bias, no
dropout: Triton's kernel does the rest.

Two limits, counted in the program that ptxas makes for sm_90a (D=128, tile 64 x 128, no
mask): 1024 cycles of the matrix units (2 x 64 x 128 x 128 multiply-adds at 2048 a
cycle), against 528 cycles of 2^x (66 a thread, 16 a cycle and SM) and 469 issue slots
of each of the four schedulers. Matrix units are the limit, if the turns hide the rest;
at D=64 it is 512 against 528, and 2^x is the limit. Nothing here was measured.

Sources: Shah et al., 2024, arXiv:2407.08608; Dao, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash import mosaic_backward
from pallas_kernels.flash.mosaic_order import Order, of_a_head, order
from pallas_kernels.flash.mosaic_scratch import ForwardScratch, split
from pallas_kernels.flash.mosaic_tile import (
    Arrays, Call, Line, TileContext, arrays, fetch_keys, first_logit, line, online, run
)
from pallas_kernels.machine.hopper import (
    F32, ROWS, Tile, products, share, shared, spread, zeros
)
from pallas_kernels.schedule import Side, Static
from pallas_kernels.tile import LOW


def forward(static: Static, side: Side, q, k, v, bias, sink):
    """o [B,T,H,V] in v's dtype, m and l [B,H,T] float32, m times log2(e)."""
    t = static.tiling
    call = Call(static.form, t, q.shape[2] // k.shape[2], t.rows // ROWS,
                (static.tiles[0].num_stages,) * 2, bool(static.interpret),
                variant=static.variant)
    turns = plgpu.Barrier(num_barriers=call.warpgroups),
    return over_keys(
        call, static.block_masks(t, side), side, q, k, v, sink, turns, _attend)


def over_keys(call: Call, block_masks, side: Side, q, k, v, sink, more, attend):
    """o, m and l, given what is asked of each tile, with a warpgroup that loads and
    some that compute their queries by `attend`; more: scratch that only these know."""
    t = call.tiling
    (b, _, h, _), width = q.shape, v.shape[3]
    x = arrays(call, side, q, k, v, sink)
    tall = t.grid[0] * t.rows  # whole tiles
    o = jax.ShapeDtypeStruct((b, x.q.shape[1], h, x.v.shape[3]), v.dtype)
    sums = [jax.ShapeDtypeStruct((b, h, tall), F32)] * 2  # m, l [B,H,T']
    passed = of_a_head(x.k) + of_a_head(x.v)
    order_ = order(t.grid[0], b, h, call.groups, passed, call.variant)
    o, *sums = run(
        call, functools.partial(_forward, attend, order_), order_.grid, x,
        line(*block_masks), [o, *sums], (*_scratch(call, x), *more), "flash_forward",
    )
    return o[:, :t.t, :, :width], *(a[:, :, :t.t] for a in sums)


def backward(static: Static, side: Side, q, k, v, bias, sink, base, delta, do):
    """dq, dk, dv, d(bias), given base, delta [B,H,T] and do [B,T,H,V]; base: what
    weights are made again from, times log2(e)."""
    return *mosaic_backward.backward(
        static, side, q, k, v, sink, base, delta, do), None


def _scratch(call: Call, x: Arrays) -> ForwardScratch:
    n, c, groups = call.stages[0], call.tiling.columns, call.warpgroups
    rows = call.tiling.rows // groups
    d, width, kind = x.q.shape[3], x.v.shape[3], x.q.dtype
    barrier = plgpu.Barrier
    return ForwardScratch(
        shared((groups, rows, d), kind), shared((n, c, d), kind),  # q; ring of k
        shared((n, c, width), kind),  # ring of v
        # the output takes the place of q where it can
        None if d == width else shared((groups, rows, width), kind),
        plgpu.SMEM((groups, rows), F32), plgpu.SMEM((groups, rows), F32),  # m, l
        # q, k and v are there; all warpgroups have used k, and v
        barrier(num_barriers=groups), barrier(num_barriers=n), barrier(num_barriers=n),
        barrier(num_arrivals=groups, num_barriers=n),
        barrier(num_arrivals=groups, num_barriers=n),
    )


def _forward(attend, order_: Order, call: Call, x: Arrays, seen: Line, outs, scratch):
    group = jax.lax.axis_index("group")
    tile, b, h = order_.here()
    # later query tiles have the longer lines under a causal mask: they start first
    tile = call.tiling.grid[0] - 1 - tile
    ctx = TileContext(call, x, b, h)
    at, steps = seen.of(b, tile)
    own, more = split(ForwardScratch, scratch)
    share(group, call.warpgroups,
          lambda: fetch_keys(ctx, at, steps[1], own),
          lambda: attend(ctx, at, steps, outs, own, more, group, tile))


def _attend(ctx: TileContext, at, steps, outs, own: ForwardScratch, more, group, tile):
    """A warpgroup that computes 64 queries. The weights of a tile meet its values while
    the next tile's logits are made: p is what is still to be multiplied."""
    (q_smem, k_ring, v_ring, o_smem, m_smem, l_smem, q_there, k_there, v_there, k_free,
     v_free), (turn,) = own, more
    call, x, interpret = ctx.call, ctx.x, ctx.call.interpret
    whole, count = steps
    last = call.warpgroups - 1
    first = tile * call.tiling.rows + group * ROWS
    queries = ctx.b, pl.ds(first, ROWS), ctx.h
    q = q_smem.at[group]
    slot = call.slot

    def key(n):
        return at(n) * call.tiling.columns

    plgpu.copy_gmem_to_smem(x.q.at[queries], q, q_there.at[group])  # [64,D]

    # turns begin with warpgroup 0
    @pl.when(group == last)
    def _():
        plgpu.barrier_arrive(turn.at[0])

    plgpu.barrier_wait(q_there.at[group])

    def logits(s, n, masked):
        need = masked or call.form.score is not None
        return ctx.logits(s, first, key(n) if need else None, masked)[:2]

    def pass_on():
        plgpu.barrier_arrive(turn.at[jax.lax.rem(group + 1, jnp.int32(last + 1))])

    tall = ROWS, call.tiling.columns
    wide = ROWS, x.v.shape[3]

    def open_line(begin):
        # q k^T: [64,D] by [columns,D] is [64,columns]
        s = begin(0, q, Tile(k_ring.at[0]))
        pass_on()  # to the next warpgroup, whose logits may begin
        s = s()  # until q k^T is there
        plgpu.barrier_arrive(k_free.at[0])  # k was read
        start, total = zeros((ROWS,), interpret, LOW), zeros((ROWS,), interpret, 0.0)
        if x.sink is not None:
            start, total = first_logit(x.sink[ctx.h], start, total)
        s, unit = logits(s, 0, True)  # masked: a line may have no whole tile
        p, m, total, _ = online(s, unit, start, total)
        return p.astype(x.v.dtype), m, total  # 16 bits, as v

    plgpu.barrier_wait(k_there.at[0])
    plgpu.barrier_wait(turn.at[group])
    p, m, total = products(interpret, [tall], open_line)

    def step(n, carry, masked):
        acc, p, m, total = carry
        now, before = slot(n), slot(n - 1)
        plgpu.barrier_wait(k_there.at[now])
        plgpu.barrier_wait(v_there.at[before])
        plgpu.barrier_wait(turn.at[group])  # the matrix units are free

        def work(begin):
            s = begin(0, q, Tile(k_ring.at[now]))  # q k^T of this tile
            # p v of the tile before: [64,columns] by [columns,V] is [64,V]
            o = begin(1, p, v_ring.at[before])
            pass_on()
            s = s(1)  # q k^T is there, p v may go on
            plgpu.barrier_arrive(k_free.at[now])
            s, unit = logits(s, n, masked)
            ahead, top, new, rescale = online(s, unit, m, total)  # beside p v
            found = o()  # p v [64,V]
            plgpu.barrier_arrive(v_free.at[before])  # v was read
            # no sooner: the product that is under way reads the registers of p
            ahead = ahead.astype(x.v.dtype)
            # what all tiles before this one left, faded to the new maximum
            return found * spread(rescale, wide, False), ahead, top, new

        return products(interpret, [tall, acc], work)

    carry = zeros(wide, interpret), p, m, total
    one = jnp.maximum(whole, 1)  # the first tile is done
    carry = jax.lax.fori_loop(1, one, lambda n, c: step(n, c, False), carry)
    carry = jax.lax.fori_loop(one, count, lambda n, c: step(n, c, True), carry)
    acc, p, m, total = carry
    end = slot(count - 1)
    plgpu.barrier_wait(v_there.at[end])
    # the last tile's p v has no logits beside it
    acc = products(interpret, [acc], lambda begin: begin(0, p, v_ring.at[end])())
    plgpu.barrier_arrive(v_free.at[end])

    # the last turn is taken by nobody: who arrives has to be waited for
    @pl.when(group == 0)
    def _():
        plgpu.barrier_wait(turn.at[0])

    safe = jnp.where(total > 0, total, 1.0)  # o = 0 where nothing is seen
    o = acc * spread(1 / safe, acc.shape, False)
    o_smem = q_smem if o_smem is None else o_smem  # q was read: o takes its place
    write(ctx, o, m, total, outs, (o_smem, m_smem, l_smem), group, queries)


def write(ctx: TileContext, o, m, total, outs, smem, group, queries) -> None:
    """The end of a line: o [queries,V], the maximum in base 2, and the sum."""
    o_ref, *sums_ref = outs
    o_smem, *sums_smem = (ref.at[group] for ref in smem)
    o_smem[...] = o.astype(o_ref.dtype)
    # m and l apart: in L = m + log l a large m leaves nothing of l
    for smem_ref, a in zip(sums_smem, (m, total)):
        smem_ref[...] = a
    plgpu.commit_smem()  # before the copies read them
    plgpu.copy_smem_to_gmem(o_smem, o_ref.at[queries])
    for smem_ref, ref in zip(sums_smem, sums_ref):
        plgpu.copy_smem_to_gmem(smem_ref, ref.at[ctx.b, ctx.h, queries[1]])
    plgpu.wait_smem_to_gmem(0)  # before the block ends
