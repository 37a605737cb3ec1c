"""Linear attention with decay on TPU (Mosaic): the state stays on the chip.

The last axis of the grid is time. A step takes a block of some chunks and does each
step of their arithmetic for all of them, since the matrix unit has something to do only
where products that do not wait for each other stand side by side in the program; only
the short updates of the state are a chain. The state [V,D] float32 waits in fast memory
for the next step, whole: it has at most 256 x 256 numbers, and the pairs of a chunk are
then made once. Of all states only those that blocks begin with are written out, for the
backward pass, which walks the blocks from the last to the first, adds up dk and dv of
a key head over its query heads, and makes the states between the chunks again.

What limits it, of H heads at D = V = 128 in bfloat16 and chunks of 128: 8 * 128 flops a
token and channel, and 8 bytes of q, k, v and o, are 128 flops a byte; a v6e has 560 for
each byte that it can move. So time cannot be less than the bytes take, and what the
program has to reach is that its bundles take no longer: the compile record says how far
it is from that.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear.tpu_block import (
    Arrays, Call, ChunkContext, arrays, specs, tokens, turned
)
from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.tiles import LinearTpu


def _states(decays, rows, s) -> list[Any]:
    """The states before each chunk and after the last; rows: k and v of each."""
    found = [s]
    for decay, (k, v) in zip(decays, rows):
        # v^T leave(k): [c,V] by [c,D] is [V,D]
        more = dot(v, decay.leave(k).astype(k.dtype), TN)
        found.append(decay.kept(found[-1]) + more)  # s' = total s + v^T leave(k)
    return found


def _forward(call: Call, x: Arrays, outs, scratch):
    after_ref, o_ref, *begun_ref = outs
    s_ref, = scratch
    h, n = pl.program_id(1), pl.program_id(2)
    ctx = ChunkContext(call, x, h, n)

    @pl.when(n == 0)
    def _start():
        s_ref[...] = x.state[0, 0]  # [V,D]

    # chunk by chunk for each step, since the program's order is that of its products
    q, k, v = ([ctx.rows(a, at) for at in ctx.chunks] for a in (x.q, x.k, x.v))
    decays = ctx.decays()

    def low(a):
        return a.astype(x.q.dtype)

    if begun_ref:
        begun_ref[0][0, 0, 0] = s_ref[...]  # for the way back
    pairs = [low(p) for p in ctx.pairs(decays, list(zip(q, k)))]  # [c,c]
    *states, last = _states(decays, zip(k, v), s_ref[...])
    s_ref[...] = last
    for m, at in enumerate(ctx.chunks):
        # enter(q) s^T + pairs v: [c,D] by [V,D], [c,c] by [c,V] are [c,V]
        o = dot(low(decays[m].enter(q[m])), low(states[m]), NT)
        o_ref[0, 0, at] = (o + dot(pairs[m], v[m], NN)).astype(o_ref.dtype)

    @pl.when(n == pl.num_programs(2) - 1)
    def _finish():
        after_ref[0, 0] = last


def _backward(call: Call, x: Arrays, outs, scratch):
    dq_ref, dk_ref, dv_ref, before_ref, *dg_ref = outs
    ds_ref, *sums = scratch
    kv, back, g = (pl.program_id(a) for a in (1, 2, 3))
    steps = pl.num_programs(2)
    ctx = ChunkContext(call, x, kv * call.groups + g, steps - 1 - back)

    @pl.when(back == 0)
    def _start():
        ds_ref[g] = x.d_state[0, 0]  # [V,D]

    q, k, v, do = ([ctx.rows(a, at) for at in ctx.chunks]
                   for a in (x.q, x.k, x.v, x.do))
    decays = ctx.decays()

    def low(a):
        return a.astype(x.q.dtype)

    qk = list(zip(q, k))
    pairs = [low(p) for p in ctx.pairs(decays, qk)]  # [c,c]
    states = _states(decays, zip(k[:-1], v), x.begun[0, 0, 0])
    ds = [ds_ref[g]]
    for m in reversed(range(len(q))):
        # do^T enter(q): [c,V] by [c,D] is [V,D]
        more = dot(do[m], low(decays[m].enter(q[m])), TN)
        ds.insert(0, decays[m].kept(ds[0]) + more)  # ds = total ds' + do^T enter(q)
    # ds[m]: the gradient of the state that chunk m ends with
    before, *ds = ds
    ds_ref[g] = before
    # pairs^T do + leave(k) ds^T: [c,V]
    dv = [dot(p, a, TN) + dot(low(decay.leave(b)), low(own), NT)
          for p, a, decay, b, own in zip(pairs, do, decays, k, ds)]
    # dp = do v^T [c,c]; do s and v ds: [c,V] by [V,D] is [c,D]
    given = [(dot(a, b, NT), dot(a, low(s), NN), dot(b, low(own), NN),
              (s * own).sum(0, keepdims=True))
             for a, b, s, own in zip(do, v, states, ds)]
    found = ctx.back(decays, qk, given)
    for m, at in enumerate(ctx.chunks):
        dq_ref[0, 0, at] = found[m].dq.astype(dq_ref.dtype)
        if dg_ref:
            place = (0, 0, at) if ctx.by_channel else (0, 0, slice(None), at)
            dg_ref[0][place] = found[m].dg
        _add(g, sums, (dk_ref, dv_ref), at, (found[m].dk, dv[m]))

    @pl.when(back == steps - 1)
    def _finish():
        before_ref[0, g] = before

    if sums:
        @pl.when(g == call.groups - 1)
        def _write():
            for out, total in zip((dk_ref, dv_ref), sums):
                out[0, 0] = total[...].astype(out.dtype)


def _add(g, sums, outs, at: slice, values) -> None:
    """Adds a chunk's dk and dv of query head g to those of the heads before it."""
    for n, value in enumerate(values):
        if not sums:
            outs[n][0, 0, at] = value.astype(outs[n].dtype)
            continue
        # the first head finds what those of the key head before have left
        before = jnp.where(g == 0, jnp.zeros(value.shape, F32), sums[n][at])
        sums[n][at] = before + value


def _launch(call: Call, body, grid, x: Arrays, cut: Arrays, outs, out_specs, scratch,
            name: str) -> Any:
    # blocks in order, heads of a group in turn: states and sums wait in scratch
    order: Any = ("parallel", "parallel", *["arbitrary"] * (len(grid) - 2))
    return pl.pallas_call(
        lambda x, *refs: body(call, x, refs[:len(outs)], refs[len(outs):]),
        grid=grid, in_specs=(cut,), out_shape=outs, out_specs=out_specs,
        scratch_shapes=scratch, interpret=call.interpret, name=name,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=call.vmem),
    )(x)


def _call(static, tile: LinearTpu, t: int, groups: int) -> Call:
    c = tile.chunk
    block = min(tile.block, -(-t // c) * c)  # no longer than T
    return Call(t, block, c, groups, static.scale, static.vmem, static.interpret)


def forward(static, flags, q, k, v, g, state, save: bool):
    """The turned state [B,H,V,D] after the last token, o [B,T,H,V], and, to `save`, the
    states [B,H,N,V,D] that blocks of the backward pass begin with."""
    (b, t, h, d), width = q.shape, v.shape[3]
    call = _call(static, static.back if save else static.ahead, t, h // k.shape[2])
    x = arrays(call, flags, q, k, v, g, state)
    steps = x.q.shape[2] // call.block
    cut = specs(call, x, lambda h, n: h, lambda h, n: h // call.groups,
                lambda h, n: n)
    (_, _, rows, lanes), vlanes = x.state.shape, x.v.shape[3]
    outs = [jax.ShapeDtypeStruct(x.state.shape, F32),
            jax.ShapeDtypeStruct((b, h, x.q.shape[2], vlanes), static.dtype)]
    out_specs = [cut.state, pl.BlockSpec((1, 1, call.block, vlanes),
                                         lambda b, h, n: (b, h, n, 0))]
    if save:
        outs.append(jax.ShapeDtypeStruct((b, h, steps, rows, lanes), F32))
        out_specs.append(pl.BlockSpec((1, 1, 1, rows, lanes),
                                      lambda b, h, n: (b, h, n, 0, 0)))
    after, o, *begun = _launch(
        call, _forward, (b, h, steps), x, cut, outs, out_specs,
        [pltpu.VMEM((rows, lanes), F32)], "linear_forward")  # the state
    o = o[:, :, :t, :width].transpose(0, 2, 1, 3)
    return after[:, :, :width, :d], o, begun[0] if save else None


def backward(static, flags, q, k, v, g, state, begun, d_state, do):
    """dq, dk, dv, dg and the gradient of the turned state that came in."""
    (b, t, h, d), (heads, width) = q.shape, v.shape[2:]
    rows, lanes = begun.shape[3:]
    groups = _together(h // heads, rows * lanes * 4, static.vmem)
    call = _call(static, static.back, t, groups)
    x = arrays(call, flags, q, k, v, g, None)._replace(
        do=tokens(do, call.block), begun=begun, d_state=turned(d_state))
    n = begun.shape[2]

    def query(kv, back, g):
        return kv * groups + g

    def block(kv, back, g):
        return n - 1 - back

    cut = specs(call, x, query, lambda kv, back, g: kv * groups // (h // heads),
                block)
    own = pl.BlockSpec((1, groups, rows, lanes), lambda b, kv, *at: (b, kv, 0, 0))

    def once(a):
        return pl.BlockSpec((1, 1, call.block, a.shape[3]),
                            lambda b, kv, back, g: (b, kv, n - 1 - back, 0))

    many, full = h // groups, x.q.shape[2]
    kind = k.dtype if many == heads else F32
    outs = [jax.ShapeDtypeStruct(x.q.shape, q.dtype),
            *(jax.ShapeDtypeStruct((b, many, full, a.shape[3]), kind)
              for a in (x.k, x.v)),
            jax.ShapeDtypeStruct(x.d_state.shape, F32)]
    out_specs = [cut.q, once(x.k), once(x.v), own]
    if g is not None:
        line = jax.ShapeDtypeStruct((b, h, 1, full), F32)
        outs.append(jax.ShapeDtypeStruct(x.g.shape, F32) if g.ndim == 4 else line)
        out_specs.append(cut.g if g.ndim == 4 else pl.BlockSpec(
            (1, 1, 1, call.block), lambda b, *at: (b, query(*at), 0, block(*at))))
    scratch = [pltpu.VMEM((groups, rows, lanes), F32)]  # ds of each head
    if groups > 1:
        scratch += [pltpu.VMEM((call.block, a.shape[3]), F32) for a in (x.k, x.v)]
    dq, dk, dv, before, *dg = _launch(
        call, _backward, (b, many, n, groups), x, cut, outs, out_specs, scratch,
        "linear_backward")
    # a key head whose query heads did not fit one program
    dk, dv = (a.reshape(b, heads, -1, *a.shape[2:]).sum(2).astype(k.dtype)
              if many > heads else a for a in (dk, dv))

    def back(a, like):
        return a[:, :, :t, :like.shape[3]].transpose(0, 2, 1, 3)

    found = [back(dq, q), back(dk, k), back(dv, v)]
    return *found, _decay(flags, g, dg, t), before[:, :, :width, :d]


def _together(groups: int, size: int, vmem: int) -> int:
    """How many query heads of a key head one program takes: a divisor of all, whose
    states of `size` bytes fit."""
    most = max(vmem // 8 // size, 1)
    return next(n for n in range(min(groups, most), 0, -1) if groups % n == 0)


def _decay(flags, g, dg, t: int):
    """dg [B,T,H] or [B,T,H,D], 0 where the decay is not that of `g`."""
    if g is None:
        return None
    dg = dg[0][:, :, :t] if g.ndim == 4 else dg[0][:, :, 0, :t, None]
    dg = dg[..., :g.shape[3] if g.ndim == 4 else 1].transpose(0, 2, 1, 3)
    if g.ndim == 4 and flags is not None:
        dg = jnp.where(flags[:, :, None, None] == 1, dg, 0)
    return dg if g.ndim == 4 else dg[..., 0]
