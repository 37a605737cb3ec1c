"""Linear attention with decay for GPU by Triton, on sm80 and newer.

Two passes. The first is sequential over chunks and parallel over tiles of the state: it
passes the state on and writes down what each chunk begins with. The second has all
chunks at once: pairs inside a chunk, and queries against its state. The backward pass
is the first pass twice, forward for the states, which are not kept from the forward
pass, and from the other end for their gradients, and then all chunks at once, in a
program for dv and one for dq, dk and dg. All sums over key channels are of parts, so
that few channels are in registers at a time. dk and dv of each query head are added up
over the heads of a key head by XLA. No atomics, and so the same bits each time.

States are carried in float32 and written down in the type of q, in which the matrix
units take them. What limits it: with H heads at D = V = 128, bfloat16 and chunks of 64
a token moves 8 D bytes of q, k, v, o, 4 D of k and v once more, and twice 2 D V / 64
of the states, 20 D in all, for 4 D (64 + D) flops: 38 flops a byte, where an H200 has
206 for each byte that it can move. So bytes over bandwidth are the limit, not flops.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.linear import triton_pairs
from pallas_kernels.linear.triton_chunk import Arrays, Call, ChunkContext, Launch
from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.machine.triton import power
from pallas_kernels.tiles import LinearTriton

MOST = 128  # key channels in registers at a time


def _states(call: Call, reverse: bool, x: Arrays, each_ref, last_ref):
    """Passes a tile of the state on, and writes down the states in between."""
    place, h, b = (pl.program_id(n) for n in range(3))
    tall, wide = call.state
    across = each_ref.shape[4] // wide
    v0, d0 = jax.lax.div(place, across) * tall, jax.lax.rem(place, across) * wide
    tile = pl.ds(v0, tall), pl.ds(d0, wide)

    def step(i, s):
        n = call.chunks - 1 - i if reverse else i
        ctx = ChunkContext(call, x, b, h, n)
        # what the chunk begins with, before it adds to it
        triton.store(each_ref.at[b, h, n, *tile], s.astype(each_ref.dtype))
        decay = ctx.decay(d0, wide)
        # ds = total ds' + do^T enter(q): the same from the other end
        if reverse:
            value = ctx.rows(x.do, h, v0, tall)  # [c,values]
            key = decay.enter(ctx.rows(x.q, h, d0, wide))  # [c,keys]
        else:
            value = ctx.rows(x.v, ctx.kv, v0, tall)  # [c,values]
            key = decay.leave(ctx.rows(x.k, ctx.kv, d0, wide))  # [c,keys]
        # s' = total s + v^T leave(k): [c,values] by [c,keys] is [values,keys]
        return decay.kept(s) + dot(value, key.astype(value.dtype), TN)

    begin = triton.load(x.state.at[b, h, *tile])
    s = jax.lax.fori_loop(0, call.chunks, step, begin)
    triton.store(last_ref.at[b, h, *tile], s)


def _place(call: Call, x: Arrays):
    """The chunk of this program, its head and number, and the first value channel."""
    place, h, b = (pl.program_id(n) for n in range(3))
    n, first = jax.lax.rem(place, call.chunks), jax.lax.div(place, call.chunks)
    return ChunkContext(call, x, b, h, n), h, n, first * call.values


def _add_up(call: Call, x: Arrays, ctx: ChunkContext, n, first, state, key: bool):
    """Pairs of a chunk [c,c], and what queries get from the state, or, for `key`, keys
    from its gradient [c,values]; sums over key channels, MOST of them at a time, or
    fewer where each has decays of its own."""
    by_channel = x.g is not None and len(x.g.shape) == 4
    width = call.keys if by_channel else min(call.lanes, MOST)

    def step(i, carry):
        d0 = i * width
        q = ctx.rows(x.q, ctx.h, d0, width)  # [c,width]
        k = ctx.rows(x.k, ctx.kv, d0, width)  # [c,width]
        tile = pl.ds(first, call.values), pl.ds(d0, width)
        s = triton.load(state.at[ctx.b, ctx.h, n, *tile])  # [values,width]
        decay = ctx.decay(d0, width)
        a = (decay.leave(k) if key else decay.enter(q)).astype(q.dtype)
        # pairs [c,c], and enter(q) s^T or leave(k) ds^T: [c,values]
        pairs = carry[0] if x.pairs is not None else carry[0] + decay.pairs(q, k)
        return pairs, carry[1] + dot(a, s, NT)

    def zeros(width):
        return jnp.zeros((call.c, width), F32)

    pairs = zeros(call.c)
    if x.pairs is not None:
        pairs = triton.load(x.pairs.at[ctx.b, ctx.h, n])
    return jax.lax.fori_loop(
        0, call.lanes // width, step, (pairs, zeros(call.values)))


def _outputs(call: Call, x: Arrays, o_ref):
    """o of a chunk, some of its channels."""
    ctx, h, n, first = _place(call, x)
    pairs, o = _add_up(call, x, ctx, n, first, x.state, False)
    v = ctx.rows(x.v, ctx.kv, first, call.values)  # [c,values]
    # o = pairs v + enter(q) s^T: [c,c] by [c,values]
    ctx.write(o_ref, o + dot(pairs.astype(v.dtype), v, NN), h, first)


def _values(call: Call, x: Arrays, dv_ref):
    """dv of a chunk, some of its channels."""
    ctx, h, n, first = _place(call, x)
    pairs, dv = _add_up(call, x, ctx, n, first, x.d_state, True)
    do = ctx.rows(x.do, h, first, call.values)  # [c,values]
    # dv = pairs^T do + leave(k) ds^T: [c,c] by [c,values]
    ctx.write(dv_ref, dv + dot(pairs.astype(do.dtype), do, TN), h, first)


def _keys(call: Call, x: Arrays, dq_ref, dk_ref, *dg_ref):
    """dq and dk of a chunk for some of its key channels, and what they add to dg, over
    its value channels tile by tile."""
    place, h, b = (pl.program_id(n) for n in range(3))
    n, part = jax.lax.rem(place, call.chunks), jax.lax.div(place, call.chunks)
    d0 = part * call.keys
    ctx = ChunkContext(call, x, b, h, n)

    def step(i, carry):
        dp, entered, left, held = carry
        first = i * call.values
        v = ctx.rows(x.v, ctx.kv, first, call.values)  # [c,values]
        do = ctx.rows(x.do, h, first, call.values)  # [c,values]
        tile = pl.ds(first, call.values), pl.ds(d0, call.keys)
        s, ds = (triton.load(a.at[b, h, n, *tile]) for a in (x.state, x.d_state))
        together = (s.astype(F32) * ds.astype(F32)).sum(0, keepdims=True)  # [1,keys]
        # dp = do v^T [c,c]; do s and v ds: [c,values] by [values,keys]
        return (dp + dot(do, v, NT), entered + dot(do, s, NN),
                left + dot(v, ds, NN), held + together)

    def zeros(*shape):
        return jnp.zeros(shape, F32)

    carry = (zeros(call.c, call.c), zeros(call.c, call.keys),
             zeros(call.c, call.keys), zeros(1, call.keys))
    carry = jax.lax.fori_loop(0, x.state.shape[3] // call.values, step, carry)
    q, k = ctx.rows(x.q, h, d0, call.keys), ctx.rows(x.k, ctx.kv, d0, call.keys)
    found = ctx.decay(d0, call.keys).back(q, k, *carry)
    ctx.write(dq_ref, found.dq, h, d0)
    ctx.write(dk_ref, found.dk, h, d0)
    if dg_ref and len(x.g.shape) == 4:
        ctx.write(dg_ref[0], found.dg, h, d0)
    elif dg_ref:
        at = dg_ref[0].at[b, h, part, pl.ds(ctx.start, call.c)]
        triton.store(at, found.dg.sum(0), mask=ctx.inside)


def _launch(call: Call, kernel, grid, x: Arrays, outs, how: Launch,
            name: str) -> Any:
    return pl.pallas_call(
        lambda x, *refs: kernel(call, x, *refs), grid=grid, out_shape=outs,
        interpret=call.interpret, name=name,
        compiler_params=triton.CompilerParams(
            num_warps=how.num_warps, num_stages=how.num_stages),
    )(x)


def _call(static, tile: LinearTriton, q, k, v) -> Call:
    lanes, wide = power(q.shape[3]), power(v.shape[3])
    side = tile.state_block
    return Call(q.shape[1], tile.chunk, q.shape[2] // k.shape[2], static.scale, lanes,
                min(tile.block_v, wide), (min(side, wide), min(side, lanes)),
                min(tile.block_d, lanes), Launch(tile.num_warps, tile.num_stages),
                Launch(tile.state_num_warps, tile.state_num_stages),
                Launch(tile.dk_num_warps, tile.dk_num_stages), static.interpret,
                "pairs" in static.variant)


def _pass(call: Call, x: Arrays, state, reverse: bool):
    """The states that chunks begin with [B,H,N,V,D], or, in `reverse`, the gradients of
    those that they end with, and the last one [B,H,V,D] float32."""
    b, h, width, d = state.shape
    tall, wide = power(width), call.lanes
    state = jnp.pad(state, ((0, 0), (0, 0), (0, tall - width), (0, wide - d)))
    outs = [jax.ShapeDtypeStruct((b, h, call.chunks, tall, wide), x.q.dtype),
            jax.ShapeDtypeStruct(state.shape, F32)]
    grid = tall // call.state[0] * (wide // call.state[1]), h, b
    each, last = _launch(
        call, lambda call, x, *refs: _states(call, reverse, x, *refs), grid,
        x._replace(state=state), outs, call.state_launch,
        "linear_state_gradients" if reverse else "linear_states")
    return each, last[:, :, :width, :d]


def _pairs(call: Call, x: Arrays):
    """The pairs of all chunks [B,H,N,c,c], where they are made apart; None where each
    kernel makes its own."""
    if not call.blocks or x.g is None or x.g.ndim < 4:
        return None
    b, h = x.q.shape[0], x.q.shape[2]
    out = jax.ShapeDtypeStruct((b, h, call.chunks, call.c, call.c), x.q.dtype)
    x = x._replace(do=None, state=None, d_state=None)
    return _launch(call, triton_pairs.kernel, (call.chunks, h, b), x, out,
                   Launch(4, 1), "linear_pairs")


def forward(static, flags, q, k, v, g, state, save: bool):
    """The turned state [B,H,V,D] after the last token, o [B,T,H,V]; nothing to save."""
    b, t, h, _ = q.shape
    call = _call(static, static.ahead, q, k, v)
    x = Arrays(q, k, v, g, flags)
    each, last = _pass(call, x, state, False)
    x = x._replace(pairs=_pairs(call, x))
    out = jax.ShapeDtypeStruct((b, t, h, v.shape[3]), static.dtype)
    grid = call.chunks * (each.shape[3] // call.values), h, b
    o = _launch(call, _outputs, grid, x._replace(state=each), out, call.launch,
                "linear_outputs")
    return last, o, None


def backward(static, flags, q, k, v, g, state, begun, d_state, do):
    """dq, dk, dv, dg and the gradient of the turned state that came in."""
    b, t, h, _ = q.shape
    heads = k.shape[2]
    call = _call(static, static.back, q, k, v)
    x = Arrays(q, k, v, g, flags, do)
    states, _ = _pass(call, x, state, False)
    gradients, before = _pass(call, x, d_state, True)
    kind = k.dtype if h == heads else F32  # summed over heads in float32

    def own(a):
        return jax.ShapeDtypeStruct((b, t, h, a.shape[3]), kind)

    x = x._replace(state=states, d_state=gradients, pairs=_pairs(call, x))
    grid = call.chunks * (states.shape[3] // call.values), h, b
    dv = _launch(call, _values, grid, x, own(v), call.launch, "linear_backward_values")
    outs = [jax.ShapeDtypeStruct(q.shape, q.dtype), own(k)]
    if g is not None:
        parts = (b, h, call.lanes // call.keys, t)
        outs.append(jax.ShapeDtypeStruct(g.shape if g.ndim == 4 else parts, F32))
    grid = call.chunks * (call.lanes // call.keys), h, b
    dq, dk, *dg = _launch(call, _keys, grid, x._replace(pairs=None), outs,
                          call.keys_launch, "linear_backward_keys")
    if h > heads:
        # over the query heads of a key head
        def share(a):
            return a.reshape(b, t, heads, -1, a.shape[3]).sum(3)

        dk, dv = share(dk).astype(k.dtype), share(dv).astype(v.dtype)
    return dq, dk, dv, _decay(flags, g, dg), before


def _decay(flags, g, dg):
    """dg [B,T,H] or [B,T,H,D], 0 where the decay is not that of `g`."""
    if g is None:
        return None
    if g.ndim < 4:
        return dg[0].sum(2).swapaxes(1, 2)  # [B,H,parts,T] -> [B,T,H]
    return dg[0] if flags is None else jnp.where(flags[..., None, None] == 1, dg[0], 0)
