"""Flash attention for Hopper by Mosaic GPU, backward: a kernel for dk and dv, which
passes over query tiles of all query heads of a key head, and one for dq, which passes
over key tiles. Each makes the weights again; nothing is added up in main memory, so
that every run gives the same bits.

A warpgroup owns 64 keys, or 64 queries; where dk and dv of 64 keys do not fit into its
registers (D + V above 256), see `mosaic_wide.py`. For dq, the product with k runs
beside the next tile's logits.

The limit, counted as in `mosaic.py` (D=128, tile 64 x 64, no mask): 1024 cycles
of the matrix units for dk and dv and 768 for dq, against 256 of 2^x and 303 and 299
issue slots. Seven products instead of the five that are needed: at most 5/7 of the peak
counts as useful.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.mosaic_gradients import (
    calls, key_gradients, query_gradients
)
from pallas_kernels.flash.mosaic_scratch import KeyScratch, QueryScratch
from pallas_kernels.flash.mosaic_tile import Arrays, Call, TileContext, weights
from pallas_kernels.flash.mosaic_wide import handover, wide_sums
from pallas_kernels.machine.hopper import ROWS, Tile, products, spread, vector, zeros
from pallas_kernels.schedule import Side, Static


def backward(static: Static, side: Side, q, k, v, sink, base, delta, do):
    """dq, dk, dv, given base, delta [B,H,T] and do [B,T,H,V]."""
    by_key, by_query = calls(static, q.shape[2] // k.shape[2])
    given = side, q, k, v, do, base, delta
    # one warpgroup keeps dk of a tile's keys and another dv, or each those of its keys
    split = by_key.tiling.columns == ROWS
    own, sums = (1, wide_sums) if split else (by_key.warpgroups, _key_sums)
    more = handover(by_key) if split else ()
    dk, dv = key_gradients(by_key, static, own, more, sums, *given)
    dq = query_gradients(by_query, static, by_query.warpgroups, (), _query_sums, *given)
    return dq, dk, dv


def _key_sums(call: Call, x: Arrays, at, steps, outs, own: KeyScratch, more, place,
              head):
    """A warpgroup that computes dk and dv of 64 keys."""
    (k_smem, v_smem, q_ring, do_ring, lse_ring, delta_ring, there, q_there, do_there,
     free) = own
    group, tile, b, kv = place
    interpret, kind = call.interpret, x.q.dtype
    whole, count = steps
    first = tile * call.tiling.columns + group * ROWS
    keys = b, pl.ds(first, ROWS), kv
    k, v = k_smem.at[group], v_smem.at[group]
    plgpu.copy_gmem_to_smem(x.k.at[keys], k, there.at[group])  # [64,D]
    plgpu.copy_gmem_to_smem(x.v.at[keys], v, there.at[group])  # [64,V]
    plgpu.barrier_wait(there.at[group])
    tall = ROWS, call.tiling.rows  # keys by queries

    def one_head(g, carry):
        ctx = TileContext(call, x, b, head(g), turned=True)

        def step(n, carry, masked):
            dk, dv = carry
            slot = call.slot(g * count + n)
            q, do = q_ring.at[slot], do_ring.at[slot]
            need = masked or call.form.score is not None
            row = at(n) * call.tiling.rows if need else None
            plgpu.barrier_wait(q_there.at[slot])
            plgpu.barrier_wait(do_there.at[slot])

            def weigh(begin):
                # k q^T and v do^T: [64,D], [64,V] by [rows,.] are [64,rows]
                s = begin(0, k, Tile(q))
                dp = begin(1, v, Tile(do))
                lse = vector(lse_ring.at[slot], True, interpret)
                # k q^T is there, v do^T may go on
                s, unit, slope = ctx.logits(s(1), row, first, masked)
                p = weights(s, unit, lse, True)  # P = 2^(s - L)
                delta = vector(delta_ring.at[slot], True, interpret)
                ds = p * (dp() - spread(delta, tall, True))  # dS = P (dP - D)
                ds = ds if slope is None else ds * slope  # of a softcap
                return p.astype(kind), ds.astype(kind)  # 16 bits, as left sides

            p, ds = products(interpret, [tall, tall], weigh)

            def add(begin):
                new_dv = begin(1, p, do)  # [64,rows] [rows,V]
                new_dk = begin(0, ds, q)  # [64,rows] [rows,D]
                return new_dk(), new_dv()

            carry = products(interpret, [dk, dv], add)
            plgpu.barrier_arrive(free.at[slot])  # q and do were read
            return carry

        def early(n, carry, masked):
            """`step` with k q^T alone at first, and dv begun with v do^T: p is ready
            by then, so that dv runs while ds is made."""
            dk, dv = carry
            slot = call.slot(g * count + n)
            q, do = q_ring.at[slot], do_ring.at[slot]
            asked = masked is not False or call.form.score is not None
            row = at(n) * call.tiling.rows if asked else None
            plgpu.barrier_wait(q_there.at[slot])

            def weigh(begin):
                s = begin(0, k, Tile(q))  # k q^T: [64,D] by [rows,D] is [64,rows]
                lse = vector(lse_ring.at[slot], True, interpret)
                s, unit, slope = ctx.logits(s(), row, first, masked)
                return weights(s, unit, lse, True), slope  # P = 2^(s - L)

            p, slope = products(interpret, [tall], weigh)
            low = p.astype(kind)
            plgpu.barrier_wait(do_there.at[slot])

            def sums(begin):
                dp = begin(0, v, Tile(do))  # v do^T
                new_dv = begin(1, low, do)  # [64,rows] [rows,V]
                delta = vector(delta_ring.at[slot], True, interpret)
                ds = p * (dp(1) - spread(delta, tall, True))  # dS = P (dP - D)
                ds = ds if slope is None else ds * slope  # of a softcap
                return new_dv(), ds.astype(kind)

            dv, ds = products(interpret, [tall, dv], sums)
            dk = products(interpret, [dk], lambda begin: begin(0, ds, q)())
            plgpu.barrier_arrive(free.at[slot])  # q and do were read
            return dk, dv

        one_loop = "one_loop" in call.variant
        turn = early if one_loop or "early_dv" in call.variant else step

        if one_loop:
            return jax.lax.fori_loop(
                0, count, lambda n, c: turn(n, c, n >= whole), carry)
        carry = jax.lax.fori_loop(0, whole, lambda n, c: turn(n, c, False), carry)
        return jax.lax.fori_loop(whole, count, lambda n, c: turn(n, c, True), carry)

    carry = tuple(zeros((ROWS, a.shape[3]), interpret) for a in (x.q, x.v))
    if call.groups == 1:
        dk, dv = one_head(0, carry)
    else:
        dk, dv = jax.lax.fori_loop(0, call.groups, one_head, carry)
    k[...] = (dk * call.form.scale).astype(kind)  # k was read: dk takes its place
    v[...] = dv.astype(kind)  # and dv that of v
    plgpu.commit_smem()  # before the copies read them
    plgpu.copy_smem_to_gmem(k, outs[0].at[keys])
    plgpu.copy_smem_to_gmem(v, outs[1].at[keys])
    plgpu.wait_smem_to_gmem(0)


def _query_sums(ctx: TileContext, at, steps, dq_ref, own: QueryScratch, more, group,
                tile):
    """A warpgroup that computes dq of 64 queries. ds of a tile meets its keys while the
    next tile's logits are made."""
    q_smem, do_smem, k_ring, v_ring, there, k_there, v_there, k_free, v_free = own
    call, x, interpret = ctx.call, ctx.x, ctx.call.interpret
    kind = x.q.dtype
    whole, count = steps
    first = tile * call.tiling.rows + group * ROWS
    queries = ctx.b, pl.ds(first, ROWS), ctx.h
    vectors = ctx.b, ctx.h, pl.ds(first, ROWS)
    q, do = q_smem.at[group], do_smem.at[group]
    slot, v_slot = call.slot, functools.partial(call.slot, ring=1)
    plgpu.copy_gmem_to_smem(x.q.at[queries], q, there.at[group])
    plgpu.copy_gmem_to_smem(x.do.at[queries], do, there.at[group])
    lse = vector(x.lse.at[vectors], False, interpret)
    delta = vector(x.delta.at[vectors], False, interpret)
    plgpu.barrier_wait(there.at[group])
    tall = ROWS, call.tiling.columns

    def weigh(n, s, masked):
        """The weights of a tile, from its logits, and the slope of a softcap."""
        need = masked or call.form.score is not None
        key = at(n) * call.tiling.columns if need else None
        s, unit, slope = ctx.logits(s, first, key, masked)
        return weights(s, unit, lse, False), slope

    def sloped(n, p, slope, dp):
        ds = p * (dp - spread(delta, tall, False))  # dS = P (dP - D)
        plgpu.barrier_arrive(v_free.at[v_slot(n)])  # v was read
        return ds if slope is None else ds * slope

    def alone(n, masked):
        """ds of a tile, when nothing else is under way; one product at a time, which
        leaves wide heads registers enough."""
        # q k^T, and then do v^T: [64,columns] each
        plgpu.barrier_wait(k_there.at[slot(n)])
        p, slope = products(interpret, [tall], lambda begin: weigh(
            n, begin(0, q, Tile(k_ring.at[slot(n)]))(), masked))
        plgpu.barrier_wait(v_there.at[v_slot(n)])
        return products(interpret, [tall], lambda begin: sloped(
            n, p, slope, begin(0, do, Tile(v_ring.at[v_slot(n)]))()).astype(kind))

    def add(dq, ds, n):
        # dq += dS k: [64,columns] by [columns,D] is [64,D]
        dq = products(interpret, [dq], lambda begin: begin(0, ds, k_ring.at[slot(n)])())
        plgpu.barrier_arrive(k_free.at[slot(n)])  # k was read
        return dq

    def step(n, carry, masked):
        dq, ds = carry
        now, before = slot(n), slot(n - 1)
        plgpu.barrier_wait(k_there.at[now])
        plgpu.barrier_wait(v_there.at[v_slot(n)])

        def work(begin):
            # q k^T: [64,D] by [columns,D] is [64,columns]
            s = begin(0, q, Tile(k_ring.at[now]))
            new_dq = begin(1, ds, k_ring.at[before])  # dS k of the tile before
            dp = begin(2, do, Tile(v_ring.at[v_slot(n)]))  # do v^T
            p, slope = weigh(n, s(2), masked)  # two products go on
            new_ds = sloped(n, p, slope, dp())
            found = new_dq()  # [64,D]
            plgpu.barrier_arrive(k_free.at[before])  # k was read
            return found, new_ds.astype(kind)

        return products(interpret, [tall, dq, tall], work)

    dq = zeros((ROWS, x.q.shape[3]), interpret)
    # dq of a wide head and two tiles do not fit into the registers
    if x.q.shape[3] > 192:
        def each(n, dq, masked):
            return add(dq, alone(n, masked), n)

        dq = jax.lax.fori_loop(0, whole, lambda n, c: each(n, c, False), dq)
        dq = jax.lax.fori_loop(whole, count, lambda n, c: each(n, c, True), dq)
    else:
        carry, one = (dq, alone(0, True)), jnp.maximum(whole, 1)
        carry = jax.lax.fori_loop(1, one, lambda n, c: step(n, c, False), carry)
        carry = jax.lax.fori_loop(one, count, lambda n, c: step(n, c, True), carry)
        dq, ds = carry
        dq = add(dq, ds, count - 1)  # the last tile's
    q[...] = (dq * call.form.scale).astype(kind)  # q was read: dq takes its place
    plgpu.commit_smem()  # before the copy reads it
    plgpu.copy_smem_to_gmem(q, dq_ref.at[queries])
    plgpu.wait_smem_to_gmem(0)
