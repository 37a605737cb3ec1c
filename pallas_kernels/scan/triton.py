"""Softmax over every prefix on GPU by Triton: chunks are programs, side by side.

Every chunk's own state (m, u, w) is made first; a scan over the chunks, logarithmic in
their number, gives what each begins with, and then all chunks are computed at once. On
the way back a chunk computes what its tokens ask of each other and of those before it,
a scan from the last chunk to the first adds that up, and a last pass adds what has
reached each chunk. Arrays are read where they lie, [B,T,H] and [B,T,K,V].
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.machine.product import F32
from pallas_kernels.machine.triton import block, load, pieces, write, zeros
from pallas_kernels.scan.api import (
    Saved, exp_diff, inverse, product, score_gradients, weighted, weights
)

LOWEST = -jnp.inf


class Arrays(NamedTuple):
    """What kernels read; None for what a pass or call does not use.

    s [B,T,H] float32; v [B,T,K,V]; code [B,T]; m, u [B,H,T]; do [B,T,H,V]; m_in, u_in
    [B,H,N], w_in [B,H,N,V], segment_in [B,N]: what a chunk begins with; ends [B,N]: the
    segment it ends with; ref, h [B,H,N], g [B,H,N,V] and segment [B,N]: what later
    chunks ask for.
    """

    s: Any
    v: Any
    code: Any = None
    m: Any = None
    u: Any = None
    do: Any = None
    m_in: Any = None
    u_in: Any = None
    w_in: Any = None
    segment_in: Any = None
    ends: Any = None
    ref: Any = None
    h: Any = None
    g: Any = None
    segment: Any = None


class ChunkContext:
    """One chunk: `c` tokens from `n * c` on, of row b."""

    def __init__(self, c: int, x: Arrays):
        self.x, self.c = x, c
        self.n, self.head, self.b = (pl.program_id(a) for a in range(3))
        self.start = self.n * c
        self.t = x.s.shape[1]
        self.number = self.start + jax.lax.broadcasted_iota(jnp.int32, (c,), 0)
        self.inside = self.number < self.t if self.t % c else None

    def scores(self, h):
        """s [c], -inf beyond the end."""
        at = self.x.s.at[self.b, pl.ds(self.start, self.c), h]
        return load(at, self.inside, LOWEST)

    def code(self):
        """code [c], 0 beyond the end; None if there is one segment."""
        if self.x.code is None:
            return None
        return load(self.x.code.at[self.b, pl.ds(self.start, self.c)], self.inside, 0)

    def line(self, ref, h, other):
        """[c] of a [B,H,T] array, `other` beyond the end."""
        at = ref.at[self.b, h, pl.ds(self.start, self.c)]
        return load(at, self.inside, other)

    def tile(self, ref, h):
        """[c,V] of a [B,T,H,V] array, in pieces."""
        return block(ref, self.b, self.start, self.c, h)

    def one(self, ref, h):
        """The number of a [B,H,N] array."""
        return ref[self.b, h, self.n]

    def wide(self, ref, h):
        """[V] of a [B,H,N,V] array, in pieces."""
        found = []
        for at, inside in _lanes(ref, self.b, h, self.n):
            found.append(load(at, inside, 0.0))
        return found

    def put(self, ref, value, h):
        """The reverse of `wide`, a piece each."""
        for (at, inside), piece in zip(_lanes(ref, self.b, h, self.n), value):
            triton.store(at, piece, mask=inside)

    def put_line(self, at, value):
        """[c] tokens at a place."""
        triton.store(at, value, mask=self.inside)

    def seen(self, code, tokens: int):
        """Which token sees which, tokens t along axis `tokens`."""
        i, t = (jax.lax.broadcasted_iota(jnp.int32, (self.c, self.c), n)
                for n in (1 - tokens, tokens))
        if code is None:
            return i <= t  # i is seen, t sees
        mine, other = code, jnp.abs(code)
        mine, other = ((mine[:, None], other[None]) if tokens
                       else (mine[None], other[:, None]))
        return (i <= t) & (mine == other)


def _lanes(ref, b, h, n):
    zero = n * 0  # a traced 0, as in `machine/triton.py`
    for first, size in pieces(ref.shape[3]):
        lane = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        inside = None if first + size <= ref.shape[3] else first + lane < ref.shape[3]
        yield ref.at[b, h, n, pl.ds(zero + first, size)], inside


def _totals(c, x: Arrays, m_ref, u_ref, w_ref):
    ctx = ChunkContext(c, x)
    h, group = ctx.head, x.s.shape[2] // x.v.shape[2]
    s, code = ctx.scores(h), ctx.code()
    # only the segment that the chunk ends with goes on
    if code is not None:
        s = jnp.where(code == x.ends[ctx.b, ctx.n], s, LOWEST)
    m = s.max(0)
    p = exp_diff(s, m)  # [c], at most 1
    m_ref[ctx.b, h, ctx.n], u_ref[ctx.b, h, ctx.n] = m, p.sum(0)
    values = ctx.tile(x.v, h // group)
    # w = sum of p v: [V], in pieces
    ctx.put(w_ref, [(p[:, None] * v.astype(F32)).sum(0) for v in values], h)


def _forward(c, x: Arrays, o_ref, m_ref, u_ref):
    ctx = ChunkContext(c, x)
    h, group = ctx.head, x.s.shape[2] // x.v.shape[2]
    s, code, m_in = ctx.scores(h), ctx.code(), ctx.one(x.m_in, h)
    if code is not None:
        # the state that came in counts for its own segment
        enters = jnp.abs(code) == x.segment_in[ctx.b, ctx.n]
        m_in = jnp.where(enters, m_in, LOWEST)
    seen = ctx.seen(code, 0)  # [t,i]
    # m_t: the greatest score of a prefix, and of what came in
    m = jnp.maximum(jnp.where(seen, s[None], LOWEST).max(1), m_in)
    # P [t,i] = exp(s_i - m_t); what is left of the state that came in [t]
    p, share = weights(s[None], m[:, None], seen), exp_diff(m_in, m)
    u = p.sum(1) + share * ctx.one(x.u_in, h)  # [t]
    r = inverse(u, code)[:, None]  # 1/u [c,1]
    o = []
    for v, w in zip(ctx.tile(x.v, h // group), ctx.wide(x.w_in, h)):
        # o = (P v + share w) / u: [c,c] by [c,V] is [c,V]
        o.append((weighted(p, v) + share[:, None] * w[None]) * r)
    write(o_ref, o, ctx.b, ctx.start, c, h)
    for ref, value in ((m_ref, m), (u_ref, u)):
        ctx.put_line(ref.at[ctx.b, h, pl.ds(ctx.start, c)], value)


def _intra_chunk(c, x: Arrays, ds_ref, dv_ref, g_ref, h_ref):
    """What a chunk's tokens ask of each other, for the heads of a group in turn, and of
    those before."""
    ctx = ChunkContext(c, x)
    k, group = ctx.head, x.s.shape[2] // x.v.shape[2]
    code, values = ctx.code(), ctx.tile(x.v, ctx.head)

    def step(j, dv):
        h = k * group + j
        s, do = ctx.scores(h), ctx.tile(x.do, h)
        # beyond the end exp(s - inf) = 0
        m, u = ctx.line(x.m, h, jnp.inf), ctx.line(x.u, h, 0.0)
        r, m_in, own = inverse(u, code), ctx.one(x.m_in, h), m
        if code is not None:
            present = jnp.abs(code)
            m_in = jnp.where(present == x.segment_in[ctx.b, ctx.n], m_in, LOWEST)
            # only tokens of the chunk's first segment ask for what lies before it
            own = jnp.where(present == x.segment[ctx.b, ctx.n], m, jnp.inf)
        share, weight = exp_diff(m_in, m), exp_diff(ctx.one(x.ref, h), own) * r
        parts = [product(v, d) for v, d in zip(values, do)]  # v do^T [i,t], in pieces
        a = functools.reduce(operator.add, parts)
        # w.do of what came in: [c]
        before = functools.reduce(operator.add, [
            (d.astype(F32) * w[None]).sum(1)
            for d, w in zip(do, ctx.wide(x.w_in, h))])
        p = weights(s[:, None], m[None], ctx.seen(code, 1))  # P [i,t]
        ds, p, delta = score_gradients(
            p, a, r[None], share[None], before[None], ctx.one(x.u_in, h))
        ctx.put_line(ds_ref.at[ctx.b, pl.ds(ctx.start, c), h], ds.sum(1))
        # asked of those before: G = sum of weight do, h = sum of weight delta
        ctx.put(g_ref, [(weight[:, None] * d.astype(F32)).sum(0) for d in do], h)
        h_ref[ctx.b, h, ctx.n] = (weight * delta.sum(0)).sum(0)
        return tuple(a + weighted(p, d) for a, d in zip(dv, do))  # [i,t] [t,V] -> [i,V]

    dv = jax.lax.fori_loop(0, group, step, zeros(c, x.v.shape[3]))
    write(dv_ref, dv, ctx.b, ctx.start, c, k)


def _reached(c, x: Arrays, given, ds_ref, dv_ref):
    """ds and dv with what later chunks ask for."""
    ctx = ChunkContext(c, x)
    k, group = ctx.head, x.s.shape[2] // x.v.shape[2]
    code, values = ctx.code(), ctx.tile(x.v, ctx.head)

    def step(j, dv):
        h = k * group + j
        s, g = ctx.scores(h), ctx.wide(x.g, h)
        # later chunks ask for tokens of their own segment
        if code is not None:
            s = jnp.where(code == x.segment[ctx.b, ctx.n], s, LOWEST)
        e = exp_diff(s, ctx.one(x.ref, h))  # [c]
        along = [(v.astype(F32) * one[None]).sum(1) for v, one in zip(values, g)]
        along = functools.reduce(operator.add, along)
        at = pl.ds(ctx.start, c)
        own = load(given[0].at[ctx.b, at, h], ctx.inside, 0.0)
        # ds += e (v.G - h) and dv += e G
        ctx.put_line(ds_ref.at[ctx.b, at, h], own + e * (along - ctx.one(x.h, h)))
        return tuple(a + e[:, None] * one[None] for a, one in zip(dv, g))

    dv = jax.lax.fori_loop(0, group, step, ctx.tile(given[1], k))
    write(dv_ref, dv, ctx.b, ctx.start, c, k)


def _launch(static, kernel, heads: int, x: Arrays, outs, name: str, *more) -> Any:
    """pallas_call on whole arrays, a program for each chunk, head and row."""
    grid = -(-x.s.shape[1] // static.chunk), heads, x.s.shape[0]
    wide = max(n for _, n in pieces(x.v.shape[3]))
    return pl.pallas_call(
        functools.partial(kernel, static.chunk), grid=grid, out_shape=outs,
        interpret=static.interpret, name=name,
        compiler_params=triton.CompilerParams(
            num_warps=4 if wide <= 64 and x.do is None and x.v.dtype != F32 else 8,
            num_stages=1),
    )(x, *more)


def _join(a, b):
    """Neighbouring stretches (segment, m, u, w): another segment replaces the last."""
    same = a[0][:, None] == b[0][:, None]
    left = jnp.where(same, a[1], LOWEST)
    m = jnp.maximum(left, b[1])
    x, y = exp_diff(left, m), exp_diff(b[1], m)  # how much each fades
    return b[0], m, a[2] * x + b[2] * y, a[3] * x[..., None] + b[3] * y[..., None]


def _hand(a, b):
    """The same of (segment, ref, h, G) from the last chunk to the first, a behind b."""
    same = a[0][:, None] == b[0][:, None]
    x = exp_diff(jnp.where(same, b[1], LOWEST), a[1])
    return b[0], b[1], b[2] + a[2] * x, b[3] + a[3] * x[..., None]


def _over(op, parts):
    """All joins along the chunks of (segment [B,N], [B,H,N], [B,H,N], [B,H,N,V])."""
    first = [jnp.moveaxis(a, n, 0) for a, n in zip(parts, (1, 2, 2, 2))]  # chunks first
    step = jax.vmap(op)
    found = jax.lax.associative_scan(step, tuple(first))
    return tuple(jnp.moveaxis(a, 0, n) for a, n in zip(found, (1, 2, 2, 2)))


def _struct(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _runs(code, c: int, many: int):
    """|code| at the first and at the last token of each chunk [B,N]."""
    if code is None:
        return None, None
    short = many * c - code.shape[1]
    present = jnp.pad(jnp.abs(code), ((0, 0), (0, short)), mode="edge")
    return present[:, ::c], present[:, c - 1::c]


def forward(static, code, s, v, m, u, w):
    """((m, u, w), o, Saved)."""
    (b, t, h), c = s.shape, static.chunk
    many = -(-t // c)
    ends = _runs(code, c, many)[1]
    x = Arrays(s, v, code, ends=ends)
    one, wide = _struct(b, h, many), _struct(b, h, many, v.shape[3])
    parts = _launch(static, _totals, h, x, [one, one, wide], "scan_totals")
    segment = jnp.ones((b, many), jnp.int32) if ends is None else ends

    def ahead(first, a):
        return jnp.concatenate([first, a], 2)

    # the state that came in stands before the first chunk
    starts = _over(_join, (
        jnp.concatenate([jnp.ones((b, 1), jnp.int32), segment], 1),
        *(ahead(a[:, :, None], p) for a, p in zip((m, u, w), parts))))
    last = tuple(a[:, :, -1] for a in starts[1:])
    segment_in = None if ends is None else starts[0][:, :-1]
    m_in, u_in, w_in = (a[:, :, :-1] for a in starts[1:])
    x = x._replace(m_in=m_in, u_in=u_in, w_in=w_in, segment_in=segment_in)
    line = _struct(b, h, t)
    outs = [_struct(b, t, h, v.shape[3], dtype=static.dtype), line, line]
    o, ms, us = _launch(static, _forward, h, x, outs, "scan_forward")
    return last, o, Saved(ms, us, m_in, u_in, w_in, segment_in)


def backward(static, code, s, v, saved: Saved, do, du, dw):
    """ds, dv, and G [B,H,V] and h [B,H] of the first chunk."""
    (b, t, h), c = s.shape, static.chunk
    many, k = -(-t // c), v.shape[2]
    starts, ends = _runs(code, c, many)
    ref = saved.m[:, :, ::c]  # m of a chunk's first token
    x = Arrays(s, v, code, saved.m, saved.u, do, *saved[2:], ref=ref, segment=starts)
    outs = [_struct(b, t, h), _struct(*v.shape), _struct(b, h, many, v.shape[3]),
            _struct(b, h, many)]
    ds, dv, g, gap = _launch(static, _intra_chunk, k, x, outs, "scan_backward")
    segment = jnp.ones((b, many), jnp.int32) if starts is None else starts
    final = segment[:, -1:] if ends is None else ends[:, -1:]

    def behind(a, last):
        return jnp.concatenate([a, last[:, :, None]], 2)

    def turn(parts):
        return tuple(jnp.flip(a, n) for a, n in zip(parts, (1, 2, 2, 2)))

    # from the last chunk to the first: turned round, scanned, turned back
    segment, ref, gap, g = turn(_over(_hand, turn((
        jnp.concatenate([segment, final], 1), behind(ref, saved.m[:, :, -1]),
        behind(gap, -du), behind(g, dw)))))
    x = x._replace(ref=ref[:, :, 1:], h=gap[:, :, 1:], g=g[:, :, 1:], do=None,
                   segment=None if code is None else segment[:, 1:])
    outs = [_struct(b, t, h), jax.ShapeDtypeStruct(v.shape, v.dtype)]
    ds, dv = _launch(static, _reached, k, x, outs, "scan_backward_reached", (ds, dv))
    return ds, dv, (g[:, :, 0], gap[:, :, 0])
