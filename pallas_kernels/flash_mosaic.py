"""Flash attention for Hopper by Mosaic GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Refused
from pallas_kernels.schedule import Side, Static, Tiling
from pallas_kernels.steps_mosaic import (
    F32, ROWS, Arrays, Call, Here, Line, Product, launch, line, online, products,
    shared, spread, zeros
)
from pallas_kernels.tile import LOG2E, LOW, NEVER


def forward(static: Static, side: Side, q, k, v, bias, sink):
    """o [B,T,H,V] in v's dtype and lse [B,H,T] float32."""
    call = _call(static, static.tiling, static.how[0], q, k)
    t = call.tiling
    (b, _, h, d), width = q.shape, v.shape[3]
    x = _arrays(call, side, q, k, v, sink)
    tall = t.grid[0] * t.rows
    o = jax.ShapeDtypeStruct((b, x.q.shape[1], h, x.v.shape[3]), v.dtype)
    lse = jax.ShapeDtypeStruct((b, h, tall), F32)
    o, lse = launch(
        call, _forward, {"tile": t.grid[0], "batch": b, "head": h}, x,
        line(*static.asks(t, side)), [o, lse], _scratch(call, x), "flash_forward",
    )
    return o[:, :t.t, :, :width], lse[:, :, :t.t]


def _call(static: Static, tiling: Tiling, how, q, k) -> Call:
    warpgroups, stages = how
    groups = q.shape[2] // k.shape[2]
    return Call(static.form, tiling, groups, warpgroups, stages,
                bool(static.interpret))


def _tokens(a, size: int, axis: int = 1, value=0):
    """a with whole tiles of tokens."""
    lack = -a.shape[axis] % size
    if not lack:
        return a
    pads = [(0, lack if n == axis else 0) for n in range(a.ndim)]
    return jnp.pad(a, pads, constant_values=value)


def _arrays(call: Call, side: Side, q, k, v, sink) -> Arrays:
    t = call.tiling

    def tile(a, size):
        a = _tokens(a, ROWS, 3)
        # a copy beyond the end reads 0, but an interpreted one is an error
        return _tokens(a, size) if call.interpret or a.shape[1] < size else a

    def vector(a, size, axis=1):
        return None if a is None else _tokens(a.astype(jnp.int32), size, axis, -1)

    kv_pos = None if side.kv_pos is None else side.kv_pos.swapaxes(1, 2)
    return Arrays(
        tile(q, t.rows), tile(k, t.columns), tile(v, t.columns),
        side.head.astype(jnp.int32), vector(side.q_pos, t.rows),
        vector(kv_pos, t.columns, 2), vector(side.q_run, t.rows),
        vector(side.kv_run, t.columns),
        None if sink is None else sink.astype(F32) * LOG2E,
    )


def _scratch(call: Call, x: Arrays):
    n, c, groups = call.stages, call.tiling.columns, call.warpgroups
    d, width, kind = x.q.shape[3], x.v.shape[3], x.q.dtype
    barrier = plgpu.Barrier
    return (
        shared((groups, ROWS, d), kind), shared((n, c, d), kind),
        shared((n, c, width), kind),
        # the output takes the place of q where it can
        None if d == width else shared((groups, ROWS, width), kind),
        plgpu.SMEM((groups, ROWS), F32),
        barrier(num_barriers=groups), barrier(num_barriers=n), barrier(num_barriers=n),
        barrier(num_arrivals=groups, num_barriers=n),
        barrier(num_arrivals=groups, num_barriers=n),
        barrier(num_barriers=groups),
    )


def _forward(call: Call, x: Arrays, seen: Line, outs, scratch):
    group = jax.lax.axis_index("group")
    # later query tiles have the longer lines under a causal mask: they start first
    tile = call.tiling.grid[0] - 1 - jax.lax.axis_index("tile")
    b, h = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    here = Here(call, x, b, h)
    row = b if seen.count.shape[0] > 1 else 0
    steps = seen.whole[row, tile], seen.count[row, tile]
    at = lambda n: seen.where[row, tile, n]

    @pl.when(group == call.warpgroups)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _fetch(here, at, steps[1], scratch)

    @pl.when(group < call.warpgroups)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _attend(here, at, steps, outs, scratch, group, tile)


def _fetch(here: Here, at, count, scratch):
    """The warpgroup that loads: tiles of k and v, as room in the ring comes free."""
    _, k_ring, v_ring, _, _, _, k_there, v_there, k_free, v_free, _ = scratch
    size, stages = here.call.tiling.columns, here.call.stages

    def load(n, carry):
        slot = jax.lax.rem(n, jnp.int32(stages))
        start = at(n) * size
        for ref, ring, there, free in ((here.x.k, k_ring, k_there, k_free),
                                       (here.x.v, v_ring, v_there, v_free)):
            @pl.when(n >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])
            plgpu.copy_gmem_to_smem(ref.at[here.b, pl.ds(start, size), here.kv],
                                    ring.at[slot], there.at[slot])
        return carry

    jax.lax.fori_loop(0, count, load, None)

    def drain(n, carry):
        slot = jax.lax.rem(n, jnp.int32(stages))
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(v_free.at[slot])
        return carry

    jax.lax.fori_loop(jnp.maximum(count - stages, 0), count, drain, None)


def _attend(here: Here, at, steps, outs, scratch, group, tile):
    """A warpgroup that computes 64 queries. The weights of a tile meet its values while
    the next tile's logits are made: p is what is still to be multiplied."""
    (q_smem, k_ring, v_ring, o_smem, lse_smem, q_there, k_there, v_there, k_free, v_free,
     turn) = scratch
    o_ref, lse_ref = outs
    call, x, interpret = here.call, here.x, here.call.interpret
    whole, count = steps
    last = call.warpgroups - 1
    first = tile * call.tiling.rows + group * ROWS
    queries = here.b, pl.ds(first, ROWS), here.h
    q = q_smem.at[group]
    o_smem = q if o_smem is None else o_smem.at[group]
    slot = lambda n: jax.lax.rem(n, jnp.int32(call.stages))
    key = lambda n: at(n) * call.tiling.columns

    plgpu.copy_gmem_to_smem(x.q.at[queries], q, q_there.at[group])

    @pl.when(group == last)
    def _():
        plgpu.barrier_arrive(turn.at[0])

    plgpu.barrier_wait(q_there.at[group])

    def logits(s, n, masked):
        need = masked or call.form.score is not None
        return here.logits(s, first, key(n) if need else None, masked)[:2]

    def pass_on():
        plgpu.barrier_arrive(turn.at[jax.lax.rem(group + 1, jnp.int32(last + 1))])

    def begin(s):
        pass_on()
        s = s()
        plgpu.barrier_arrive(k_free.at[0])
        start = zeros((ROWS,), interpret, LOW)
        if x.sink is not None:
            start = jnp.full((ROWS,), 0.0, F32) + x.sink[here.h]
        total = zeros((ROWS,), interpret, 0.0 if x.sink is None else 1.0)
        p, m, total, _ = online(*logits(s, 0, True), start, total)
        return p.astype(x.v.dtype), m, total

    plgpu.barrier_wait(k_there.at[0])
    plgpu.barrier_wait(turn.at[group])
    p, m, total = products(
        interpret, [Product(None, q, k_ring.at[0], True)], begin)

    def step(n, carry, masked):
        acc, p, m, total = carry
        now, before = slot(n), slot(n - 1)
        plgpu.barrier_wait(k_there.at[now])
        plgpu.barrier_wait(v_there.at[before])
        plgpu.barrier_wait(turn.at[group])

        def then(s, o):
            pass_on()
            s = s()
            plgpu.barrier_arrive(k_free.at[now])
            p, top, new, fade = online(*logits(s, n, masked), m, total)
            acc = o()
            plgpu.barrier_arrive(v_free.at[before])
            acc = acc * spread(fade, acc.shape, False)
            return acc, p.astype(x.v.dtype), top, new

        return products(interpret, [Product(None, q, k_ring.at[now], True),
                                    Product(acc, p, v_ring.at[before])], then)

    carry = zeros((ROWS, x.v.shape[3]), interpret), p, m, total
    one = jnp.maximum(whole, 1)
    carry = jax.lax.fori_loop(1, one, lambda n, c: step(n, c, False), carry)
    carry = jax.lax.fori_loop(one, count, lambda n, c: step(n, c, True), carry)
    acc, p, m, total = carry
    end = slot(count - 1)
    plgpu.barrier_wait(v_there.at[end])
    acc = products(interpret, [Product(acc, p, v_ring.at[end])], lambda o: o())
    plgpu.barrier_arrive(v_free.at[end])

    @pl.when(group == 0)
    def _():
        plgpu.barrier_wait(turn.at[0])

    some = total > 0
    safe = jnp.where(some, total, 1.0)
    o_smem[...] = (acc * spread(1 / safe, acc.shape, False)).astype(o_ref.dtype)
    lse_smem.at[group][...] = jnp.where(
        some, m * (1 / LOG2E) + jnp.log(safe), NEVER)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_smem, o_ref.at[queries])
    plgpu.copy_smem_to_gmem(lse_smem.at[group],
                            lse_ref.at[here.b, here.h, pl.ds(first, ROWS)])
    plgpu.wait_smem_to_gmem(0)
