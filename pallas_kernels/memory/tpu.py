"""The linear memory on TPU (Mosaic): one pass over the chunks, W and S in fast memory.

A grid step takes 128 tokens of a head, chunks of 16, 32 or 64 side by side: what does
not depend on W, products of tokens with each other, is made of all of them at once,
with weights that are 0 between chunks, and only W and S go from chunk to chunk. The
backward pass goes from the last step to the first: each makes again what its chunks
began with, from what the step did, and then goes back through them.

Source: see `pallas_kernels/memory/api.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.memory.api import STEP
from pallas_kernels.memory.chunk import ROWS, Own
from pallas_kernels.memory.tpu_layout import (
    laid, one_by_one, side_by_side, unlaid
)


def _cuts(c: int) -> list[slice]:
    """The chunks of a step."""
    return [slice(m, m + c) for m in range(0, STEP, c)]


def _apart(a, c: int):
    """`a` [STEP,STEP] where row and column are of one chunk, else 0."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (STEP, STEP), n) for n in (0, 1))
    return jnp.where((i // c) == (j // c), a, 0.0)


def _weights(side, c: int):
    """Weights [c,STEP] of chunks side by side -> [STEP,STEP], 0 between chunks."""
    return _apart(jnp.concatenate([side[:c]] * (STEP // c)), c)


def _owns(side, c: int) -> list[Own]:
    """The other numbers of each chunk, as columns."""
    turned = side[c:].T  # [STEP,ROWS]
    found = []
    for cut in _cuts(c):
        columns = [turned[cut, n:n + 1] for n in range(len(Own._fields))]
        found.append(Own(*columns[:4], *(a[:1] for a in columns[4:])))
    return found


def _moved_on(own: Own, w, s, k, r):
    """W and S at the end of a chunk, of those that it began with."""
    low = k.dtype
    # [c,D] by [c,V] is [D,V]
    after = own.keep * w + own.feed * s - dot(k, (own.end * r).astype(low), TN)
    return after, own.held * s - dot(k, (own.moved * r).astype(low), TN)


def _forward(static, keep: bool, side_ref, q_ref, k_ref, v_ref, w_ref, s_ref, o_ref,
             w_end_ref, s_end_ref, *refs):
    *kept, w_now, s_now = refs
    n, many, c = pl.program_id(2), pl.num_programs(2), static.tile

    @pl.when(n == 0)
    def _():
        w_now[...], s_now[...] = w_ref[0, 0], s_ref[0, 0]

    side, low = side_ref[0, 0, 0], q_ref.dtype
    q, k, v = (ref[0, 0] for ref in (q_ref, k_ref, v_ref))
    w, s = w_now[...], s_now[...]
    if keep:
        kept[0][0, 0, 0], kept[1][0, 0, 0] = w, s
    # G q k^T [STEP,STEP], of each chunk's own tokens
    met = (_weights(side, c) * dot(q, k, NT)).astype(low)
    begun, errors = [], []
    for cut, own in zip(_cuts(c), _owns(side, c)):
        held, run = w.astype(low), s.astype(low)
        # r = factor (k W - v), A q W + f q S: [c,D] by [D,V]
        r = static.factor * (dot(k[cut], held, NN) - v[cut].astype(F32))
        begun.append(
            own.enter * dot(q[cut], held, NN) + own.carry * dot(q[cut], run, NN))
        errors.append(r)
        w, s = _moved_on(own, w, s, k[cut], r)
    o = jnp.concatenate(begun) - dot(met, jnp.concatenate(errors).astype(low), NN)
    o_ref[0, 0] = o.astype(o_ref.dtype)
    w_now[...], s_now[...] = w, s

    @pl.when(n == many - 1)
    def _():
        w_end_ref[0, 0], s_end_ref[0, 0] = w, s


def _backward(static, side_ref, q_ref, k_ref, v_ref, do_ref, w_ref, s_ref, dw_end_ref,
              ds_end_ref, dside_ref, dq_ref, dk_ref, dv_ref, dw_ref, ds_ref, held_all,
              run_all, dw_now, ds_now):
    n, many, c = pl.program_id(2), pl.num_programs(2), static.tile

    @pl.when(n == 0)
    def _():
        dw_now[...], ds_now[...] = dw_end_ref[0, 0], ds_end_ref[0, 0]

    side, low = side_ref[0, 0, 0], q_ref.dtype
    q, k, v, do = (ref[0, 0] for ref in (q_ref, k_ref, v_ref, do_ref))
    w, s, owns, errors = w_ref[0, 0, 0], s_ref[0, 0, 0], _owns(side, c), []
    for m, (cut, own) in enumerate(zip(_cuts(c), owns)):  # the forward pass again
        held_all[m], run_all[m] = w.astype(low), s.astype(low)
        r = static.factor * (dot(k[cut], held_all[m], NN) - v[cut].astype(F32))
        errors.append(r)
        w, s = _moved_on(own, w, s, k[cut], r)
    # o = begun - (G x) r with x = q k^T: all chunks at once [STEP,STEP]
    weights, x = _weights(side, c), dot(q, k, NT)
    back = -_apart(dot(do, jnp.concatenate(errors).astype(low), NT), c)  # d(G x)
    dx = (weights * back).astype(low)
    from_o = -dot((weights * x).astype(low), do, TN)  # in dr [STEP,V]
    dq_pairs, dk_pairs = dot(dx, k, NN), dot(dx, q, TN)  # [STEP,D]
    dw, ds, columns = dw_now[...], ds_now[...], []
    for m in reversed(range(len(owns))):
        cut, own, r = _cuts(c)[m], owns[m], errors[m]
        found, column, dw, ds = _gradients(
            static, own, (q[cut], k[cut], do[cut]), r, from_o[cut], held_all[m],
            run_all[m], dw, ds)
        dq_ref[0, 0, cut] = (dq_pairs[cut] + found[0]).astype(dq_ref.dtype)
        dk_ref[0, 0, cut] = (dk_pairs[cut] + found[1]).astype(dk_ref.dtype)
        dv_ref[0, 0, cut] = found[2].astype(dv_ref.dtype)
        columns.append(column)
    dw_now[...], ds_now[...] = dw, ds
    # d(G) = x d(G x), the chunks side by side again [c,STEP]
    pairs = x * back
    dside_ref[0, 0, 0, :c] = functools.reduce(
        jnp.add, (pairs[cut] for cut in _cuts(c)))
    dside_ref[0, 0, 0, c:] = jnp.concatenate(columns[::-1]).T

    @pl.when(n == many - 1)
    def _():
        dw_ref[0, 0], ds_ref[0, 0] = dw, ds


def _gradients(static, own: Own, tokens, r, from_o, held, run, dw, ds):
    """(dq, dk, dv) of a chunk but for its pairs of tokens, those of its numbers
    [c,ROWS], and those of W and S that it began with, from those at its end."""
    (q, k, do), low = tokens, tokens[0].dtype
    dwl, dsl = dw.astype(low), ds.astype(low)
    at_w, at_s = dot(k, dwl, NN), dot(k, dsl, NN)  # k dW', k dS' [c,V]
    dr = from_o - own.end * at_w - own.moved * at_s
    dz = static.factor * dr  # d(k W), -dv
    dzl = dz.astype(low)
    asked_w, asked_s = dot(do, held, NT), dot(do, run, NT)  # do W^T, do S^T [c,D]
    dq = own.enter * asked_w + own.carry * asked_s
    # k stands in k W and in both updates: [c,V] by [D,V]
    dk = dot(dzl, held, NT) - dot((own.end * r).astype(low), dwl, NT)
    dk = dk - dot((own.moved * r).astype(low), dsl, NT)

    def across(a):
        return a.sum(1, keepdims=True)  # [c,1]

    def first(a):
        row = jax.lax.broadcasted_iota(jnp.int32, (r.shape[0], 1), 0)
        return jnp.where(row == 0, jnp.sum(a), 0.0)

    q32, held32, run32 = q.astype(F32), held.astype(F32), run.astype(F32)
    columns = Own(
        across(q32 * asked_w), across(q32 * asked_s), -across(r * at_w),
        -across(r * at_s), first(held32 * dw), first(run32 * dw), first(run32 * ds))
    lane = jax.lax.broadcasted_iota(jnp.int32, (r.shape[0], ROWS), 1)
    column = functools.reduce(
        jnp.add, (jnp.where(lane == n, a, 0.0) for n, a in enumerate(columns)))
    wide = do.astype(F32)
    # dW = keep dW' + q^T (enter do) + k^T dz: [c,D] by [c,V]
    before = own.keep * dw + dot(q, (own.enter * wide).astype(low), TN)
    before = before + dot(k, dzl, TN)
    ds = own.feed * dw + own.held * ds + dot(q, (own.carry * wide).astype(low), TN)
    return (dq, dk, -dz), column, before, ds


def _launch(static, body, args, outs, scratch, reverse: bool, name: str) -> Any:
    """A pass over the steps; args and outs with their kind: "step" [B,H,N,..], "tokens"
    [B,H,T,.], "state" [B,H,D,V]."""
    b, h, steps = args[0][1].shape[:3]

    def at(n):
        return steps - 1 - n if reverse else n

    def spec(kind, a):
        if kind == "step":
            return pl.BlockSpec(
                (1, 1, 1, *a.shape[3:]), lambda b, h, n: (b, h, at(n), 0, 0))
        if kind == "state":
            return pl.BlockSpec((1, 1, *a.shape[2:]), lambda b, h, n: (b, h, 0, 0))
        return pl.BlockSpec((1, 1, STEP, a.shape[3]), lambda b, h, n: (b, h, at(n), 0))

    return pl.pallas_call(
        body, grid=(b, h, steps), in_specs=[spec(*one) for one in args],
        out_specs=[spec(*one) for one in outs], out_shape=[a for _, a in outs],
        scratch_shapes=[pltpu.VMEM(*one) for one in scratch],
        interpret=static.interpret, name=name,
        compiler_params=pltpu.CompilerParams(
            # steps of a head in order: W and S wait in scratch
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem,
        ),
    )(*(a for _, a in args))


def forward(static, side, q, k, v, weights, momentum, keep: bool):
    """W and S [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass W and S that
    steps begin with [B,H,T/STEP,D,V]."""
    side, (b, h, d, width) = side_by_side(side, static.tile), weights.shape
    steps, out = side.shape[2], jax.ShapeDtypeStruct
    args = [("step", side), *(("tokens", laid(static, a, steps)) for a in (q, k, v)),
            ("state", weights), ("state", momentum)]
    outs = [("tokens", out((b, h, steps * STEP, width), v.dtype)),
            *[("state", out(weights.shape, F32))] * 2]
    if keep:
        outs += [("step", out((b, h, steps, d, width), F32))] * 2
    o, after, run, *kept = _launch(
        static, functools.partial(_forward, static, keep), args, outs,
        [((d, width), F32)] * 2, False, "memory_forward")
    return after, run, unlaid(static, o), *kept


def backward(static, side, q, k, v, kept, d_after, d_run, do):
    """The gradients of side, q, k, v, and of W and S before the first token."""
    side, (b, h, d, width) = side_by_side(side, static.tile), d_after.shape
    steps, out, many = side.shape[2], jax.ShapeDtypeStruct, STEP // static.tile
    args = [("step", side),
            *(("tokens", laid(static, a, steps)) for a in (q, k, v, do)),
            *(("step", a) for a in kept), ("state", d_after), ("state", d_run)]
    outs = [("step", out(side.shape, F32)), *(
        ("tokens", out((b, h, steps * STEP, a.shape[3]), a.dtype)) for a in (q, k, v)),
        *[("state", out(d_after.shape, F32))] * 2]
    scratch = [*[((many, d, width), q.dtype)] * 2, *[((d, width), F32)] * 2]
    d_side, *grads, dw, ds = _launch(
        static, functools.partial(_backward, static), args, outs, scratch, True,
        "memory_backward")
    grads = (unlaid(static, a) for a in grads)
    return one_by_one(d_side, static.tile), *grads, dw, ds
