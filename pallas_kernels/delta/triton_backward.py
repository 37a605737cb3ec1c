"""The gradients inside the chunks of the delta rule on GPU, all chunks at once.

Two kernels, so that few arrays are in registers at a time. The first has a program for
a chunk and passes over the columns of the state: it makes u again, dv, the gradients of
the tokens' numbers, and those of the pairs of tokens. The second has a program for some
key channels of a chunk, whose dq and dk it makes from these and from the states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.delta import channels as by_channel, triton_channels as channels
from pallas_kernels.delta.chunk import CHUNK, ROWS, Side, decays, strict
from pallas_kernels.delta.triton_chunk import ChunkContext, for_each_part, part, read
from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.machine.triton import load
from pallas_kernels.tiles import DeltaTriton


def values(static, heads: int, tile: DeltaTriton, side, q_ref, k_ref, v_ref, do_ref,
           y_ref, x_ref, states_ref, grads_ref, *refs):
    """Of one chunk dv, the gradients of its numbers but for what queries ask of the
    state, and of the products q k^T and k k^T, the latter once for each of the two
    keys; left: u as it enters the next state. With decays of channels, q and k are
    those that meet the state, and the gradients of pairs those of their weights."""
    (late_ref, kk_ref), refs = (
        (refs[:2], refs[2:]) if static.channels else ((k_ref, None), refs))
    dside_ref, dv_ref, left_ref, dp_ref, dkk_ref = refs
    n, h, b = (pl.program_id(a) for a in range(3))
    ctx = ChunkContext(static, b, h, heads)
    rows, columns = tile.block_d, tile.block_v
    beta, enter, leave = ctx.columns(side, n, "beta", "enter", "leave")
    low = k_ref.dtype

    def step(c, carry):
        dbeta, denter, dleave, kept, dp, da = carry
        first = c * columns
        ks, kd, kept = _by_state(ctx, n, tile, first, (k_ref, late_ref), states_ref,
                                 grads_ref, kept)
        v, do, y = (ctx.tokens(ref, n, first, columns)
                    for ref in (v_ref, do_ref, y_ref))
        # r = v - enter k S, u = X (beta r): [CHUNK,columns]
        r = v.astype(F32) - enter * ks
        u = dot(load(x_ref.at[b, h, n], None, 0), (beta * r).astype(low), NN)
        dr = beta * y.astype(F32)  # y is the gradient of beta r
        ctx.write(dv_ref, dr, n, first)  # dv = dr
        ctx.write(left_ref, leave * u, n, first)
        dbeta = dbeta + (y.astype(F32) * r).sum(1)  # beta in beta r
        denter = denter - (dr * ks).sum(1)  # enter in -enter k S
        dleave = dleave + (u * kd).sum(1)  # leave in k^T (leave u)
        u = u.astype(low)
        # dP += do u^T and dA -= y u^T: [CHUNK,CHUNK]
        return (dbeta, denter, dleave, kept, dp + dot(do, u, NT),
                da - dot(y, u, NT))

    square, zeros = jnp.zeros((CHUNK, CHUNK), F32), jnp.zeros((CHUNK,), F32)
    dbeta, denter, dleave, kept, dp, da = for_each_part(
        v_ref.shape[3], columns, step,
        (zeros, zeros, zeros, jnp.zeros((rows,), F32), square, square))
    if static.channels:
        kk = load(kk_ref.at[b, h, n], None, 0).astype(F32)
    else:
        qk, kk = ctx.pairs(n, rows, k_ref, q_ref, k_ref)  # q k^T, k k^T
    own, row = ctx.sides(side, n)
    decay = decays(own, row, static.gated)  # [CHUNK,CHUNK], 0 for j > i
    kk, da = strict(decay * kk), strict(da)
    dp = static.scale * decay * dp  # d(q k^T)
    triton.store(dp_ref.at[b, h, n], dp.astype(low))
    dkk = own.beta * decay * da  # d(k k^T)
    if static.channels:  # of the numbers, the rest says only what belongs together
        triton.store(dkk_ref.at[b, h, n], dkk.astype(low))
        found = Side(dbeta + (kk * da).sum(1), *[zeros] * 6)
    else:
        # k stands on both sides of k k^T
        triton.store(dkk_ref.at[b, h, n], (dkk + dkk.T).astype(low))
        # weights times their gradients: what the decay between two tokens gets
        pair = strict(dp * qk + own.beta * kk * da)
        lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK,), 0)
        # a log decay counts at the later token of a pair, and against the earlier one's
        found = Side(dbeta + (kk * da).sum(1), zeros, pair.sum(1) - pair.sum(0), zeros,
                     denter, dleave, jnp.where(lane == 0, kept.sum(0), 0.0))
    for at in range(ROWS):
        value = found[at] if at < len(found) else zeros
        triton.store(dside_ref.at[b, h, n, b * 0 + at], value)


def _by_state(ctx, n, tile: DeltaTriton, first, key_refs, states_ref, grads_ref, kept):
    """Keys by some columns of the state that the chunk begins with and of the gradient
    of the one it ends with [CHUNK,columns], and the product of these two, added to
    `kept` [rows]; over some key channels at a time. key_refs: of keys as they meet the
    one and as they enter the other."""
    (k_ref, late_ref), rows, columns = key_refs, tile.block_d, tile.block_v

    def step(i, carry):
        ks, kd, kept = carry
        k = ctx.tokens(k_ref, n, i * rows, rows)  # [CHUNK,rows]
        held, ds = (read(part(ref, (ctx.b, ctx.h, n), i * rows, rows, first, columns))
                    for ref in (states_ref, grads_ref))
        # d(keep): the sum of S dS'
        kept = kept + (held.astype(F32) * ds.astype(F32)).sum(1)
        late = k if late_ref is k_ref else ctx.tokens(late_ref, n, i * rows, rows)
        return ks + dot(k, held, NN), kd + dot(late, ds, NN), kept  # k S, k dS'

    zeros = jnp.zeros((CHUNK, columns), F32)
    return for_each_part(k_ref.shape[3], rows, step, (zeros, zeros, kept))


def keys(static, heads: int, tile: DeltaTriton, side, q_ref, *refs):
    """dq and dk of one chunk and head for some key channels, and what they add to the
    gradient of `enter` or, with decays of channels, dg."""
    place, h, b = (pl.program_id(a) for a in range(3))
    ctx, n, at = _place(static, heads, q_ref, tile, place, h, b)
    dq, dk = _of_a_head(ctx, n, at, tile, side, q_ref, *refs)
    ctx.write(refs[-3], dq, n, at * tile.block_d)
    ctx.write(refs[-2], dk, n, at * tile.block_d)


def shared_keys(static, heads: int, tile: DeltaTriton, side, q_ref, *refs):
    """The same of all heads that share a query and key head, added up in their order:
    dq [B,T,K,D] and dk are written once, in the type of k."""
    place, kv, b = (pl.program_id(a) for a in range(3))
    serves = heads // q_ref.shape[2]

    def head(g, sums):
        ctx, n, at = _place(static, heads, q_ref, tile, place, kv * serves + g, b)
        found = _of_a_head(ctx, n, at, tile, side, q_ref, *refs)
        return tuple(a + b for a, b in zip(sums, found))

    zeros = jnp.zeros((CHUNK, tile.block_d), F32)
    dq, dk = jax.lax.fori_loop(0, serves, head, (zeros, zeros))
    ctx, n, at = _place(static, heads, q_ref, tile, place, kv * serves, b)
    ctx.write(refs[-3], dq, n, at * tile.block_d)
    ctx.write(refs[-2], dk, n, at * tile.block_d)


def _place(static, heads: int, q_ref, tile: DeltaTriton, place, h, b):
    """A head's chunk, its number, and the part of the key channels."""
    # a chunk's programs are neighbours: they read the same of v's channels
    parts = -(-q_ref.shape[3] // tile.block_d)
    n, at = jax.lax.div(place, parts), jax.lax.rem(place, parts)
    return ChunkContext(static, b, h, heads), n, at


def _of_a_head(ctx: ChunkContext, n, at, tile: DeltaTriton, side, q_ref, k_ref, do_ref,
               y_ref, left_ref, states_ref, grads_ref, dp_ref, dkk_ref, *refs):
    """dq and dk [CHUNK,rows] of a head; the gradient of `enter`, or dg, is written."""
    b, h, static = ctx.b, ctx.h, ctx.static
    rows, columns = tile.block_d, tile.block_v
    top = at * rows
    beta, enter = ctx.columns(side, n, "beta", "enter")

    def step(c, carry):
        from_state, *to_k = carry
        first = c * columns
        do, y, left = (ctx.tokens(ref, n, first, columns)
                       for ref in (do_ref, y_ref, left_ref))
        held, ds = (read(part(ref, (b, h, n), top, rows, first, columns))
                    for ref in (states_ref, grads_ref))
        dr = (enter * beta * y.astype(F32)).astype(y.dtype)  # -d(k S)
        if static.channels:
            late, early, kept = to_k
            # of keys as they enter the next state and as they meet this one, and S dS'
            to_k = (late + dot(left, ds, NT), early - dot(dr, held, NT),
                    kept + (held.astype(F32) * ds.astype(F32)).sum(1))
        else:
            # dk += (leave u) dS'^T - (enter beta y) S^T: [CHUNK,rows]
            to_k = to_k[0] + dot(left, ds, NT) - dot(dr, held, NT),
        return from_state + dot(do, held, NT), *to_k  # do S^T

    zeros = jnp.zeros((CHUNK, rows), F32)
    start: tuple[jax.Array, ...] = (zeros, zeros)
    if static.channels:
        start = (*start, zeros, jnp.zeros((rows,), F32))
    from_state, *to_k = for_each_part(do_ref.shape[3], columns, step, start)
    q, k = (ctx.tokens(ref, n, top, rows) for ref in (q_ref, k_ref))
    from_state = static.scale * from_state
    if not static.channels:  # enter in scale enter q S
        triton.store(refs[-1].at[b, h, at, n], (q.astype(F32) * from_state).sum(1))
    dp, dkk = (load(ref.at[b, h, n], None, 0) for ref in (dp_ref, dkk_ref))
    if static.channels:
        g_ref, *_, dg_ref = refs
        late, early, kept = to_k
        climb = channels.climb(ctx, n, q, k, g_ref, top)
        dq, dk, dg = by_channel.gradients(
            climb, climb, (dp, dkk), (enter * from_state, early, late),
            ctx.keep(side, n) * kept[None])
        ctx.write(dg_ref, dg, n, top)
        return dq, dk
    # dq = scale enter do S^T + d(q k^T) k; dk has d(q k^T)^T q and d(k k^T) k, too
    return (enter * from_state + dot(dp, k, NN),
            to_k[0] + dot(dp, q, TN) + dot(dkk, k, NN))
