"""Flash attention for Blackwell by Mosaic GPU, backward: a kernel for dk and dv, which
passes over query tiles of all query heads of a key head, and one for dq, which passes
over key tiles. Nothing is added up in main memory: every run gives the same bits.

**It has compiled for sm_100a and was interpreted on a CPU; it has never run on a GPU.**

A block owns 128 keys, or 128 queries, the lanes of tensor memory. There logits and
dp = do v^T of a tile are made, each of two warpgroups takes half of its columns to
registers, and the weights and ds go back, 16 bits each, as left sides of the products
that add to dv and dk, or dq. The first warpgroup begins all products, a third loads.
While a tile is at its softmax, the products of the one before and the logits and dp of
the next are under way, so that rings of tiles whose sums come last have three stages.
The block's own two tiles are left sides, too: as many as fit are kept in tensor memory.

Limits of a tile, in cycles, without mask: flops at 8192 a cycle and multiprocessor,
2^x at 16, and what products and warpgroups read from shared memory at 128 bytes.

| kernel, D and V | lanes x columns | tensor memory | matrix | 2^x | shared |
| dk and dv, 64 and 64 | 128 x 64 | 384, k and v in it | 512 | 512 | 384 |
| dk and dv, 128 and 128 | 128 x 64 | 512, k in it | 1024 | 512 | 896 |
| dk and dv, 192 and 128 | 128 x 64 | 512 | 1280 | 512 | 1408 |
| dq, 64 and 64 | 128 x 128 | 448, q and do in it | 768 | 1024 | 384 |
| dq, 128 and 128 | 128 x 128 | 512, q in it | 1536 | 1024 | 1024 |
| dq, 192 and 128 | 128 x 64 | 512, q and do in it | 1024 | 512 | 512 |

Seven products instead of the five that are needed: at most 5/7 of the peak counts as
useful. Nothing here was measured.

Sources: Dao, 2023, arXiv:2307.08691; Shah et al., 2024, arXiv:2407.08608.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.blackwell_tile import Halves, halved
from pallas_kernels.flash.mosaic_gradients import (
    calls, key_gradients, query_gradients
)
from pallas_kernels.flash.mosaic_scratch import KeyScratch, QueryScratch
from pallas_kernels.flash.mosaic_tile import Arrays, Call, TileContext, weights
from pallas_kernels.machine.blackwell import ROW, ROWS
from pallas_kernels.machine.hopper import Tile, spread, vector
from pallas_kernels.schedule import Side, Static


def backward(static: Static, side: Side, q, k, v, base, delta, do):
    """dq, dk, dv, given base, delta [B,H,T] and do [B,T,H,V]."""
    by_key, by_query = calls(static, q.shape[2] // k.shape[2], ROW)
    d, width = (-(-a.shape[3] // 64) * 64 for a in (q, v))
    given = side, q, k, v, do, base, delta
    # sums dv and dk, left sides k and v
    more = halved(by_key, by_key.tiling.rows, q.dtype, (width, d), (d, width))
    dk, dv = key_gradients(by_key, static, 1, more, _key_sums, *given)
    # the sum dq, left sides q and do
    more = halved(by_query, by_query.tiling.columns, q.dtype, (d,), (d, width))
    return query_gradients(by_query, static, 1, more, _query_sums, *given), dk, dv


def _key_sums(call: Call, x: Arrays, at, steps, outs, own: KeyScratch, more, place,
              head) -> None:
    """A warpgroup's part of dk and dv of 128 keys: half of the queries of each tile."""
    (k_smem, v_smem, q_ring, do_ring, lse_ring, delta_ring, there, q_there, do_there,
     free) = own
    group, tile, b, kv = place
    halves = Halves.of(call, group, more, 2)
    (whole, count), size = steps, call.tiling.rows
    total, first = count * call.groups, tile * call.tiling.columns
    keys = b, pl.ds(first, ROWS), kv
    k_smem, v_smem = k_smem.at[0], v_smem.at[0]
    slot = call.slot

    k, v = halves.open(((x.k.at[keys], k_smem, there.at[0]),
                        (x.v.at[keys], v_smem, there.at[1])))

    def begin(n):
        plgpu.barrier_wait(q_there.at[slot(n)])
        plgpu.barrier_wait(do_there.at[slot(n)])
        # k q^T and v do^T: [128,D], [128,V] by [rows,.] are [128,rows]
        halves.begin((k, Tile(q_ring.at[slot(n)])), (v, Tile(do_ring.at[slot(n)])))

    def end(n):
        plgpu.barrier_wait(halves.added)
        plgpu.commit_smem()  # lse and delta were read, and a copy may overwrite them
        plgpu.barrier_arrive(free.at[slot(n)])

    def one_head(g, carry):
        ctx = TileContext(call, x, b, head(g), turned=True)

        def step(i, carry, masked):
            n = g * count + i
            need = masked or call.form.score is not None
            row = at(i) * size + halves.first if need else None
            s, dp = halves.tile()  # [128,rows/2] each

            # the next tile's logits and dp are made beside this softmax
            @pl.when(n + 1 < total)
            def _():
                begin(n + 1)

            lse, delta = (
                vector(ring.at[slot(n), halves.mine], True, call.interpret, ROW)
                for ring in (lse_ring, delta_ring))
            s, unit, slope = ctx.logits(s, row, first, masked)
            p = weights(s, unit, lse, True)  # P = 2^(s - L)
            ds = p * (dp - spread(delta, dp.shape, True))  # dS = P (dP - D)
            ds = ds if slope is None else ds * slope  # of a softcap

            # left sides and rings are free when the sums before are there
            @pl.when(n > 0)
            def _():
                end(n - 1)

            # dv += P dO, dk += dS q: [128,rows] by [rows,V] and [rows,D]
            halves.add((p, ds), (do_ring.at[slot(n)], q_ring.at[slot(n)]), n > 0)
            return carry

        carry = jax.lax.fori_loop(0, whole, lambda n, c: step(n, c, False), carry)
        return jax.lax.fori_loop(whole, count, lambda n, c: step(n, c, True), carry)

    begin(jnp.int32(0))
    jax.lax.fori_loop(0, call.groups, one_head, None)
    end(total - 1)

    # each warpgroup writes one of the two
    @pl.when(group == 0)
    def _():
        halves.save(1, call.form.scale, k_smem, outs[0].at[keys])

    @pl.when(group == 1)
    def _():
        halves.save(0, 1.0, v_smem, outs[1].at[keys])


def _query_sums(ctx: TileContext, at, steps, dq_ref, own: QueryScratch, more, group,
                tile) -> None:
    """A warpgroup's part of dq of 128 queries: half of the keys of each tile."""
    q_smem, do_smem, k_ring, v_ring, there, k_there, v_there, k_free, v_free = own
    call, x = ctx.call, ctx.x
    halves = Halves.of(call, group, more, 1)
    (whole, count), size = steps, call.tiling.columns
    first = tile * call.tiling.rows
    queries = ctx.b, pl.ds(first, ROWS), ctx.h
    vectors = ctx.b, ctx.h, pl.ds(first, ROWS)
    q_smem, do_smem = q_smem.at[0], do_smem.at[0]
    slot, v_slot = call.slot, functools.partial(call.slot, ring=1)

    q, do = halves.open(((x.q.at[queries], q_smem, there.at[0]),
                         (x.do.at[queries], do_smem, there.at[1])))
    lse, delta = (vector(ref.at[vectors], False, call.interpret, ROW)
                  for ref in (x.lse, x.delta))

    def begin(n):
        plgpu.barrier_wait(k_there.at[slot(n)])
        plgpu.barrier_wait(v_there.at[v_slot(n)])
        # q k^T and do v^T: [128,columns] each
        halves.begin((q, Tile(k_ring.at[slot(n)])), (do, Tile(v_ring.at[v_slot(n)])))

    def end(n):
        plgpu.barrier_wait(halves.added)
        plgpu.barrier_arrive(k_free.at[slot(n)])

    def step(n, carry, masked):
        need = masked or call.form.score is not None
        key = at(n) * size + halves.first if need else None
        s, dp = halves.tile()  # [128,columns/2] each
        plgpu.barrier_arrive(v_free.at[v_slot(n)])  # v was read

        # the next tile's logits and dp are made beside this softmax
        @pl.when(n + 1 < count)
        def _():
            begin(n + 1)

        s, unit, slope = ctx.logits(s, first, key, masked)
        p = weights(s, unit, lse, False)  # P = 2^(s - L)
        ds = p * (dp - spread(delta, dp.shape, False))  # dS = P (dP - D)
        ds = ds if slope is None else ds * slope  # of a softcap

        # left sides and k are free when the sums before are there
        @pl.when(n > 0)
        def _():
            end(n - 1)

        # dq += dS k: [128,columns] by [columns,D] is [128,D]
        halves.add((ds,), (k_ring.at[slot(n)],), n > 0)
        return carry

    begin(jnp.int32(0))
    jax.lax.fori_loop(0, whole, lambda n, c: step(n, c, False), None)
    jax.lax.fori_loop(whole, count, lambda n, c: step(n, c, True), None)
    end(count - 1)

    @pl.when(group == 0)
    def _():
        halves.save(0, call.form.scale, q_smem, dq_ref.at[queries])
