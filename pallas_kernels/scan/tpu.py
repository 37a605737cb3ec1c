"""Softmax over every prefix on TPU (Mosaic): chunks are grid steps, in order.

The state (m, u, w) stays in fast memory from chunk to chunk, one for each query head;
the heads of a group take turns on the innermost axis of the grid, so that v is fetched
once for all of them. Tiles of P lie as [t,i] on the way there, where o = P v needs no
transpose, and as [i,t] on the way back, where dv = P do needs none.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.machine.product import F32, NN, NT, dot
from pallas_kernels.machine.tpu import column
from pallas_kernels.scan.api import (
    Saved, exp_diff, inverse, product, score_gradients, weighted, weights
)

LOWEST = -jnp.inf


def rows(*columns):
    """Columns [c,1] as rows [1,c]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], 128), 1)
    both = columns[0]
    for n, a in enumerate(columns[1:], 1):
        both = jnp.where(lane == n, a, both)  # a lane each
    turned = jnp.broadcast_to(both, lane.shape).T  # [128,c]
    return [turned[n:n + 1] for n in range(len(columns))]


def _seen(c: int, code, tokens: int):
    """Which token sees which, with tokens t along axis `tokens`; code [1,c] or None."""
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (c, c), n)
            for n in (1 - tokens, tokens))
    if code is None:
        return i <= t
    col, row = _column(code), code
    own, segment = (col, jnp.abs(row)) if tokens else (row, jnp.abs(col))
    return (i <= t) & (own == segment)


def _column(code):
    """An int32 row as a column: segments are counted by tokens, exact in float32."""
    return column(code.astype(F32)).astype(jnp.int32)


def _forward(has_code, *refs):
    code, refs = (refs[0][0], refs[1:]) if has_code else (None, refs)
    (s_ref, v_ref, *given, o_ref, m_ref, u_ref, w_ref,
     m_now, u_now, w_now, segment) = refs
    n, g = pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        for now, ref in zip((m_now, u_now, w_now), given):
            now[g] = ref[0, 0]
        segment[g] = jnp.ones((1, 1), jnp.int32)

    s, v = s_ref[0, 0], v_ref[0, 0]  # [1,c], [c,V]
    c = s.shape[1]
    m_in, enters, real = m_now[g], True, None
    if code is not None:
        real = _column(code)
        # the state that came in counts for its own segment
        enters = jnp.abs(real) == segment[g]
        m_in = jnp.where(enters, m_in, LOWEST)
    seen = _seen(c, code, 0)  # [t,i]
    # m_t: the greatest score of a prefix, and of what came in
    m = jnp.maximum(jnp.where(seen, s, LOWEST).max(1, keepdims=True), m_in)
    p, share = weights(s, m, seen), exp_diff(m_in, m)  # P [t,i], [t,1]
    u = p.sum(1, keepdims=True) + share * u_now[g]  # [t,1]
    # P v + share w: [t,i] by [i,V] is [t,V]
    w = weighted(p, v) + share * w_now[g]
    o_ref[0, 0] = (w * inverse(u, real)).astype(o_ref.dtype)  # [t,V]
    m_ref[0, 0], u_ref[0, 0] = rows(m, u)
    w_ref[0, 0, 0] = w[c - 1:]  # after the last token
    m_now[g], u_now[g], w_now[g] = m[c - 1:], u[c - 1:], w[c - 1:]
    if code is not None:
        segment[g] = jnp.abs(code[:, c - 1:])


def _backward(has_code, groups, *refs):
    (code, segment_in), refs = (
        ((refs[0][0], refs[1][0, 0]), refs[2:]) if has_code else ((None, None), refs))
    (s_ref, v_ref, m_ref, u_ref, m_in, u_in, w_in, do_ref, du_ref, dw_ref,
     ds_ref, dv_ref, g_ref, h_ref, g_now, h_now, ref_now, segment_now, dv_now) = refs
    n, g = pl.program_id(2), pl.program_id(3)
    s, v, m, u, do = s_ref[0, 0], v_ref[0, 0], m_ref[0, 0], u_ref[0, 0], do_ref[0, 0]
    c = s.shape[1]
    present = jnp.ones((1, c), jnp.int32) if code is None else jnp.abs(code)

    @pl.when(n == 0)
    def _():
        g_now[g], h_now[g] = dw_ref[0, 0], -du_ref[0, 0]
        ref_now[g], segment_now[g] = m[:, c - 1:], present[:, c - 1:]

    @pl.when(g == 0)
    def _():
        dv_now[...] = jnp.zeros(dv_now.shape, F32)

    down, r = column(s), inverse(u, code)  # [i,1], 1/u [1,t]
    enters = True if code is None else present == segment_in
    share = exp_diff(jnp.where(enters, m_in[0, 0, 0], LOWEST), m)  # [1,t]
    wide = do.astype(F32)
    # P [i,t], v do^T [i,t], and w.do of what came in [1,t]
    ds, p, delta = score_gradients(
        weights(down, m, _seen(c, code, 1)), product(v, do), r, share,
        dot(w_in[0, 0, 0], wide, NT), u_in[0, 0, 0])
    # what later chunks ask for
    reach = down if code is None else jnp.where(
        _column(code) == segment_now[g], down, LOWEST)
    e = exp_diff(reach, ref_now[g])  # [i,1]
    along = (v.astype(F32) * g_now[g]).sum(1, keepdims=True)  # v.G [i,1]
    ds = ds.sum(1, keepdims=True) + e * (along - h_now[g])  # [i,1]
    dv_now[...] += weighted(p, do) + e * g_now[g]  # [i,t] [t,V] -> [i,V]
    ds_ref[0, 0], = rows(ds)
    first, segment = m[:, :1], present[:, :1]
    # asked of those before, measured from m of the chunk's first token
    weight = exp_diff(first, jnp.where(present == segment, m, jnp.inf)) * r
    kept = exp_diff(jnp.where(segment == segment_now[g], first, LOWEST), ref_now[g])
    g_now[g] = dot(weight, wide, NN) + kept * g_now[g]  # [1,t] [t,V] -> [1,V]
    h_now[g] = (weight * delta).sum(1, keepdims=True) + kept * h_now[g]
    ref_now[g], segment_now[g] = first, segment
    g_ref[0, 0, 0], h_ref[0, 0, 0] = g_now[g], h_now[g]

    @pl.when(g == groups - 1)
    def _():
        dv_ref[0, 0] = dv_now[...].astype(dv_ref.dtype)


class Lay:
    """How arrays lie, heads before tokens and tokens in whole chunks, and how a step
    (batch, key head, chunk, head of the group) cuts them: (block, index) each."""

    def __init__(self, static, s, v, reverse: bool = False):
        (self.b, self.t, self.h), (*_, self.k, self.v) = s.shape, v.shape
        self.c, self.g = static.chunk, self.h // self.k
        self.n = -(-self.t // self.c)
        self.grid = self.b, self.k, self.n, self.g
        self.size, self.reverse = self.n * self.c, reverse
        head, at = self._head, self._at
        # [B,H,1,T] and [B,H|K,T,V] by chunks
        self.row = (1, 1, 1, self.c), lambda b, k, n, g: (b, head(k, g), 0, at(n))
        block = 1, 1, self.c, self.v
        self.tile = block, lambda b, k, n, g: (b, head(k, g), at(n), 0)
        self.shared = block, lambda b, k, n, g: (b, k, at(n), 0)
        # [B,1,T] and [B,N,1,1]: segments
        self.code = (1, 1, self.c), lambda b, k, n, g: (b, 0, at(n))
        self.start = (1, 1, 1, 1), lambda b, k, n, g: (b, at(n), 0, 0)

    def _head(self, k, g):
        return k * self.g + g

    def _at(self, n):
        return self.n - 1 - n if self.reverse else n

    def once(self, x: int):
        """[B,H,1,x], one of a head."""
        return (1, 1, 1, x), lambda b, k, n, g: (b, self._head(k, g), 0, 0)

    def each(self, x: int):
        """[B,H,N,1,x], one of a head and chunk."""
        return ((1, 1, 1, 1, x),
                lambda b, k, n, g: (b, self._head(k, g), self._at(n), 0, 0))

    def turned(self, a, fill=0.0):
        """[B,T,X,...] as [B,X,T,...] in whole chunks."""
        more = [(0, 0)] * (a.ndim - 3)
        ends = [(0, 0), (0, 0), (0, self.size - self.t)]
        return jnp.pad(jnp.swapaxes(a, 1, 2), ends + more, constant_values=fill)

    def back(self, a):
        """The inverse of `turned`."""
        return jnp.swapaxes(a[:, :, :self.t], 1, 2)

    def coded(self, code):
        """code [B,T] as [B,1,T] in whole chunks, padded by padding."""
        last = jnp.abs(code[:, -1:])
        rest = jnp.broadcast_to(-last, (self.b, self.size - self.t))
        return jnp.concatenate([code, rest], 1)[:, None]

    def scores(self, s):
        """[B,T,H] as [B,H,1,T]."""
        return self.turned(s, LOWEST)[:, :, None]

    def held(self, kind=F32, width: int = 1):
        """Scratch [1,width] of each head of a group."""
        return pltpu.VMEM((self.g, 1, width), kind)


def _call(static, body, grid, ins, outs, scratch, name: str) -> Any:
    """pallas_call; ins and outs: (array or shape, (block, index))."""

    def specs(some):
        return [pl.BlockSpec(*spec) for _, spec in some]

    return pl.pallas_call(
        body, grid=grid, in_specs=specs(ins), out_specs=specs(outs),
        out_shape=[a for a, _ in outs], scratch_shapes=scratch,
        interpret=static.interpret, name=name,
        compiler_params=pltpu.CompilerParams(
            # chunks in order, heads of a group in turn: states wait in scratch
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
    )(*(a for a, _ in ins))


def _struct(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def forward(static, code, s, v, m, u, w):
    """((m, u, w), o, Saved)."""
    lay = Lay(static, s, v)
    b, h, c = lay.b, lay.h, lay.c
    ins: list[Any] = [
        (lay.scores(s), lay.row), (lay.turned(v), lay.shared),
        (m[..., None, None], lay.once(1)), (u[..., None, None], lay.once(1)),
        (w[:, :, None], lay.once(lay.v))]
    if code is not None:
        ins = [(lay.coded(code), lay.code), *ins]
    row = _struct(b, h, 1, lay.size), lay.row
    outs = [(_struct(b, h, lay.size, lay.v, dtype=static.dtype), lay.tile), row, row,
            (_struct(b, h, lay.n, 1, lay.v), lay.each(lay.v))]
    o, ms, us, ws = _call(
        static, functools.partial(_forward, code is not None), lay.grid, ins, outs,
        [lay.held(), lay.held(), lay.held(width=lay.v), lay.held(jnp.int32)],
        "scan_forward")
    ms, us, ws = ms[:, :, 0], us[:, :, 0], ws[:, :, :, 0]
    starts = [jnp.concatenate([first[:, :, None], a], 2) for first, a in
              ((m, ms[:, :, c - 1::c]), (u, us[:, :, c - 1::c]), (w, ws))]
    segment_in = None
    if code is not None:
        before = jnp.pad(jnp.abs(code), ((0, 0), (1, 0)), constant_values=1)
        segment_in = before[:, :-1:c]
    last = tuple(a[:, :, -1] for a in starts)
    m_in, u_in, w_in = (a[:, :, :-1] for a in starts)
    return last, lay.back(o), Saved(ms, us, m_in, u_in, w_in, segment_in)


def backward(static, code, s, v, saved: Saved, do, du, dw):
    """ds, dv, and G [B,H,V] and h [B,H] of the first chunk."""
    lay = Lay(static, s, v, reverse=True)
    b, h, k = lay.b, lay.h, lay.k
    one, many = lay.each(1), lay.each(lay.v)
    ins: list[Any] = [
        (lay.scores(s), lay.row), (lay.turned(v), lay.shared),
        (saved.m[:, :, None], lay.row), (saved.u[:, :, None], lay.row),
        (saved.m_in[..., None, None], one), (saved.u_in[..., None, None], one),
        (saved.w_in[:, :, :, None], many), (lay.turned(do), lay.tile),
        (du[..., None, None], lay.once(1)), (dw[:, :, None], lay.once(lay.v))]
    if code is not None:
        ins = [(lay.coded(code), lay.code),
               (saved.segment_in[..., None, None], lay.start), *ins]
    outs = [(_struct(b, h, 1, lay.size), lay.row),
            (_struct(b, k, lay.size, lay.v, dtype=v.dtype), lay.shared),
            (_struct(b, h, lay.n, 1, lay.v), many), (_struct(b, h, lay.n, 1, 1), one)]
    ds, dv, g, gap = _call(
        static, functools.partial(_backward, code is not None, lay.g), lay.grid, ins,
        outs, [lay.held(width=lay.v), lay.held(), lay.held(), lay.held(jnp.int32),
               pltpu.VMEM((lay.c, lay.v), F32)], "scan_backward")
    return lay.back(ds[:, :, 0]), lay.back(dv), (g[:, :, 0, 0], gap[:, :, 0, 0, 0])
