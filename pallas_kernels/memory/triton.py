"""The linear memory on GPU by Triton, on sm80 and newer.

A program takes some columns of W and S, which do not meet those of others, from the
first chunk to the last, and in the backward pass from the last to the first, with W and
S as chunks began with them, which the forward pass wrote down. What programs of other
columns add to the gradients of q, k and the tokens' numbers is added up by XLA in
float32. Tiles were chosen for what registers hold, not timed: no GPU was at hand.

Source: see `pallas_kernels/memory/api.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.machine.triton import load, power
from pallas_kernels.memory.chunk import ROWS, Own
from pallas_kernels.tile import both


class Program(NamedTuple):
    """Which columns of which head and row of the batch a program has; chunk: tokens, of
    the c that a tile has; part: its place among those that add to one array, rows of
    the batch of its results."""

    chunk: int
    c: int
    columns: int
    b: Any
    h: Any
    part: Any
    rows: int

    @property
    def first(self):
        """The first of its columns."""
        return self.part * self.columns

    @property
    def row(self):
        """Its row of arrays in which each part has its own."""
        return self.part * self.rows + self.b

    def tokens(self, ref, n, columns: bool = False):
        """Tokens of chunk n of a [B,T,H,X] array, 0 beyond the end: all channels
        [c,X], or the program's columns."""
        return read(self._at(ref, self.b, n, columns))

    def write(self, ref, value, row, n, columns: bool = False) -> None:
        """The reverse of `tokens`, into a row of the batch."""
        at, inside = self._at(ref, row, n, columns)
        triton.store(at, value.astype(ref.dtype), mask=inside)

    def _at(self, ref, row, n, columns: bool):
        width = ref.shape[3]
        size = self.columns if columns else power(width)
        first = self.first if columns else self.b * 0
        inside, start = None, n * self.chunk
        if self.chunk < self.c or ref.shape[1] % self.c:
            token = jax.lax.broadcasted_iota(jnp.int32, (self.c, size), 0)
            inside = (start + token < ref.shape[1]) & (token < self.chunk)
        if width % size:
            lane = jax.lax.broadcasted_iota(jnp.int32, (self.c, size), 1)
            inside = both(inside, first + lane < width)
        # a traced first: a slice that is known to pass the end is an error
        cut = pl.ds(first, size)
        return ref.at[row, pl.ds(start, self.c), self.h, cut], inside

    def state(self, ref, *lead):
        """The program's columns of an array [..,D,V], 0 beyond the end [D',columns]."""
        return read(self._state(ref, lead))

    def put(self, ref, value, *lead) -> None:
        """The reverse of `state`."""
        at, inside = self._state(ref, lead)
        triton.store(at, value.astype(ref.dtype), mask=inside)

    def _state(self, ref, lead):
        (d, width), inside = ref.shape[-2:], None
        shape = power(d), self.columns
        for axis, (first, size) in enumerate(((0, d), (self.first, width))):
            if size % shape[axis]:
                number = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
                inside = both(inside, first + number < size)
        zero = self.b * 0
        return ref.at[(self.b, self.h, *lead, pl.ds(zero, shape[0]),
                       pl.ds(zero + self.first, shape[1]))], inside

    def weights(self, side, n):
        """G of chunk n [c,c]."""
        return load(side.at[self.b, self.h, n, pl.ds(self.b * 0, self.c)], None, 0)

    def own(self, side, n) -> Own:
        """Its other numbers."""
        rows = [self.c + at for at in range(len(Own._fields))]
        columns = (load(side.at[self.b, self.h, n, self.b * 0 + at], None, 0)[:, None]
                   for at in rows[:4])
        return Own(*columns, *(side[self.b, self.h, n, at, 0] for at in rows[4:]))


def read(where):
    """What is at a place and inside, 0 elsewhere."""
    at, inside = where
    return load(at, inside, 0)


def _program(static, columns: int, rows: int) -> Program:
    part, h, b = (pl.program_id(n) for n in range(3))
    return Program(static.chunk, static.tile, columns, b, h, part, rows)


def _forward(static, columns: int, side, q_ref, k_ref, v_ref, w_ref, s_ref, o_ref,
             w_end_ref, s_end_ref, *kept):
    """Some columns of W and S from the first chunk to the last."""
    ctx = _program(static, columns, q_ref.shape[0])

    def step(n, state):
        w, s = state  # [D,columns]
        q, k = ctx.tokens(q_ref, n), ctx.tokens(k_ref, n)  # [c,D]
        low, own = k.dtype, ctx.own(side, n)
        held, run = w.astype(low), s.astype(low)
        for ref, a in zip(kept, (held, run)):
            ctx.put(ref, a, n)
        v = ctx.tokens(v_ref, n, True).astype(F32)  # [c,columns]
        r = static.factor * (dot(k, held, NN) - v)
        met = ctx.weights(side, n) * dot(q, k, NT)  # G q k^T [c,c]
        # o = enter q W + carry q S - (G q k^T) r: [c,columns]
        o = own.enter * dot(q, held, NN) + own.carry * dot(q, run, NN)
        o = o - dot(met.astype(low), r.astype(low), NN)
        ctx.write(o_ref, o, ctx.b, n, True)
        # [c,D] by [c,columns] is [D,columns]
        after = own.keep * w + own.feed * s - dot(k, (own.end * r).astype(low), TN)
        return after, own.held * s - dot(k, (own.moved * r).astype(low), TN)

    begin = ctx.state(w_ref), ctx.state(s_ref)
    w, s = jax.lax.fori_loop(0, side.shape[2], step, begin)
    ctx.put(w_end_ref, w)
    ctx.put(s_end_ref, s)


def _backward(static, columns: int, side, q_ref, k_ref, v_ref, do_ref, w_ref, s_ref,
              dw_end_ref, ds_end_ref, dside_ref, dq_ref, dk_ref, dv_ref, dw_ref,
              ds_ref):
    """The gradients of these columns from the last chunk to the first."""
    ctx, many = _program(static, columns, q_ref.shape[0]), side.shape[2]

    def step(i, grads):
        n, (dw, ds) = many - 1 - i, grads
        q, k = ctx.tokens(q_ref, n), ctx.tokens(k_ref, n)  # [c,D]
        do = ctx.tokens(do_ref, n, True)  # [c,columns]
        held, run = ctx.state(w_ref, n), ctx.state(s_ref, n)  # W, S [D,columns]
        low, own, weights = k.dtype, ctx.own(side, n), ctx.weights(side, n)
        v = ctx.tokens(v_ref, n, True).astype(F32)
        r = static.factor * (dot(k, held, NN) - v)  # as in the forward pass
        x = dot(q, k, NT)  # [c,c]
        # o = .. - (G x) r
        back = -dot(do, r.astype(low), NT)  # d(G x) [c,c]
        dx = (weights * back).astype(low)
        dwl, dsl = dw.astype(low), ds.astype(low)
        at_w, at_s = dot(k, dwl, NN), dot(k, dsl, NN)  # k dW', k dS' [c,columns]
        dr = -dot((weights * x).astype(low), do, TN)
        dr = dr - own.end * at_w - own.moved * at_s
        dz = static.factor * dr  # d(k W), -dv
        dzl, wide = dz.astype(low), do.astype(F32)
        ctx.write(dv_ref, -dz, ctx.b, n, True)
        asked_w, asked_s = dot(do, held, NT), dot(do, run, NT)  # [c,D]
        dq = own.enter * asked_w + own.carry * asked_s + dot(dx, k, NN)
        # k stands in k W, in both updates and in x
        dk = dot(dzl, held, NT) + dot(dx, q, TN)
        dk = dk - dot((own.end * r).astype(low), dwl, NT)
        dk = dk - dot((own.moved * r).astype(low), dsl, NT)
        ctx.write(dq_ref, dq, ctx.row, n)
        ctx.write(dk_ref, dk, ctx.row, n)
        q32, held32, run32 = (a.astype(F32) for a in (q, held, run))
        found = Own((q32 * asked_w).sum(1), (q32 * asked_s).sum(1),
                    -(r * at_w).sum(1), -(r * at_s).sum(1),
                    *(_first((a * g).sum(0).sum(0), ctx.c) for a, g in (
                        (held32, dw), (run32, dw), (run32, ds))))
        here = ctx.row, ctx.h, n
        triton.store(dside_ref.at[(*here, pl.ds(ctx.b * 0, ctx.c))], x * back)
        for at in range(ROWS):
            row = found[at] if at < len(found) else jnp.zeros((ctx.c,), F32)
            triton.store(dside_ref.at[(*here, ctx.b * 0 + ctx.c + at)], row)
        # dW = keep dW' + q^T (enter do) + k^T dz: [D,columns]
        before = own.keep * dw + dot(q, (own.enter * wide).astype(low), TN)
        before = before + dot(k, dzl, TN)
        ds = own.feed * dw + own.held * ds
        return before, ds + dot(q, (own.carry * wide).astype(low), TN)

    begin = ctx.state(dw_end_ref), ctx.state(ds_end_ref)
    dw, ds = jax.lax.fori_loop(0, many, step, begin)
    ctx.put(dw_ref, dw)
    ctx.put(ds_ref, ds)


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


def _launch(static, kernel, grid, args, outs, d: int, name: str) -> Any:
    # one stage: a chunk's products wait for the state, and loads would take registers
    warps = 4 if d <= 64 and static.tile <= 32 else 8
    return pl.pallas_call(
        kernel, grid=grid, out_shape=outs, name=name, interpret=static.interpret,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    )(*args)


def forward(static, side, q, k, v, weights, momentum, keep: bool):
    """W and S [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass W and S that
    chunks begin with [B,H,N,D,V]."""
    (b, h, d, width), out = weights.shape, jax.ShapeDtypeStruct
    columns = _columns(d, width, q.dtype.itemsize)
    outs = [out(v.shape, v.dtype), *[out(weights.shape, F32)] * 2]
    if keep:
        outs += [out((b, h, side.shape[2], d, width), q.dtype)] * 2
    o, after, run, *kept = _launch(
        static, functools.partial(_forward, static, columns),
        (-(-width // columns), h, b), (side, q, k, v, weights, momentum), outs, d,
        "memory_forward")
    return after, run, o, *kept


def backward(static, side, q, k, v, kept, d_after, d_run, do):
    """The gradients of side, q, k, v, and of W and S before the first token."""
    (b, h, d, width), out = d_after.shape, jax.ShapeDtypeStruct
    columns = _columns(d, width, q.dtype.itemsize)
    parts = -(-width // columns)

    def several(a):
        """An array of each part, in float32 where there is more than one."""
        return out((parts * b, *a.shape[1:]), F32 if parts > 1 else a.dtype)

    outs = [several(side), several(q), several(k), out(v.shape, v.dtype),
            *[out(d_after.shape, F32)] * 2]
    *found, dv, dw, ds = _launch(
        static, functools.partial(_backward, static, columns), (parts, h, b),
        (side, q, k, v, do, *kept, d_after, d_run), outs, d, "memory_backward")
    dside, dq, dk = (
        a.reshape(parts, b, *a.shape[1:]).sum(0).astype(like.dtype)
        if parts > 1 else a for a, like in zip(found, (side, q, k)))
    return dside, dq, dk, dv, dw, ds
