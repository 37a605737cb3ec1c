"""Decays of channels in the kernels of the delta rule on GPU: what the first kernel
finds of a chunk for the others, over some key channels at a time.

That kernel makes the weights between tokens level by level and writes, beside them, q
and k as they meet the states, so that the passes over states are those without a decay
but for what is kept of a state, a number a channel. Their gradients are made where dq
and dk are, level by level again. Two limits, counted as in `triton.py` and for the same
call with 16 heads:

                        flops              bytes
    forward, needed      13 G  0.01 ms     0.20 G  0.04 ms
    forward, kernels     56 G  0.06 ms     0.49 G  0.10 ms
    backward, needed     32 G  0.03 ms     0.37 G  0.08 ms
    backward, kernels   110 G  0.11 ms     1.24 G  0.26 ms

Of the forward flops 46% are those of the six levels, of the backward ones 47%.

Source: see `pallas_kernels/delta/channels.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.delta.channels import Climb, pairs
from pallas_kernels.delta.chunk import CHUNK, F32
from pallas_kernels.delta.triton_chunk import ChunkContext, for_each_part
from pallas_kernels.machine.triton import load, power


class Met(NamedTuple):
    """q and k as they meet the state that a chunk begins with [B,T,.,D]; with decays of
    channels also, in `late`, k as it enters the one that it ends with and what is kept
    of that state [B,H,N,D], and the weights between keys, [B,H,N,CHUNK,CHUNK]."""

    q: Any
    k: Any
    late: tuple[Any, ...]
    kk: tuple[Any, ...]


def met(q, k, more) -> Met:
    """What the first kernel found beside inverses and weights, `more`; q and k as they
    were where it found nothing."""
    if not more:
        return Met(q, k, (), ())
    kk, q, k, late, whole = more
    return Met(q, k, (late, whole), (kk,))


def climb(ctx: ChunkContext, n, q, k, g_ref, first) -> Climb:
    """The levels of a chunk for the key channels of q and k [CHUNK,rows]."""
    return Climb(ctx.tokens(g_ref, n, first, k.shape[1]), q, k, _sibling)


def weights(ctx: ChunkContext, n, rows: int, q_ref, k_ref, g_ref, *refs):
    """The products of the chunk's queries, and of its keys, with its keys under the
    decays between them [CHUNK,CHUNK]. refs: where q and k as they meet the states are
    written, [B,T,H,D], and what is kept of a state [B,H,N,D]."""
    *met_refs, whole_ref = refs

    def step(i, found):
        first = i * rows
        q, k = (ctx.tokens(ref, n, first, rows) for ref in (q_ref, k_ref))
        levels = climb(ctx, n, q, k, g_ref, first)
        found = tuple(a + b for a, b in zip(found, pairs(levels, q, k)))
        for ref, a in zip(met_refs, levels.met()):
            ctx.write(ref, a, n, first)
        # every row is the same; a sum, since a row of a tile is no tile
        number = jax.lax.broadcasted_iota(jnp.int32, levels.whole.shape, 0)
        whole = jnp.where(number == 0, levels.whole, 0.0).sum(0)  # [rows]
        inside = None
        if k_ref.shape[3] % rows:
            lane = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
            inside = first + lane < k_ref.shape[3]
        at = whole_ref.at[ctx.b, ctx.h, n, pl.ds(ctx.b * 0 + first, rows)]
        triton.store(at, whole, mask=inside)
        return found

    square = jnp.zeros((CHUNK, CHUNK), F32)
    return for_each_part(k_ref.shape[3], rows, step, (square, square))


def split(static, refs):
    """With decays of channels, keys as they enter the next state and what is kept of
    it; and the other references."""
    many = 2 if static.channels else 0
    return refs[:many], refs[many:]


def leaving(ctx: ChunkContext, n, k, late):
    """Keys as they enter the state that chunk n ends with [CHUNK,D]."""
    return ctx.tokens(late[0], n) if late else k


def kept(ctx: ChunkContext, side, n, late):
    """What is kept of the state over a chunk, a number or a column [D,1]."""
    keep = ctx.keep(side, n)
    if not late:
        return keep
    size, inside = power(late[1].shape[3]), None
    if size != late[1].shape[3]:
        inside = jax.lax.broadcasted_iota(jnp.int32, (size,), 0) < late[1].shape[3]
    at = late[1].at[ctx.b, ctx.h, n, pl.ds(ctx.b * 0, size)]
    return keep * load(at, inside, 0)[:, None]


def _sibling(x, s: int):
    """x [CHUNK,X] of the token whose number differs in bit s."""
    halves = x.reshape(CHUNK // (2 * s), 2, s * x.shape[1])
    second = jax.lax.broadcasted_iota(jnp.int32, halves.shape, 1) == 1
    a, b = (jnp.where(second == late, halves, 0.0).sum(1)[:, None]
            for late in (False, True))
    return jnp.where(second, a, b).reshape(x.shape)
