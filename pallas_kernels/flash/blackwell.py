"""Flash attention for Blackwell by Mosaic GPU, forward: TMA, tcgen05, tensor memory.

**It has compiled for sm_100a and was interpreted on a CPU; it has never run on a GPU.**
So nobody gets it unasked: `flash(..., backend="blackwell")` is the only way to it. From
jax 0.11 the interpreter simulates tensor memory and its products, too, and finds no
race between warpgroups; fences between threads of one warpgroup it does not see. The
backward pass: `blackwell_backward.py`.

A block owns 128 queries, the lanes of tensor memory, for each warpgroup that computes,
one or two of them; one more warpgroup loads tiles of k and v into a ring of shared
memory. A warpgroup begins its own products: logits q k^T go to tensor memory and from
there to registers, where a thread has a row, so that maxima and sums need no other
thread; the weights go back, 16 bits each, as the left side of the product with v, which
adds to o in tensor memory. Logits of the next tile are made while those of this one are
at their softmax, and so is the product of the last weights with v; o is faded, through
registers, before the next is added. bfloat16 and float16, D up to 192 and V up to 128
(padded to 64s): sums of wider heads leave the backward pass no tensor memory; no bias,
no dropout.

Two limits, for a tile of 128 queries and 128 keys, D=128, no mask: 4 x 128 x 128 x 128
flops at 8192 a cycle and multiprocessor are 1024 cycles of the matrix units, and 128 x
129 of 2^x, 16 a cycle, are 1032: neither is the limit alone. At D=64 it is 512 against
1032, and 2^x is the limit. What comes beside 2^x in its place, maxima, sums, fading,
and the reading of q from shared memory for tiles of 64 keys, is not in them. Nothing
here was measured.

Sources: Dao, 2023, arXiv:2307.08691; the parting of work between softmax and products
as in Shah et al., 2024, arXiv:2407.08608.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Refused
from pallas_kernels.flash import blackwell_backward
from pallas_kernels.flash.mosaic import over_keys, write
from pallas_kernels.flash.mosaic_scratch import ForwardScratch, TensorScratch
from pallas_kernels.flash.mosaic_tile import Call, TileContext, first_logit, online
from pallas_kernels.machine.blackwell import (
    COLUMNS, COPIED, ROW, ROWS, load, meet, multiply, settle, store, tensor
)
from pallas_kernels.machine.hopper import F32, Tile, spread, zeros
from pallas_kernels.schedule import Side, Static
from pallas_kernels.tile import LOW


def forward(static: Static, side: Side, q, k, v, bias, sink):
    """o [B,T,H,V] in v's dtype, m and l [B,H,T] float32, m times log2(e)."""
    t, stages = static.tiling, static.tiles[0].num_stages
    width = -(-v.shape[3] // 64) * 64  # o is padded to 64s
    # columns for logits of 32 bits, weights of 16, and o, of each warpgroup
    needed = t.rows // ROWS * (t.columns * 3 // 2 + width)
    if t.rows % ROWS or needed > COLUMNS or stages < 2:
        raise Refused(
            f"tile=({t.rows}, {t.columns}, {stages}): expected {ROWS} or {2 * ROWS} "
            f"queries, {COLUMNS} columns of tensor memory (not {needed}) and 2 stages")
    call = Call(static.form, t, q.shape[2] // k.shape[2], t.rows // ROWS,
                (stages,) * 2,
                bool(static.interpret), ROW, static.variant)
    more = _scratch(call, width, v.dtype)
    return over_keys(
        call, static.block_masks(t, side), side, q, k, v, sink, more, _attend)


def backward(static: Static, side: Side, q, k, v, bias, sink, base, delta, do):
    """dq, dk, dv, d(bias), given base, delta [B,H,T] and do [B,T,H,V]; base: what
    weights are made again from, times log2(e)."""
    return *blackwell_backward.backward(
        static, side, q, k, v, base, delta, do), None


def _scratch(call: Call, width: int, kind):
    """Tensor memory for logits, weights and o of each warpgroup, side by side, and
    barriers: logits are there, o is there, the warpgroup has met."""
    groups = call.warpgroups
    barrier = plgpu.Barrier(num_barriers=groups, orders_tensor_core=True)
    columns = groups * call.tiling.columns
    memory = (columns, F32), (columns, kind), (groups * width, F32)  # s, p, o
    s, p, o = tensor(call.interpret, *memory)
    return TensorScratch(s, p, o, barrier, barrier, barrier)


def _attend(ctx: TileContext, at, steps, outs, own: ForwardScratch, more, group, tile):
    """A warpgroup that computes 128 queries."""
    (q_smem, k_ring, v_ring, o_smem, m_smem, l_smem, q_there, k_there, v_there, k_free,
     v_free) = own
    memory = TensorScratch(*more)
    call, x, interpret = ctx.call, ctx.x, ctx.call.interpret
    (whole, count), width = steps, x.v.shape[3]

    def part(ref, n):
        return ref.at[:, pl.ds(group * n, n)]  # this warpgroup's columns

    s_ref, p_ref = (part(ref, call.tiling.columns) for ref in (memory.s, memory.p))
    o_ref = part(memory.o, width)
    s_there, o_there, met = (
        ref.at[group] for ref in (memory.s_there, memory.o_there, memory.met))
    first = tile * call.tiling.rows + group * ROWS
    queries = ctx.b, pl.ds(first, ROWS), ctx.h
    q = q_smem.at[group]
    slot = call.slot

    def products(n):
        """Begins the logits of tile n."""
        plgpu.barrier_wait(k_there.at[slot(n)])
        # q k^T: [128,D] by [columns,D] is [128,columns] of tensor memory
        multiply(s_ref, q, Tile(k_ring.at[slot(n)]), s_there, False, interpret)

    def rescale_output(rescale):
        o = load(o_ref, interpret)  # [128,V]
        store(o_ref, o * spread(rescale, (ROWS, width), False), interpret)

    def values_of(n):
        """Until o holds tile n."""
        plgpu.barrier_wait(o_there)
        plgpu.barrier_arrive(v_free.at[slot(n)])

    def step(n, carry, masked):
        m, total = carry
        plgpu.barrier_wait(s_there)
        s = load(s_ref, interpret)  # [128,columns]
        plgpu.barrier_arrive(k_free.at[slot(n)])  # k was read
        meet(met)  # all threads have loaded s: it may be overwritten

        # the next tile's logits are made beside this softmax
        @pl.when(n + 1 < count)
        def _():
            products(n + 1)

        need = masked or call.form.score is not None
        key = at(n) * call.tiling.columns if need else None
        s, unit, _ = ctx.logits(s, first, key, masked)
        p, m, total, rescale = online(s, unit, m, total)

        # p and o are free when p v of the tile before is done
        @pl.when(n > 0)
        def _():
            values_of(n - 1)

        store(p_ref, p.astype(x.v.dtype), interpret)  # 16 bits, a left side

        # o 2^(m - m'), before more is added
        @pl.when(n > 0)
        def _():
            rescale_output(rescale)

        settle(met, interpret)  # p and o are there, from all threads
        plgpu.barrier_wait(v_there.at[slot(n)])
        # o += p v: [128,columns] by [columns,V] is [128,V]
        multiply(o_ref, p_ref, v_ring.at[slot(n)], o_there, n > 0, interpret)
        return m, total

    plgpu.copy_gmem_to_smem(x.q.at[queries], q, q_there.at[group])
    plgpu.barrier_wait(q_there.at[group])
    products(jnp.int32(0))

    def rows(value):
        return zeros((ROWS,), interpret, value, ROW)

    carry = rows(LOW), rows(0.0)
    if x.sink is not None:
        carry = first_logit(x.sink[ctx.h], *carry)
    carry = jax.lax.fori_loop(0, whole, lambda n, c: step(n, c, False), carry)
    m, total = jax.lax.fori_loop(whole, count, lambda n, c: step(n, c, True), carry)
    values_of(count - 1)
    rescale_output(1 / jnp.where(total > 0, total, 1.0))  # O / l
    settle(met, interpret)
    o = load(o_ref, interpret, COPIED)
    o_smem = q_smem if o_smem is None else o_smem
    write(ctx, o, m, total, outs, (o_smem, m_smem, l_smem), group, queries)
