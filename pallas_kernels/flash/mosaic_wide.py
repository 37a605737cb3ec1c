"""dk and dv of wide heads on Hopper: the sums of 64 keys fill the registers of two
warpgroups, so one keeps dv and the other dk.

The first makes the weights of a tile and adds up dv; it hands the weights over through
shared memory to the second, which meanwhile has made do v^T, and adds up dk. Each has
two of the four matrix products.
"""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.mosaic_scratch import HandoverScratch, KeyScratch
from pallas_kernels.flash.mosaic_tile import Arrays, Call, TileContext, weights
from pallas_kernels.machine.hopper import (
    F32, ROWS, Tile, matrix, products, shared, spread, vector, zeros
)


def handover(call: Call):
    """Scratch for the weights of a tile, and for both to wait for each other."""
    return HandoverScratch(
        shared((ROWS, call.tiling.rows), F32), plgpu.Barrier(), plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=2))


def wide_sums(call: Call, x: Arrays, at, steps, outs, own: KeyScratch, more, place,
              head) -> None:
    """The two warpgroups that compute dk and dv of 64 keys."""
    group, tile, b, kv = place
    keys = b, pl.ds(tile * call.tiling.columns, ROWS), kv
    hand = HandoverScratch(*more)
    k, v, there, done = own.k.at[0], own.v.at[0], own.there, hand.done
    kind = x.q.dtype

    def save(total, smem, ref):
        # each writes over what only the other one reads
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        smem[...] = total.astype(kind)
        plgpu.commit_smem()  # before the copy reads it
        plgpu.copy_smem_to_gmem(smem, ref.at[keys])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 0)
    def _():
        plgpu.copy_gmem_to_smem(x.k.at[keys], k, there.at[0])
        plgpu.barrier_wait(there.at[0])
        save(_values(call, x, at, steps, own, hand, place, head), v, outs[1])

    @pl.when(group == 1)
    def _():
        plgpu.copy_gmem_to_smem(x.v.at[keys], v, there.at[1])
        plgpu.barrier_wait(there.at[1])
        save(_keys(call, x, steps[1], own, hand) * call.form.scale, k, outs[0])


def _values(call: Call, x: Arrays, at, steps, own: KeyScratch, hand: HandoverScratch,
            place, head):
    """dv, handing over the weights, times the slopes of softcapped logits."""
    k_smem, _, q_ring, do_ring, lse_ring, _, _, q_there, do_there, free = own
    p_smem, p_there, p_free, _ = hand
    whole, count = steps
    _, tile, b, _ = place
    first = tile * call.tiling.columns
    tall = ROWS, call.tiling.rows

    def one_head(g, dv):
        ctx = TileContext(call, x, b, head(g), turned=True)

        def step(i, dv, masked):
            n = g * count + i
            slot = call.slot(n)
            need = masked or call.form.score is not None
            row = at(i) * call.tiling.rows if need else None
            plgpu.barrier_wait(q_there.at[slot])

            def weigh(begin):
                # k q^T: [64,D] by [rows,D] is [64,rows]
                s = begin(0, k_smem.at[0], Tile(q_ring.at[slot]))
                lse = vector(lse_ring.at[slot], True, call.interpret)
                s, unit, slope = ctx.logits(s(), row, first, masked)
                p = weights(s, unit, lse, True)  # P = 2^(s - L)
                # for the other warpgroup, P with the slope that dS is to have
                return p, p if slope is None else p * slope

            p, sloped = products(call.interpret, [tall], weigh)

            # until the weights of the tile before were read
            @pl.when(n > 0)
            def _():
                plgpu.barrier_wait(p_free)

            p_smem[...] = sloped
            plgpu.barrier_arrive(p_there)  # handed over
            plgpu.barrier_wait(do_there.at[slot])
            p = p.astype(x.q.dtype)  # 16 bits
            # dv += P dO: [64,rows] by [rows,V] is [64,V]
            dv = products(call.interpret, [dv],
                          lambda begin: begin(0, p, do_ring.at[slot])())
            plgpu.barrier_arrive(free.at[slot])  # one of the two that read it
            return dv

        dv = jax.lax.fori_loop(0, whole, lambda n, c: step(n, c, False), dv)
        return jax.lax.fori_loop(whole, count, lambda n, c: step(n, c, True), dv)

    dv = zeros((ROWS, x.v.shape[3]), call.interpret)  # [64,V]
    dv = jax.lax.fori_loop(0, call.groups, one_head, dv)
    plgpu.barrier_wait(p_free)  # the last weights were read
    return dv


def _keys(call: Call, x: Arrays, count, own: KeyScratch, hand: HandoverScratch):
    """dk without its scale, from the weights that are handed over."""
    _, v_smem, q_ring, do_ring, _, delta_ring, _, q_there, do_there, free = own
    p_smem, p_there, p_free, _ = hand
    tall = ROWS, call.tiling.rows

    def step(n, dk):
        slot = call.slot(n)
        plgpu.barrier_wait(do_there.at[slot])

        def slope(begin):
            # v do^T: [64,V] by [rows,V] is [64,rows], while P is being made
            dp = begin(0, v_smem.at[0], Tile(do_ring.at[slot]))
            delta = vector(delta_ring.at[slot], True, call.interpret)
            plgpu.barrier_wait(p_there)
            p = matrix(p_smem, call.interpret)
            ds = p * (dp() - spread(delta, tall, True))  # dS = P (dP - D)
            plgpu.barrier_arrive(p_free)  # P was read
            return ds.astype(x.q.dtype)

        ds = products(call.interpret, [tall], slope)
        plgpu.barrier_wait(q_there.at[slot])
        # dk += dS q: [64,rows] by [rows,D] is [64,D]
        dk = products(call.interpret, [dk],
                      lambda begin: begin(0, ds, q_ring.at[slot])())
        plgpu.barrier_arrive(free.at[slot])  # the other of the two
        return dk

    dk = zeros((ROWS, x.q.shape[3]), call.interpret)  # [64,D]
    return jax.lax.fori_loop(0, count * call.groups, step, dk)
