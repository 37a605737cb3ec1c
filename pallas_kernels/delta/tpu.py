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

from pallas_kernels.delta.chunk import BLOCK, CHUNK, Side, grid, halved, merged
from pallas_kernels.delta.tpu_decay import ChannelDecay, HeadDecay
from pallas_kernels.delta.tpu_gradients import gradients, sum_of
from pallas_kernels.machine.product import F32, NN, TN, dot


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


def _sides(side):
    """Columns and rows of a chunk's numbers [8,CHUNK]."""
    turned = side.T  # [CHUNK,8]
    fields = range(len(Side._fields))
    return (Side(*(turned[:, n:n + 1] for n in fields)),
            Side(*(side[n:n + 1] for n in fields)))


def _cut(refs, m: int):
    """Chunk m of those that a grid step holds, of arrays of tokens."""
    return [ref[0, 0, m * CHUNK:(m + 1) * CHUNK] for ref in refs]


def _decay(static, sides, q, k, g_ref, m: int) -> HeadDecay | ChannelDecay:
    """What decays in chunk m of a grid step."""
    own, row = sides
    if static.channels:
        return ChannelDecay(own, row, q, k, _cut((g_ref,), m)[0])
    return HeadDecay(own, row, q, k, static.gated)


def _forward(static, keep: bool, side_ref, q_ref, k_ref, v_ref, g_ref, start_ref, o_ref,
             final_ref, *refs):
    *kept, state = refs
    n, many = pl.program_id(2), pl.num_programs(2)

    @pl.when(n == 0)
    def _():
        state[...] = start_ref[0, 0]

    low, ready, systems = q_ref.dtype, [], []
    for m in range(static.pieces):  # what needs no state: all chunks side by side
        own, row = _sides(side_ref[0, 0, m])
        q, k = _cut((q_ref, k_ref), m)
        decay = _decay(static, (own, row), q, k, g_ref, m)
        qk, kk = decay.pairs()  # [CHUNK,CHUNK]
        systems.append(own.beta * kk)  # A, j < i
        p = (static.scale * qk).astype(low)
        ready.append((own, decay.met(), decay.kept(), p))
    s, xs = state[...], inverses(systems, low == F32)
    for m, (own, (qe, ke, kl), share, p) in enumerate(ready):
        x, (v,) = xs[m].astype(low), _cut((v_ref,), m)
        held = s.astype(low)  # S [D,V]
        # r = v - enter k S, u = X beta r, o = scale (enter q S + P u): [CHUNK,V]
        r = v.astype(F32) - own.enter * dot(ke, held, NN)
        u = dot(x, (own.beta * r).astype(low), NN)
        o = (static.scale * own.enter) * dot(qe, held, NN) + dot(p, u.astype(low), NN)
        o_ref[0, 0, m * CHUNK:(m + 1) * CHUNK] = o.astype(o_ref.dtype)
        # S' = keep S + k^T (leave u): [CHUNK,D] by [CHUNK,V] is [D,V]
        s = share * s + dot(kl, (own.leave * u).astype(low), TN)
        if keep:
            kept[0][0, 0, m], kept[1][0, 0, m] = held, x
    state[...] = s

    @pl.when(n == many - 1)
    def _():
        final_ref[0, 0] = s


def _backward(static, side_ref, q_ref, k_ref, v_ref, g_ref, do_ref, states_ref, x_ref,
              end_ref, dside_ref, dq_ref, dk_ref, dv_ref, *refs):
    *dg_ref, dstart_ref, grad = refs
    n, many = pl.program_id(2), pl.num_programs(2)

    @pl.when(n == 0)
    def _():
        grad[...] = end_ref[0, 0]

    ds = grad[...]  # [D,V]
    for m in reversed(range(static.pieces)):
        sides, (q, k, v, do) = _sides(side_ref[0, 0, m]), _cut(
            (q_ref, k_ref, v_ref, do_ref), m)
        decay = _decay(static, sides, q, k, g_ref, m)
        found = gradients(static, decay, (q, v, do), sides[0], states_ref[0, 0, m],
                          x_ref[0, 0, m], ds)
        dside_ref[0, 0, m], ds = found[:2]
        for ref, a in zip((dv_ref, dq_ref, dk_ref, *dg_ref), found[2:]):
            ref[0, 0, m * CHUNK:(m + 1) * CHUNK] = a.astype(ref.dtype)
    grad[...] = ds

    @pl.when(n == many - 1)
    def _():
        dstart_ref[0, 0] = ds


def _laid(a, t: int):
    """[B,T,K,X] -> [B,K,t,X], padded behind."""
    if a is None:
        return None
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
        if a is None:
            return None
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


def forward(static, side, q, k, v, g, state, keep: bool):
    """state [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass: the states
    that chunks begin with [B,H,N,D,V] and the inverses [B,H,N,CHUNK,CHUNK]."""
    (b, h, many), (d, width) = side.shape[:3], state.shape[2:]
    args = [("chunk", side),
            *(("tokens", _laid(a, many * CHUNK)) for a in (q, k, v, g)),
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


def backward(static, side, q, k, v, g, kept, d_final, do):
    """The gradients of side, of q, k and v a head [B,T,H,.], of g, and of the state."""
    (b, h, many), (d, width) = side.shape[:3], d_final.shape[2:]
    states, x = kept
    args = [("chunk", side),
            *(("tokens", _laid(a, many * CHUNK)) for a in (q, k, v, g, do)),
            ("chunk", states), ("chunk", x), ("state", d_final)]
    out = jax.ShapeDtypeStruct

    # what several heads share is added up in float32
    def tokens(a):
        kind = a.dtype if a.shape[2] == h else F32
        return "tokens", out((b, h, many * CHUNK, a.shape[3]), kind)

    outs = [("chunk", out(side.shape, F32)),
            *(tokens(a) for a in (q, k, v, g) if a is not None),
            ("state", out(d_final.shape, F32))]
    d_side, *grads, d_state = _launch(
        static, functools.partial(_backward, static), args, outs,
        pltpu.VMEM((d, width), F32), True, "delta_backward")
    grads = [a[:, :, :static.t].transpose(0, 2, 1, 3) for a in grads]
    return d_side, *grads, *[None] * (g is None), d_state
