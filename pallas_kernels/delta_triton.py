"""The delta rule on GPU by Triton, on sm80 and newer.

Forward, a first kernel inverts the system of every chunk and makes the weights of its
outputs, all chunks at once; a second passes over the chunks, a program for a head and
some columns of the state, which do not meet. Backward, one kernel passes over the
chunks in reverse with the gradient of those columns and leaves the gradient of what the
system's right side is; the rest of the gradients are again all chunks at once.

Source: see `pallas_kernels/delta.py`; the division into kernels follows the published
ones of flash-linear-attention.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.delta_chunk import (
    BLOCK, CHUNK, ROWS, Side, fades, halved, merged, strict
)
from pallas_kernels.steps_triton import F32, dot, lanes, load, power
from pallas_kernels.tables import Tile
from pallas_kernels.tile import both


class Here(NamedTuple):
    """Of which head and row of the batch a program reads chunk n."""

    static: Any
    b: Any
    h: Any
    heads: int

    def at(self, ref, n, first, size: int):
        """Where the chunk's tokens are, lanes first to first + size, of an array
        [B,T,.,X]; and what of it is inside."""
        serves, width = self.heads // ref.shape[2], ref.shape[3]
        inside = None
        token = n * CHUNK
        if ref.shape[1] % CHUNK:
            number = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, size), 0)
            inside = token + number < ref.shape[1]
        if width % size:
            lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, size), 1)
            inside = both(inside, first + lane < width)
        # a traced 0, since a slice that is known to pass the end is an error
        cut = pl.ds(self.b * 0 + first, size)
        return ref.at[self.b, pl.ds(token, CHUNK), self.h // serves, cut], inside

    def tokens(self, ref, n, first=0, size: int | None = None):
        """The chunk's tokens [CHUNK,size], 0 beyond the end; all lanes without size."""
        return _read(self.at(ref, n, first, size or power(ref.shape[3])))

    def write(self, ref, value, n, first=0, size: int | None = None) -> None:
        """The reverse of `tokens`."""
        at, inside = self.at(ref, n, first, size or power(ref.shape[3]))
        triton.store(at, value.astype(ref.dtype), mask=inside)

    def column(self, side, n, field: str):
        """One of the numbers of the chunk's tokens [CHUNK]."""
        # a traced number: the interpreter takes no other next to slices
        at = self.b * 0 + Side._fields.index(field)
        return load(side.at[self.b, self.h, n, at], None, 0)

    def keep(self, side, n):
        """The factor between two states."""
        return side[self.b, self.h, n, Side._fields.index("keep"), 0]


def _read(where):
    """What is at a place and inside, 0 elsewhere."""
    at, inside = where
    return load(at, inside, 0)


def _part(ref, lead, first, size: int):
    """Where columns first to first + size of a state [..,D,V] are, and the inside."""
    d, width = ref.shape[-2:]
    rows = power(d)
    inside = lanes(d, size, None)
    inside = None if inside is None else inside.T
    if width % size:
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, size), 1)
        inside = both(inside, first + lane < width)
    return ref.at[*lead, pl.ds(first * 0, rows), pl.ds(first, size)], inside


def _put(ref, lead, first, value) -> None:
    at, inside = _part(ref, lead, first, value.shape[1])
    triton.store(at, value.astype(ref.dtype), mask=inside)


def inverse(a, block: int):
    """(I + a)^-1 of a strictly lower triangular a [CHUNK,CHUNK], by substitution in
    blocks of `block` rows, which are merged by products."""
    many = CHUNK // block
    shape = many, block, many, block
    iota = lambda shape, n: jax.lax.broadcasted_iota(jnp.int32, shape, n)
    own = iota(shape, 0) == iota(shape, 2)
    blocks = jnp.where(own, a.reshape(shape), 0.0).sum(2)
    i, j = (iota(blocks.shape, n) for n in (1, 2))

    def out_of_those_below(n, x):
        column = jnp.where(j == n, blocks, 0.0).sum(2)
        row = jnp.where(i == n, x, 0.0).sum(1)
        return x - column[:, :, None] * row[:, None, :]

    x = jnp.where(i == j, 1.0, 0.0)
    x = jax.lax.fori_loop(0, block - 1, out_of_those_below, x)
    x = jnp.where(own, jnp.broadcast_to(x[:, :, None], shape), 0.0)
    product = halved(lambda x, y: dot(x, y, 1, 0))
    return merged([x.reshape(CHUNK, CHUNK)], [a], product, block)[0]


def _sides(here: Here, side, n):
    """Columns and rows of a chunk's numbers."""
    found = Side(*(here.column(side, n, field) for field in Side._fields))
    return Side(*(a[:, None] for a in found)), Side(*(a[None] for a in found))


def _inside(static, heads: int, side, q_ref, k_ref, x_ref, p_ref):
    """The inverse of one chunk's system, and the weights of its outputs."""
    n, h, b = (pl.program_id(a) for a in range(3))
    here = Here(static, b, h, heads)
    own, row = _sides(here, side, n)
    fade = fades(own, row, static.gated)
    q, k = here.tokens(q_ref, n), here.tokens(k_ref, n)
    p = static.scale * fade * dot(q, k, 1, 1)
    triton.store(p_ref.at[b, h, n], p.astype(p_ref.dtype))
    a = strict(own.beta * fade * dot(k, k, 1, 1))
    # to be exact, substitution takes fewer instructions than products of float32
    x = inverse(a, CHUNK if k.dtype == F32 else BLOCK)
    triton.store(x_ref.at[b, h, n], x.astype(x_ref.dtype))


def _forward(static, heads: int, columns: int, side, q_ref, k_ref, v_ref, x_ref, p_ref,
             start_ref, o_ref, final_ref, *states_ref):
    """Some columns of the state from the first chunk to the last."""
    c, h, b = (pl.program_id(a) for a in range(3))
    here, first = Here(static, b, h, heads), c * columns

    def step(n, state):
        q, k = here.tokens(q_ref, n), here.tokens(k_ref, n)
        beta, enter, leave = (
            here.column(side, n, f)[:, None] for f in ("beta", "enter", "leave"))
        held = state.astype(k.dtype)
        if states_ref:
            _put(states_ref[0], (b, h, n), first, held)
        v = here.tokens(v_ref, n, first, columns).astype(F32)
        r = beta * (v - enter * dot(k, held, 1, 0))
        u = dot(load(x_ref.at[b, h, n], None, 0), r.astype(k.dtype), 1, 0)
        o = (static.scale * enter) * dot(q, held, 1, 0)
        o = o + dot(load(p_ref.at[b, h, n], None, 0), u.astype(k.dtype), 1, 0)
        here.write(o_ref, o, n, first, columns)
        return (here.keep(side, n) * state
                + dot(k, (leave * u).astype(k.dtype), 0, 0))

    start = _read(_part(start_ref, (b, h), first, columns))
    state = jax.lax.fori_loop(0, side.shape[2], step, start)
    _put(final_ref, (b, h), first, state)


def _reverse(static, heads: int, columns: int, side, q_ref, k_ref, do_ref, x_ref, p_ref,
             end_ref, y_ref, grads_ref, start_ref):
    """The gradient of some columns of the state from the last chunk to the first, and
    y, that of the right side of the chunks' systems."""
    c, h, b = (pl.program_id(a) for a in range(3))
    here, first, many = Here(static, b, h, heads), c * columns, side.shape[2]

    def step(i, grad):
        n = many - 1 - i
        q, k = here.tokens(q_ref, n), here.tokens(k_ref, n)
        do = here.tokens(do_ref, n, first, columns)
        beta, enter, leave = (
            here.column(side, n, f)[:, None] for f in ("beta", "enter", "leave"))
        held = grad.astype(k.dtype)
        _put(grads_ref, (b, h, n), first, held)
        du = dot(load(p_ref.at[b, h, n], None, 0), do, 0, 0)
        du = du + leave * dot(k, held, 1, 0)
        y = dot(load(x_ref.at[b, h, n], None, 0), du.astype(k.dtype), 0, 0)
        here.write(y_ref, y, n, first, columns)
        grad = here.keep(side, n) * grad
        grad = grad - dot(k, (enter * beta * y).astype(k.dtype), 0, 0)
        entered = (static.scale * enter) * do.astype(F32)
        return grad + dot(q, entered.astype(k.dtype), 0, 0)

    end = _read(_part(end_ref, (b, h), first, columns))
    grad = jax.lax.fori_loop(0, many, step, end)
    _put(start_ref, (b, h), first, grad)


def _gradients(static, heads: int, columns: int, side, q_ref, k_ref, v_ref, do_ref,
               y_ref, x_ref, states_ref, grads_ref, dside_ref, dq_ref, dk_ref, dv_ref):
    """All other gradients of one chunk, over the columns of the state."""
    n, h, b = (pl.program_id(a) for a in range(3))
    here, scale = Here(static, b, h, heads), static.scale
    own, row = _sides(here, side, n)
    k = here.tokens(k_ref, n)
    low, zeros = k.dtype, jnp.zeros((CHUNK,), F32)

    def step(c, carry):
        dbeta, denter, dleave, kept, dp, da, from_state, dk = carry
        first = c * columns
        part = lambda ref: here.tokens(ref, n, first, columns)
        v, do, y = part(v_ref), part(do_ref), part(y_ref)
        held, ds = (_read(_part(ref, (b, h, n), first, columns))
                    for ref in (states_ref, grads_ref))
        ks = dot(k, held, 1, 0)
        r = v.astype(F32) - own.enter * ks
        u = dot(load(x_ref.at[b, h, n], None, 0), (own.beta * r).astype(low), 1, 0)
        dr = own.beta * y.astype(F32)
        here.write(dv_ref, dr, n, first, columns)
        dbeta = dbeta + (y.astype(F32) * r).sum(1)
        denter = denter - (dr * ks).sum(1)
        dleave = dleave + (u * dot(k, ds, 1, 0)).sum(1)
        kept = kept + (held.astype(F32) * ds.astype(F32)).sum(1)
        dk = dk + dot((own.leave * u).astype(low), ds, 1, 1)
        dk = dk - dot((own.enter * dr).astype(low), held, 1, 1)
        u = u.astype(low)
        return (dbeta, denter, dleave, kept, dp + dot(do, u, 1, 1),
                da - dot(y, u, 1, 1), from_state + dot(do, held, 1, 1), dk)

    square, wide = jnp.zeros((CHUNK, CHUNK), F32), jnp.zeros(k.shape, F32)
    rows = jnp.zeros((k.shape[1],), F32)
    dbeta, denter, dleave, kept, dp, da, from_state, dk = jax.lax.fori_loop(
        0, -(-v_ref.shape[3] // columns), step,
        (zeros, zeros, zeros, rows, square, square, wide, wide))
    q, fade = here.tokens(q_ref, n), fades(own, row, static.gated)
    kk, da = strict(fade * dot(k, k, 1, 1)), strict(da)
    dp = scale * fade * dp
    dkk = (own.beta * fade * da).astype(low)
    pair = strict(dp * dot(q, k, 1, 1) + own.beta * kk * da)
    denter = denter + scale * (q.astype(F32) * from_state).sum(1)
    dbeta = dbeta + (kk * da).sum(1)
    dp = dp.astype(low)
    dq = (scale * own.enter) * from_state + dot(dp, k, 1, 0)
    dk = dk + dot(dp, q, 0, 0) + dot(dkk, k, 1, 0) + dot(dkk, k, 0, 0)
    here.write(dq_ref, dq, n)
    here.write(dk_ref, dk, n)
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK,), 0)
    found = Side(dbeta, zeros, pair.sum(1) - pair.sum(0), zeros, denter, dleave,
                 jnp.where(lane == 0, kept.sum(0), 0.0))
    for at in range(ROWS):
        value = found[at] if at < len(found) else zeros
        triton.store(dside_ref.at[b, h, n, b * 0 + at], value)


def _launch(static, tile: Tile, kernel, grid, args, outs, name: str) -> Any:
    warps, stages = tile.how
    return pl.pallas_call(
        kernel, grid=grid, out_shape=outs, name=name, interpret=static.interpret,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    )(*args)


def forward(static, side, q, k, v, state, keep: bool):
    """state [B,H,D,V], o [B,T,H,V], and to `keep` for the backward pass: the states
    that chunks begin with [B,H,N,D,V], the inverses and the weights of the outputs
    [B,H,N,CHUNK,CHUNK]."""
    (b, h, many), (d, width) = side.shape[:3], state.shape[2:]
    out, (inside, tile, *_) = jax.ShapeDtypeStruct, static.tiles
    square = out((b, h, many, CHUNK, CHUNK), q.dtype)
    x, p = _launch(static, inside, functools.partial(_inside, static, h),
                   (many, h, b), (side, q, k), [square, square], "delta_inside")
    outs = [out((b, static.t, h, width), v.dtype), out(state.shape, F32)]
    if keep:
        outs.append(out((b, h, many, d, width), q.dtype))
    grid = -(-width // tile.columns), h, b
    o, final, *states = _launch(
        static, tile, functools.partial(_forward, static, h, tile.columns), grid,
        (side, q, k, v, x, p, state), outs, "delta_forward")
    return (final, o, *states, x, p) if keep else (final, o)


def backward(static, side, q, k, v, kept, d_final, do):
    """The gradients of side, of q, k and v a head [B,T,H,.], and of the state."""
    (b, h, many), width = side.shape[:3], d_final.shape[3]
    out, (*_, tile, inside) = jax.ShapeDtypeStruct, static.tiles
    states, x, p = kept
    wide = lambda a, kind: out((b, static.t, h, a.shape[3]), kind)
    outs = [wide(v, q.dtype), out(states.shape, q.dtype), out(d_final.shape, F32)]
    y, grads, d_state = _launch(
        static, tile, functools.partial(_reverse, static, h, tile.columns),
        (-(-width // tile.columns), h, b), (side, q, k, do, x, p, d_final), outs,
        "delta_backward_states")
    # what several heads share is added up in float32
    outs = [out(side.shape, F32),
            *(wide(a, a.dtype if a.shape[2] == h else F32) for a in (q, k, v))]
    found = _launch(
        static, inside, functools.partial(_gradients, static, h, inside.columns),
        (many, h, b), (side, q, k, v, do, y, x, states, grads), outs,
        "delta_backward_inside")
    return *found, d_state
