"""The delta rule on TPU (Mosaic): one pass over the chunks, the state in fast memory.

A grid step takes one chunk of one head and does all of it; the next chunk is on its way
meanwhile. The backward pass goes from the last chunk to the first, with the gradient of
the state in fast memory, and makes u again from the state that the chunk began with and
the inverse, which the forward pass leaves behind.

Source: see `pallas_kernels/delta.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_chunk import (
    BLOCK, CHUNK, ROWS, Side, fades, grid, merged, strict
)
from pallas_kernels.steps_tpu import F32, dot

NT, NN, TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))


def inverse(a):
    """(I + a)^-1 of a strictly lower triangular a [CHUNK,CHUNK]."""
    i, j = grid()
    x = jnp.where(i == j, 1.0, 0.0)
    many = CHUNK // BLOCK
    for n in range(BLOCK - 1):  # row n of every block is done: out of those below
        at = j == (i - i % BLOCK) + n
        column = jnp.where(at, a, 0.0).sum(1, keepdims=True)
        row = x.reshape(many, BLOCK, CHUNK)[:, n:n + 1]
        row = jnp.broadcast_to(row, (many, BLOCK, CHUNK)).reshape(CHUNK, CHUNK)
        x = x - column * row
    return merged(x, a, lambda x, y: dot(x, y, NN))


def _sides(side):
    """Columns and rows of a chunk's numbers [8,CHUNK]."""
    turned = side.T
    fields = range(len(Side._fields))
    return (Side(*(turned[:, n:n + 1] for n in fields)),
            Side(*(side[n:n + 1] for n in fields)))


def _forward(static, keep: bool, side_ref, q_ref, k_ref, v_ref, start_ref, o_ref,
             final_ref, *refs):
    *kept, state = refs
    n, many = pl.program_id(2), pl.num_programs(2)

    @pl.when(n == 0)
    def _():
        state[...] = start_ref[0, 0]

    q, k, v = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0]
    own, row = _sides(side_ref[0, 0, 0])
    low, s = q.dtype, state[...]
    held = s.astype(low)
    fade = fades(own, row, static.gated)
    x = inverse(strict(own.beta * fade * dot(k, k, NT))).astype(low)
    r = v.astype(F32) - own.enter * dot(k, held, NN)
    u = dot(x, (own.beta * r).astype(low), NN)
    p = static.scale * fade * dot(q, k, NT)
    o = (static.scale * own.enter) * dot(q, held, NN)
    o_ref[0, 0] = (o + dot(p.astype(low), u.astype(low), NN)).astype(o_ref.dtype)
    after = row.keep[:, :1] * s + dot(k, (own.leave * u).astype(low), TN)
    state[...] = after
    if keep:
        states_ref, x_ref = kept
        states_ref[0, 0, 0], x_ref[0, 0, 0] = held, x

    @pl.when(n == many - 1)
    def _():
        final_ref[0, 0] = after


def _backward(static, side_ref, q_ref, k_ref, v_ref, do_ref, states_ref, x_ref, end_ref,
              dside_ref, dq_ref, dk_ref, dv_ref, dstart_ref, grad):
    n, many = pl.program_id(2), pl.num_programs(2)

    @pl.when(n == 0)
    def _():
        grad[...] = end_ref[0, 0]

    q, k, v, do = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0], do_ref[0, 0]
    own, row = _sides(side_ref[0, 0, 0])
    held, x, ds, scale = states_ref[0, 0, 0], x_ref[0, 0, 0], grad[...], static.scale
    low, dsl = q.dtype, ds.astype(q.dtype)
    # the forward pass of the chunk
    fade = fades(own, row, static.gated)
    kk = strict(fade * dot(k, k, NT))
    p = scale * fade * dot(q, k, NT)
    ks = dot(k, held, NN)
    r = v.astype(F32) - own.enter * ks
    u = dot(x, (own.beta * r).astype(low), NN)
    ul = u.astype(low)
    # u, and through the system what stands on its right: y is the gradient of beta r
    later = dot(k, dsl, NN)
    du = dot(p.astype(low), do, TN) + own.leave * later
    y = dot(x, du.astype(low), TN)
    dr = own.beta * y
    away = (own.enter * dr).astype(low)  # minus the gradient of k S
    # pairs of tokens
    dp = scale * fade * dot(do, ul, NT)
    da = -strict(dot(y.astype(low), ul, NT))
    dkk = own.beta * strict(fade * da)
    pair = strict(dp * dot(q, k, NT) + own.beta * kk * da)  # weights' gradients
    dpl, dkkl = dp.astype(low), dkk.astype(low)
    from_state = dot(do, held, NT)
    dq = (scale * own.enter) * from_state + dot(dpl, k, NN)
    dk = dot(dpl, q, TN) + dot((own.leave * u).astype(low), dsl, NT)
    dk = dk - dot(away, held, NT) + dot(dkkl, k, NN) + dot(dkkl, k, TN)
    dq_ref[0, 0], dk_ref[0, 0] = dq.astype(dq_ref.dtype), dk.astype(dk_ref.dtype)
    dv_ref[0, 0] = dr.astype(dv_ref.dtype)
    # numbers of the tokens
    across = lambda a: a.sum(1, keepdims=True)
    dbeta = across(y * r) + across(kk * da)
    denter = scale * across(q.astype(F32) * from_state) - across(dr * ks)
    dleave = across(u * later)
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, ROWS), 1)
    place = lambda n, a: jnp.where(lane == n, a, 0.0)
    columns = place(0, dbeta) + place(2, across(pair))
    columns = columns + place(4, denter) + place(5, dleave)
    kept = jnp.sum(ds * held.astype(F32))
    i = jax.lax.broadcasted_iota(jnp.int32, (ROWS, CHUNK), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (ROWS, CHUNK), 1)
    rows = jnp.where(i == 2, -pair.sum(0, keepdims=True), 0.0)
    rows = rows + jnp.where((i == 6) & (j == 0), kept, 0.0)
    dside_ref[0, 0, 0] = columns.T + rows
    # the state that the chunk began with
    before = row.keep[:, :1] * ds - dot(k, away, TN)
    before = before + dot(q, ((scale * own.enter) * do.astype(F32)).astype(low), TN)
    grad[...] = before

    @pl.when(n == many - 1)
    def _():
        dstart_ref[0, 0] = before


def _laid(a):
    """[B,T,K,X] -> [B,K,T,X], T in whole chunks."""
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % CHUNK), (0, 0), (0, 0)))
    return a.transpose(0, 2, 1, 3)


def _launch(static, body, args, outs, scratch, reverse: bool, name: str) -> Any:
    """A pass over the chunks; args and outs: [B,H,N,..] by chunk, [B,.,T,.] by 64 of
    their tokens, [B,H,D,V] by head, told apart by `kinds`."""
    b, h, many = args[0][1].shape[:3]
    at = lambda n: many - 1 - n if reverse else n

    def spec(kind, a):
        if kind == "chunk":
            return pl.BlockSpec((1, 1, 1, *a.shape[3:]),
                                lambda b, h, n: (b, h, at(n), 0, 0))
        if kind == "state":
            return pl.BlockSpec((1, 1, *a.shape[2:]), lambda b, h, n: (b, h, 0, 0))
        serves = h // a.shape[1]
        return pl.BlockSpec((1, 1, CHUNK, a.shape[3]),
                            lambda b, h, n: (b, h // serves, at(n), 0))

    return pl.pallas_call(
        body, grid=(b, h, many), in_specs=[spec(*one) for one in args],
        out_specs=[spec(*one) for one in outs], out_shape=[a for _, a in outs],
        scratch_shapes=[scratch], interpret=static.interpret, name=name,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem,
        ),
    )(*(a for _, a in args))


def forward(static, side, q, k, v, state, keep: bool):
    """state [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass: the states
    that chunks begin with [B,H,N,D,V] and the inverses [B,H,N,CHUNK,CHUNK]."""
    (b, h, many), (d, width) = side.shape[:3], state.shape[2:]
    args = [("chunk", side), *(("tokens", _laid(a)) for a in (q, k, v)),
            ("state", state)]
    out = jax.ShapeDtypeStruct
    outs = [("tokens", out((b, h, many * CHUNK, width), v.dtype)),
            ("state", out(state.shape, F32))]
    if keep:
        outs += [("chunk", out((b, h, many, *size), q.dtype))
                 for size in ((d, width), (CHUNK, CHUNK))]
    o, final, *kept = _launch(
        static, functools.partial(_forward, static, keep), args, outs,
        pltpu.VMEM((d, width), F32), False, "delta_forward")
    return final, o[:, :, :static.t].transpose(0, 2, 1, 3), *kept


def backward(static, side, q, k, v, kept, d_final, do):
    """The gradients of side, of q, k and v a head [B,T,H,.], and of the state."""
    (b, h, many), (d, width) = side.shape[:3], d_final.shape[2:]
    states, x = kept
    args = [("chunk", side), *(("tokens", _laid(a)) for a in (q, k, v, do)),
            ("chunk", states), ("chunk", x), ("state", d_final)]
    out = jax.ShapeDtypeStruct
    # what several heads share is added up in float32
    tokens = lambda a: ("tokens", out(
        (b, h, many * CHUNK, a.shape[3]), a.dtype if a.shape[2] == h else F32))
    outs = [("chunk", out(side.shape, F32)), *map(tokens, (q, k, v)),
            ("state", out(d_final.shape, F32))]
    d_side, *grads, d_state = _launch(
        static, functools.partial(_backward, static), args, outs,
        pltpu.VMEM((d, width), F32), True, "delta_backward")
    grads = (a[:, :, :static.t].transpose(0, 2, 1, 3) for a in grads)
    return d_side, *grads, d_state
