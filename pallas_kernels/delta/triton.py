"""The delta rule on GPU by Triton, on sm80 and newer.

Forward, a first kernel inverts the system of every chunk and makes the weights of its
outputs, all chunks at once; a second passes over the chunks, a program for a head and
some columns of the state, which do not meet. Backward, one kernel passes over the
chunks in reverse with the gradient of those columns and leaves the gradient of what the
system's right side is; the rest of the gradients are again all chunks at once.

Two limits, counted and not measured, for T = 8192, D = V = 128, bfloat16 and decay, on
an H200 (990 TFLOP/s, 4.8 TB/s). What has to be done: the recurrence token by token,
6 D V flops a head (2.5 times that backward), each array read or written once. What the
kernels do: all their products, and each array once a kernel that takes it; what is read
again by programs of other columns or of heads that share keys is left to the cache.

    heads of keys / values      flops              bytes
    forward 16/64, needed        52 G  0.05 ms      0.35 G  0.07 ms
    forward 16/64, kernels      137 G  0.14 ms      0.73 G  0.15 ms
    backward 16/32, needed       64 G  0.07 ms      0.34 G  0.07 ms
    backward 16/32, kernels     112 G  0.11 ms      2.44 G  0.51 ms

Backward, the states and their gradients are 0.67 of the 2.44 GB, the float32 gradients
of keys and queries a head, written and added up, 0.54. Not in these numbers: the passes
over states take their 128 steps of 5 products one after the other.

Source: see `pallas_kernels/delta/api.py`; the division into kernels follows the
published ones of flash-linear-attention.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.delta import triton_backward as gradients
from pallas_kernels.delta import triton_channels as channels
from pallas_kernels.delta.chunk import (
    BLOCK, CHUNK, Side, decays, halved, merged, strict
)
from pallas_kernels.delta.triton_chunk import ChunkContext, part, put, read
from pallas_kernels.machine.product import F32, NN, TN, dot
from pallas_kernels.machine.triton import load, power
from pallas_kernels.tiles import DeltaTriton


def inverse(a, block: int):
    """(I + a)^-1 of a strictly lower triangular a [CHUNK,CHUNK], by substitution in
    blocks of `block` rows, which are merged by products."""
    many = CHUNK // block
    shape = many, block, many, block

    def iota(shape, n):
        return jax.lax.broadcasted_iota(jnp.int32, shape, n)

    own = iota(shape, 0) == iota(shape, 2)  # blocks on the diagonal
    blocks = jnp.where(own, a.reshape(shape), 0.0).sum(2)  # [many,block,block]
    i, j = (iota(blocks.shape, n) for n in (1, 2))

    def out_of_those_below(n, x):
        column = jnp.where(j == n, blocks, 0.0).sum(2)  # of a [many,block]
        row = jnp.where(i == n, x, 0.0).sum(1)  # of x [many,block]
        # row n of x is final: it is taken out of the rows below
        return x - column[:, :, None] * row[:, None, :]

    x = jnp.where(i == j, 1.0, 0.0)  # I, before anything is solved
    x = jax.lax.fori_loop(0, block - 1, out_of_those_below, x)
    # blocks back on the diagonal of [CHUNK,CHUNK]
    x = jnp.where(own, jnp.broadcast_to(x[:, :, None], shape), 0.0)
    product = halved(functools.partial(dot, contract=NN))  # float32 by bfloat16
    return merged([x.reshape(CHUNK, CHUNK)], [a], product, block)[0]


def _inside(static, heads: int, rows: int, side, q_ref, k_ref, *refs):
    """The inverse of one chunk's system, and the weights of its outputs; with decays of
    channels also what `channels.Met` has."""
    n, h, b = (pl.program_id(a) for a in range(3))
    ctx = ChunkContext(static, b, h, heads)
    own, row = ctx.sides(side, n)
    decay = decays(own, row, static.gated)  # [CHUNK,CHUNK], 0 for j > i
    if static.channels:
        g_ref, x_ref, p_ref, kk_ref, *more = refs
        qk, kk = channels.weights(ctx, n, rows, q_ref, k_ref, g_ref, *more)
        triton.store(kk_ref.at[b, h, n], kk.astype(kk_ref.dtype))
    else:
        x_ref, p_ref = refs
        qk, kk = ctx.pairs(n, rows, k_ref, q_ref, k_ref)  # q k^T, k k^T
    p = static.scale * decay * qk  # P
    triton.store(p_ref.at[b, h, n], p.astype(p_ref.dtype))
    a = strict(own.beta * decay * kk)  # A = beta decay k k^T, j < i
    # to be exact, substitution takes fewer instructions than products of float32
    x = inverse(a, CHUNK if k_ref.dtype == F32 else BLOCK)  # X = (I + A)^-1
    triton.store(x_ref.at[b, h, n], x.astype(x_ref.dtype))


def _forward(static, heads: int, columns: int, side, q_ref, k_ref, v_ref, x_ref, p_ref,
             start_ref, *refs):
    """Some columns of the state from the first chunk to the last; with decays of
    channels, q and k are those that meet the state."""
    late, (o_ref, final_ref, *states_ref) = channels.split(static, refs)
    c, h, b = (pl.program_id(a) for a in range(3))
    ctx, first = ChunkContext(static, b, h, heads), c * columns

    def step(n, state):
        q, k = ctx.tokens(q_ref, n), ctx.tokens(k_ref, n)  # [CHUNK,D]
        beta, enter, leave = ctx.columns(side, n, "beta", "enter", "leave")
        held = state.astype(k.dtype)  # S [D,columns]
        if states_ref:
            put(states_ref[0], (b, h, n), first, held)
        v = ctx.tokens(v_ref, n, first, columns).astype(F32)  # [CHUNK,columns]
        # r = beta (v - enter k S), u = X r, o = scale enter q S + P u: [CHUNK,columns]
        r = beta * (v - enter * dot(k, held, NN))
        u = dot(load(x_ref.at[b, h, n], None, 0), r.astype(k.dtype), NN)
        o = (static.scale * enter) * dot(q, held, NN)
        o = o + dot(load(p_ref.at[b, h, n], None, 0), u.astype(k.dtype), NN)
        ctx.write(o_ref, o, n, first)
        # S' = keep S + k^T (leave u): [CHUNK,D] by [CHUNK,columns] is [D,columns]
        state = channels.kept(ctx, side, n, late) * state
        kl = channels.leaving(ctx, n, k, late)
        return state + dot(kl, (leave * u).astype(k.dtype), TN)

    start = _begin(start_ref, b, h, first, columns)  # [D,columns]
    state = jax.lax.fori_loop(0, side.shape[2], step, start)
    put(final_ref, (b, h), first, state)


def _reverse(static, heads: int, columns: int, side, q_ref, k_ref, do_ref, x_ref, p_ref,
             end_ref, *refs):
    """The gradient of some columns of the state from the last chunk to the first, and
    y, that of the right side of the chunks' systems."""
    late, (y_ref, grads_ref, start_ref) = channels.split(static, refs)
    c, h, b = (pl.program_id(a) for a in range(3))
    ctx, first, many = ChunkContext(static, b, h, heads), c * columns, side.shape[2]

    def step(i, grad):
        n = many - 1 - i
        q, k = ctx.tokens(q_ref, n), ctx.tokens(k_ref, n)
        do = ctx.tokens(do_ref, n, first, columns)  # [CHUNK,columns]
        beta, enter, leave = ctx.columns(side, n, "beta", "enter", "leave")
        held = grad.astype(k.dtype)  # dS' [D,columns]
        put(grads_ref, (b, h, n), first, held)
        # du = P^T do + leave k dS', y = X^T du: [CHUNK,columns]
        du = dot(load(p_ref.at[b, h, n], None, 0), do, TN)
        du = du + leave * dot(channels.leaving(ctx, n, k, late), held, NN)
        y = dot(load(x_ref.at[b, h, n], None, 0), du.astype(k.dtype), TN)
        ctx.write(y_ref, y, n, first)
        # dS = keep dS' - k^T (enter beta y) + q^T (scale enter do): [D,columns]
        grad = channels.kept(ctx, side, n, late) * grad
        grad = grad - dot(k, (enter * beta * y).astype(k.dtype), TN)
        entered = (static.scale * enter) * do.astype(F32)
        return grad + dot(q, entered.astype(k.dtype), TN)

    end = _begin(end_ref, b, h, first, columns)
    grad = jax.lax.fori_loop(0, many, step, end)
    put(start_ref, (b, h), first, grad)


def _begin(ref, b, h, first, columns: int):
    """Some columns of a state."""
    return read(part(ref, (b, h), 0, power(ref.shape[2]), first, columns))


def _launch(static, tile: DeltaTriton, kernel, grid, args, outs, name: str) -> Any:
    return pl.pallas_call(
        kernel, grid=grid, out_shape=outs, name=name, interpret=static.interpret,
        compiler_params=triton.CompilerParams(
            num_warps=tile.num_warps, num_stages=tile.num_stages),
    )(*args)


def forward(static, side, q, k, v, g, state, keep: bool):
    """state [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass: the states
    that chunks begin with [B,H,N,D,V], the inverses and the weights of the outputs
    [B,H,N,CHUNK,CHUNK], and what `channels.met` takes."""
    (b, h, many), (d, width) = side.shape[:3], state.shape[2:]
    out, (inside, tile, *_) = jax.ShapeDtypeStruct, static.tiles
    square = out((b, h, many, CHUNK, CHUNK), q.dtype)
    given: tuple[Any, ...] = (side, q, k)
    outs = [square, square]
    if static.channels:
        given = side, q, k, g
        outs += [square, *[out((b, static.t, h, d), q.dtype)] * 3,
                 out((b, h, many, d), F32)]
    x, p, *more = _launch(
        static, inside, functools.partial(_inside, static, h, inside.block_d),
        (many, h, b), given, outs, "delta_inside")
    met = channels.met(q, k, more)
    outs = [out((b, static.t, h, width), v.dtype), out(state.shape, F32)]
    if keep:
        outs.append(out((b, h, many, d, width), q.dtype))
    grid = -(-width // tile.block_v), h, b
    o, final, *states = _launch(
        static, tile, functools.partial(_forward, static, h, tile.block_v), grid,
        (side, met.q, met.k, v, x, p, state, *met.late), outs, "delta_forward")
    return (final, o, *states, x, p, more) if keep else (final, o)


def backward(static, side, q, k, v, g, kept, d_final, do):
    """The gradients of side, of q, k and v a head [B,T,H,.], of g, and of the state."""
    (b, h, many), (d, width) = side.shape[:3], d_final.shape[2:]
    out, (*_, tile, values, keys) = jax.ShapeDtypeStruct, static.tiles
    states, x, p, more = kept
    met = channels.met(q, k, more)

    def wide(a, kind):
        return out((b, static.t, h, a.shape[3]), kind)

    outs = [wide(v, q.dtype), out(states.shape, q.dtype), out(d_final.shape, F32)]
    y, grads, d_state = _launch(
        static, tile, functools.partial(_reverse, static, h, tile.block_v),
        (-(-width // tile.block_v), h, b),
        (side, met.q, met.k, do, x, p, d_final, *met.late), outs,
        "delta_backward_states")

    # what several heads share is added up in float32
    def own(a):
        return wide(a, a.dtype if a.shape[2] == h else F32)

    outs = [out(side.shape, F32), own(v), wide(v, q.dtype),
            *[out((b, h, many, CHUNK, CHUNK), q.dtype)] * 2]
    dside, dv, left, dp, dkk = _launch(
        static, values, functools.partial(gradients.values, static, h, values),
        (many, h, b),
        (side, met.q, met.k, v, do, y, x, states, grads, *met.late[:1], *met.kk), outs,
        "delta_backward_values")
    parts, grid_heads, each = -(-d // keys.block_d), h, gradients.keys
    wide_q, wide_k = own(q), own(k)
    if "shared_keys" in static.variant and q.shape[2] == k.shape[2] < h:
        # a program adds up the heads that share its keys, and nothing is left to XLA
        grid_heads, each = k.shape[2], gradients.shared_keys
        wide_q, wide_k = out(q.shape, q.dtype), out(k.shape, k.dtype)
    given: tuple[Any, ...] = side, q, k, do, y, left, states, grads, dp, dkk
    more = out((b, h, parts, many, CHUNK), F32)
    if static.channels:
        given, more = (*given, g), out(g.shape, F32)
    dq, dk, found = _launch(
        static, keys, functools.partial(each, static, h, keys),
        (many * parts, grid_heads, b), given, [wide_q, wide_k, more],
        "delta_backward_keys")
    if static.channels:
        return dside, dq, dk, dv, found, d_state
    # what queries ask of the state is known by parts of the key channels
    row = jax.lax.broadcasted_iota(jnp.int32, side.shape, 3)
    enter = row == Side._fields.index("enter")
    dside = dside + jnp.where(enter, found.sum(2)[:, :, :, None], 0.0)
    return dside, dq, dk, dv, None, d_state
