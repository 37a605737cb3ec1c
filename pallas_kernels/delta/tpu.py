"""The delta rule on TPU (Mosaic): one pass over the chunks, the state in fast memory.

A grid step takes some chunks of one head and does all of it: what does not depend on
the state is computed for all of them side by side, so that the units do not wait. The
backward pass goes from the last chunk to the first, with the gradient of the state in
fast memory, and makes u again from the state that a chunk began with and the inverse,
which the forward pass leaves behind.

Source: see `pallas_kernels/delta/api.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta.chunk import (
    BLOCK, CHUNK, ROWS, Side, decays, grid, halved, merged, strict
)
from pallas_kernels.machine.product import F32, NN, NT, TN, dot


def inverses(systems: list, exact: bool) -> list:
    """(I + a)^-1 of each strictly lower triangular a [CHUNK,CHUNK]."""
    i, j = grid()
    many = CHUNK // BLOCK
    own = (i // BLOCK) == (j // BLOCK)  # blocks on the diagonal
    blocks = [jnp.where(own, a, 0.0) for a in systems]
    # the lanes of every block on those of the first
    blocks = [sum_of(a[:, n * BLOCK:(n + 1) * BLOCK] for n in range(many))
              for a in blocks]
    a = jnp.concatenate(blocks)  # [systems * CHUNK,BLOCK]
    # I for each system, one below the other
    x = jnp.concatenate([jnp.where(i == j, 1.0, 0.0)] * len(systems))
    apart = -1, BLOCK, CHUNK
    for n in range(BLOCK - 1):  # row n of every block is done: out of those below
        row = x.reshape(apart)[:, n:n + 1]
        row = jnp.broadcast_to(row, x.reshape(apart).shape).reshape(x.shape)
        x = x - a[:, n:n + 1] * row
    xs = [x[m * CHUNK:(m + 1) * CHUNK] for m in range(len(systems))]
    product = functools.partial(dot, contract=NN)
    # float32 by three products of bfloat16, unless it is to be exact
    return merged(xs, systems, product if exact else halved(product))


def sum_of(parts):
    """The sum of some arrays."""
    return functools.reduce(jnp.add, parts)


def _sides(side):
    """Columns and rows of a chunk's numbers [8,CHUNK]."""
    turned = side.T  # [CHUNK,8]
    fields = range(len(Side._fields))
    return (Side(*(turned[:, n:n + 1] for n in fields)),
            Side(*(side[n:n + 1] for n in fields)))


def _cut(refs, m: int):
    """Chunk m of those that a grid step holds, of arrays of tokens."""
    return [ref[0, 0, m * CHUNK:(m + 1) * CHUNK] for ref in refs]


def _forward(static, keep: bool, side_ref, q_ref, k_ref, v_ref, start_ref, o_ref,
             final_ref, *refs):
    *kept, state = refs
    n, many = pl.program_id(2), pl.num_programs(2)

    @pl.when(n == 0)
    def _():
        state[...] = start_ref[0, 0]

    low, ready, systems = q_ref.dtype, [], []
    for m in range(static.pieces):  # what needs no state: all chunks side by side
        q, k = _cut((q_ref, k_ref), m)
        own, row = _sides(side_ref[0, 0, m])
        decay = decays(own, row, static.gated)  # [CHUNK,CHUNK], 0 for j > i
        # k k^T and q k^T: [CHUNK,D] by [CHUNK,D] is [CHUNK,CHUNK]
        systems.append(strict(own.beta * decay * dot(k, k, NT)))  # A, j < i
        ready.append((own, row, (static.scale * decay * dot(q, k, NT)).astype(low)))
    s, xs = state[...], inverses(systems, low == F32)
    for m, (own, row, p) in enumerate(ready):
        x = xs[m].astype(low)
        q, k, v = _cut((q_ref, k_ref, v_ref), m)
        held = s.astype(low)  # S [D,V]
        # r = v - enter k S, u = X beta r, o = scale (enter q S + P u): [CHUNK,V]
        r = v.astype(F32) - own.enter * dot(k, held, NN)
        u = dot(x, (own.beta * r).astype(low), NN)
        o = (static.scale * own.enter) * dot(q, held, NN) + dot(p, u.astype(low), NN)
        o_ref[0, 0, m * CHUNK:(m + 1) * CHUNK] = o.astype(o_ref.dtype)
        # S' = keep S + k^T (leave u): [CHUNK,D] by [CHUNK,V] is [D,V]
        s = row.keep[:, :1] * s + dot(k, (own.leave * u).astype(low), TN)
        if keep:
            kept[0][0, 0, m], kept[1][0, 0, m] = held, x
    state[...] = s

    @pl.when(n == many - 1)
    def _():
        final_ref[0, 0] = s


def _backward(static, side_ref, q_ref, k_ref, v_ref, do_ref, states_ref, x_ref, end_ref,
              dside_ref, dq_ref, dk_ref, dv_ref, dstart_ref, grad):
    n, many = pl.program_id(2), pl.num_programs(2)

    @pl.when(n == 0)
    def _():
        grad[...] = end_ref[0, 0]

    ds = grad[...]  # [D,V]
    for m in reversed(range(static.pieces)):
        found = _gradients(
            static, _cut((q_ref, k_ref, v_ref, do_ref), m), _sides(side_ref[0, 0, m]),
            states_ref[0, 0, m], x_ref[0, 0, m], ds)
        for ref, a in zip((dq_ref, dk_ref, dv_ref), found):
            ref[0, 0, m * CHUNK:(m + 1) * CHUNK] = a.astype(ref.dtype)
        dside_ref[0, 0, m], ds = found[3:]
    grad[...] = ds

    @pl.when(n == many - 1)
    def _():
        dstart_ref[0, 0] = ds


def _gradients(static, given, sides, held, x, ds):
    """dq, dk, dv, d(side) [ROWS,CHUNK] and the gradient of the state that the chunk
    began with, from that of the state that it ended with."""
    (q, k, v, do), (own, row) = given, sides
    low, dsl, scale = q.dtype, ds.astype(q.dtype), static.scale
    # the forward pass of the chunk
    decay = decays(own, row, static.gated)
    kk, qk = strict(decay * dot(k, k, NT)), dot(q, k, NT)  # [CHUNK,CHUNK]
    ks = dot(k, held, NN)  # k S [CHUNK,V]
    r = v.astype(F32) - own.enter * ks  # [CHUNK,V]
    u = dot(x, (own.beta * r).astype(low), NN)  # [CHUNK,V]
    ul = u.astype(low)
    # u, and through the system what stands on its right: y is the gradient of beta r
    later = dot(k, dsl, NN)  # k dS' [CHUNK,V]
    # du = P^T do + leave k dS', y = X^T du: [CHUNK,V]
    du = dot((scale * decay * qk).astype(low), do, TN) + own.leave * later
    y = dot(x, du.astype(low), TN)
    dr = own.beta * y  # dv
    away = (own.enter * dr).astype(low)  # minus the gradient of k S
    # dS = keep dS' - k^T (enter dr) + q^T (scale enter do): [D,V]
    before = row.keep[:, :1] * ds - dot(k, away, TN)
    before = before + dot(q, ((scale * own.enter) * do.astype(F32)).astype(low), TN)
    # pairs of tokens
    dp = scale * decay * dot(do, ul, NT)  # d(q k^T)
    da = -strict(dot(y.astype(low), ul, NT))  # dA = -y u^T, j < i
    pair = strict(dp * qk + own.beta * kk * da)  # weights times their gradients
    dpl, dkk = dp.astype(low), (own.beta * decay * da).astype(low)  # d(k k^T)
    from_state = dot(do, held, NT)  # do S^T [CHUNK,D]
    dq = (scale * own.enter) * from_state + dot(dpl, k, NN)  # [CHUNK,D]
    # k stands in q k^T, in k^T (leave u), in k S and twice in k k^T
    dk = dot(dpl, q, TN) + dot((own.leave * u).astype(low), dsl, NT)
    dk = dk - dot(away, held, NT) + dot(dkk, k, NN) + dot(dkk, k, TN)

    # numbers of the tokens: columns, then what is a row already
    def across(a):
        return a.sum(1, keepdims=True)

    columns = {
        "beta": across(y * r) + across(kk * da), "fine": across(pair),
        "enter": scale * across(q.astype(F32) * from_state) - across(dr * ks),
        "leave": across(u * later),
    }
    at = Side._fields.index
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, ROWS), 1)
    placed = [jnp.where(lane == at(name), a, 0.0) for name, a in columns.items()]
    side = sum_of(placed).T  # [ROWS,CHUNK]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, side.shape, n) for n in (0, 1))
    kept = jnp.sum(ds * held.astype(F32))  # d(keep)
    # a log decay counts against the earlier token of a pair
    side = side - jnp.where(i == at("fine"), pair.sum(0, keepdims=True), 0.0)
    side = side + jnp.where((i == at("keep")) & (j == 0), kept, 0.0)
    return dq, dk, dr, side, before


def _laid(a, t: int):
    """[B,T,K,X] -> [B,K,t,X], padded behind."""
    a = jnp.pad(a, ((0, 0), (0, t - a.shape[1]), (0, 0), (0, 0)))
    return a.transpose(0, 2, 1, 3)


def _launch(static, body, args, outs, scratch, reverse: bool, name: str) -> Any:
    """A pass over the chunks, `pieces` a step; args and outs with their kind: "chunk"
    [B,H,N,..], "tokens" [B,.,T,.], "state" [B,H,D,V]."""
    b, h, many = args[0][1].shape[:3]
    steps = many // static.pieces

    def at(n):
        return steps - 1 - n if reverse else n

    def spec(kind, a):
        if kind == "chunk":
            return pl.BlockSpec((1, 1, static.pieces, *a.shape[3:]),
                                lambda b, h, n: (b, h, at(n), 0, 0))
        if kind == "state":
            return pl.BlockSpec((1, 1, *a.shape[2:]), lambda b, h, n: (b, h, 0, 0))
        serves = h // a.shape[1]
        return pl.BlockSpec((1, 1, static.pieces * CHUNK, a.shape[3]),
                            lambda b, h, n: (b, h // serves, at(n), 0))

    return pl.pallas_call(
        body, grid=(b, h, steps), in_specs=[spec(*one) for one in args],
        out_specs=[spec(*one) for one in outs], out_shape=[a for _, a in outs],
        scratch_shapes=[scratch], interpret=static.interpret, name=name,
        compiler_params=pltpu.CompilerParams(
            # chunks of a head in order: the state waits in scratch
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem,
        ),
    )(*(a for _, a in args))


def forward(static, side, q, k, v, state, keep: bool):
    """state [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass: the states
    that chunks begin with [B,H,N,D,V] and the inverses [B,H,N,CHUNK,CHUNK]."""
    (b, h, many), (d, width) = side.shape[:3], state.shape[2:]
    args = [("chunk", side),
            *(("tokens", _laid(a, many * CHUNK)) for a in (q, k, v)), ("state", state)]
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
    args = [("chunk", side),
            *(("tokens", _laid(a, many * CHUNK)) for a in (q, k, v, do)),
            ("chunk", states), ("chunk", x), ("state", d_final)]
    out = jax.ShapeDtypeStruct

    # what several heads share is added up in float32
    def tokens(a):
        kind = a.dtype if a.shape[2] == h else F32
        return "tokens", out((b, h, many * CHUNK, a.shape[3]), kind)

    outs = [("chunk", out(side.shape, F32)), *map(tokens, (q, k, v)),
            ("state", out(d_final.shape, F32))]
    d_side, *grads, d_state = _launch(
        static, functools.partial(_backward, static), args, outs,
        pltpu.VMEM((d, width), F32), True, "delta_backward")
    grads = (a[:, :, :static.t].transpose(0, 2, 1, 3) for a in grads)
    return d_side, *grads, d_state
