"""The linear memory on GPU by Triton, on sm80 and newer.

A program takes some columns of W and S, which do not meet those of others, from the
first chunk to the last, and in the backward pass from the last to the first, with W and
S as chunks began with them, which the forward pass wrote down. Key channels are taken
64 at a time, so that few arrays are in registers at once. What programs of other
columns add to the gradients of q, k and the tokens' numbers is added up by XLA in
float32. Tiles were chosen by what the compiler spills, not timed: no GPU was at hand.
On Hopper and Blackwell chunks of 16 at D = 64 spill nothing and those of 64 at D = 128
some kB, backward. Before Hopper Triton has every warp make all of such small products:
two warps are best for chunks of 16 at D = 64, which spill 0.9 kB, and wider ones spill
tens of kB there, so that XLA's form is likely faster on them (MATRIX.md).

Source: see `pallas_kernels/memory/api.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tables
from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.machine.triton import power
from pallas_kernels.memory.chunk import ROWS, Own
from pallas_kernels.memory.triton_chunk import Program, added, many_of


def _program(static, columns: int, rows: int) -> Program:
    part, h, b = (pl.program_id(n) for n in range(3))
    return Program(static.chunk, static.tile, columns, b, h, part, rows)


def _forward(static, columns: int, side, q_ref, k_ref, v_ref, w_ref, s_ref, o_ref,
             w_end_ref, s_end_ref, *kept):
    """Some columns of W and S from the first chunk to the last."""
    ctx = _program(static, columns, q_ref.shape[0])
    parts = range(many_of(q_ref.shape[3]))

    def step(n, state):
        own, low = ctx.own(side, n), q_ref.dtype
        held, run = ([a.astype(low) for a in half] for half in state)
        for ref, a in zip(kept, (held, run)):
            ctx.put(ref, a, n)
        q, k = ([ctx.tokens(ref, n, at) for at in parts] for ref in (q_ref, k_ref))

        def through(a, state):
            """a W: [c,D] by [D,columns], piece by piece."""
            return added(dot(x, y, NN) for x, y in zip(a, state))

        v = ctx.tokens(v_ref, n).astype(F32)  # [c,columns]
        r = static.factor * (through(k, held) - v)
        met = added(dot(a, b, NT) for a, b in zip(q, k))  # q k^T [c,c]
        met = (ctx.weights(side, n) * met).astype(low)
        # o = enter q W + carry q S - (G q k^T) r: [c,columns]
        o = own.enter * through(q, held) + own.carry * through(q, run)
        ctx.write(o_ref, o - dot(met, r.astype(low), NN), ctx.b, n)
        wrote, moved = (own.end * r).astype(low), (own.moved * r).astype(low)
        # [c,D] by [c,columns] is [D,columns]
        after = tuple(own.keep * w + own.feed * s - dot(a, wrote, TN)
                      for w, s, a in zip(*state, k))
        return after, tuple(own.held * s - dot(a, moved, TN)
                            for s, a in zip(state[1], k))

    begin = ctx.state(w_ref), ctx.state(s_ref)
    w, s = jax.lax.fori_loop(0, side.shape[2], step, begin)
    ctx.put(w_end_ref, w)
    ctx.put(s_end_ref, s)


def _backward(static, columns: int, side, q_ref, k_ref, v_ref, do_ref, w_ref, s_ref,
              dw_end_ref, ds_end_ref, dside_ref, dq_ref, dk_ref, dv_ref, dw_ref,
              ds_ref):
    """The gradients of these columns from the last chunk to the first."""
    ctx, many = _program(static, columns, q_ref.shape[0]), side.shape[2]
    parts = range(many_of(q_ref.shape[3]))

    def step(i, grads):
        n, low = many - 1 - i, q_ref.dtype
        own, weights, found = ctx.own(side, n), ctx.weights(side, n), []
        for at, dw, ds in zip(parts, *grads):
            q, k = ctx.tokens(q_ref, n, at), ctx.tokens(k_ref, n, at)  # [c,size]
            # k W, q k^T, k dW', k dS'
            found.append((
                dot(k, ctx.piece(w_ref, at, n), NN), dot(q, k, NT),
                dot(k, dw.astype(low), NN), dot(k, ds.astype(low), NN)))
        asked, x, at_w, at_s = (added(a) for a in zip(*found))
        do, v = (ctx.tokens(ref, n) for ref in (do_ref, v_ref))  # [c,columns]
        r = static.factor * (asked - v.astype(F32))  # as in the forward pass
        # o = .. - (G x) r with x = q k^T
        back = -dot(do, r.astype(low), NT)  # d(G x) [c,c]
        here = ctx.row, ctx.h, n
        triton.store(dside_ref.at[(*here, pl.ds(ctx.b * 0, ctx.c))], x * back)
        dx, dr = (weights * back).astype(low), -dot((weights * x).astype(low), do, TN)
        dz = static.factor * (dr - own.end * at_w - own.moved * at_s)  # d(k W), -dv
        ctx.write(dv_ref, -dz, ctx.b, n)
        given = (dz.astype(low), (own.end * r).astype(low), (own.moved * r).astype(low),
                 dx, *((a * do.astype(F32)).astype(low) for a in own[:2]))
        pieces = [_piece(ctx, n, at, given, own, (q_ref, k_ref, do, w_ref, s_ref),
                         (dq_ref, dk_ref), *of) for at, *of in zip(parts, *grads)]
        dws, dss, *numbers = zip(*pieces)
        enter, carry, *kept = (added(a) for a in numbers)
        rows = Own(enter, carry, -(r * at_w).sum(1), -(r * at_s).sum(1), *(
            _first(a.sum(0), ctx.c) for a in kept))
        for at in range(ROWS):
            row = rows[at] if at < len(rows) else jnp.zeros((ctx.c,), F32)
            triton.store(dside_ref.at[(*here, ctx.b * 0 + ctx.c + at)], row)
        return dws, dss

    begin = ctx.state(dw_end_ref), ctx.state(ds_end_ref)
    dw, ds = jax.lax.fori_loop(0, many, step, begin)
    ctx.put(dw_ref, dw)
    ctx.put(ds_ref, ds)


def _piece(ctx: Program, n, at: int, given, own: Own, refs, outs, dw, ds):
    """Of some key channels of a chunk dW and dS [size,columns], and what they add to
    the gradients of the numbers; dq and dk are written."""
    (q_ref, k_ref, do, w_ref, s_ref), low = refs, refs[0].dtype
    dz, wrote, moved, dx, entered, carried = given
    q, k = ctx.tokens(q_ref, n, at), ctx.tokens(k_ref, n, at)  # [c,size]
    held, run = ctx.piece(w_ref, at, n), ctx.piece(s_ref, at, n)  # [size,columns]
    asked_w, asked_s = dot(do, held, NT), dot(do, run, NT)  # do W^T, do S^T [c,size]
    dq = own.enter * asked_w + own.carry * asked_s + dot(dx, k, NN)
    ctx.write(outs[0], dq, ctx.row, n, at)
    # k stands in k W, in both updates and in q k^T
    dk = dot(dz, held, NT) - dot(wrote, dw.astype(low), NT)
    dk = dk - dot(moved, ds.astype(low), NT) + dot(dx, q, TN)
    ctx.write(outs[1], dk, ctx.row, n, at)
    q32, held32, run32 = (a.astype(F32) for a in (q, held, run))
    numbers = ((q32 * asked_w).sum(1), (q32 * asked_s).sum(1), (held32 * dw).sum(0),
               (run32 * dw).sum(0), (run32 * ds).sum(0))
    # dW = keep dW' + q^T (enter do) + k^T dz: [c,size] by [c,columns]
    before = own.keep * dw + dot(q, entered, TN) + dot(k, dz, TN)
    ds = own.feed * dw + own.held * ds + dot(q, carried, TN)
    return before, ds, *numbers


def _first(a, c: int):
    """A number in the first place of a row [c]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (c,), 0)
    return jnp.where(lane == 0, a, 0.0)


def _columns(d: int, width: int, itemsize: int) -> int:
    """Columns of a program: few enough that W, S and their gradients, float32, fit into
    the registers of its warps beside a chunk's tokens."""
    most = 64 if d <= 64 else 32 if d <= 128 else 16
    if itemsize == 4:
        most = min(most, 32) if d <= 64 else 16
    return min(most, power(width))


def _launch(static, kernel, grid, args, outs, warps: int, stages: int,
            name: str) -> Any:
    return pl.pallas_call(
        kernel, grid=grid, out_shape=outs, name=name, interpret=static.interpret,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    )(*args)


def forward(static, side, q, k, v, weights, momentum, keep: bool):
    """W and S [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass W and S that
    chunks begin with [B,H,N,D,V]."""
    (b, h, d, width), out = weights.shape, jax.ShapeDtypeStruct
    columns = _columns(d, width, q.dtype.itemsize)
    # products of 64 tokens leave less room; nothing is added up over programs here
    columns = 16 if static.tile == 64 else columns
    outs = [out(v.shape, v.dtype), *[out(weights.shape, F32)] * 2]
    if keep:
        outs += [out((b, h, side.shape[2], d, width), q.dtype)] * 2
    o, after, run, *kept = _launch(
        static, functools.partial(_forward, static, columns),
        (-(-width // columns), h, b), (side, q, k, v, weights, momentum), outs,
        4 if d <= 64 and static.tile <= 32 else 8, 1, "memory_forward")
    return after, run, o, *kept


def backward(static, side, q, k, v, kept, d_after, d_run, do):
    """The gradients of side, q, k, v, and of W and S before the first token."""
    (b, h, d, width), out = d_after.shape, jax.ShapeDtypeStruct
    shape = tables.Shape(static.t, static.t, d, width, q.dtype.itemsize)
    tile = tables.chunks(tables.device_kind(), "memory", shape, backend="triton")
    columns = min(tile.block_v, _columns(d, width, q.dtype.itemsize))
    parts = -(-width // columns)

    def several(a):
        """An array of each part, in float32 where there is more than one."""
        return out((parts * b, *a.shape[1:]), F32 if parts > 1 else a.dtype)

    outs = [several(side), several(q), several(k), out(v.shape, v.dtype),
            *[out(d_after.shape, F32)] * 2]
    *found, dv, dw, ds = _launch(
        static, functools.partial(_backward, static, columns), (parts, h, b),
        (side, q, k, v, do, *kept, d_after, d_run), outs, tile.num_warps,
        tile.num_stages, "memory_backward")
    dside, dq, dk = (
        a.reshape(parts, b, *a.shape[1:]).sum(0).astype(like.dtype)
        if parts > 1 else a for a, like in zip(found, (side, q, k)))
    return dside, dq, dk, dv, dw, ds
