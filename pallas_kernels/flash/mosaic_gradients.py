"""Gradients of flash attention by Mosaic GPU: what the kernels for Hopper and Blackwell
have in common. One for dk and dv passes over query tiles of all query heads of a key
head, one for dq over key tiles; in each a warpgroup loads and two compute.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.mosaic_order import Order, of_a_head, order
from pallas_kernels.flash.mosaic_scratch import KeyScratch, QueryScratch, split
from pallas_kernels.flash.mosaic_tile import (
    Arrays, Call, Line, TileContext, arrays, fetch_keys, line, run, tokens
)
from pallas_kernels.machine.hopper import F32, ROWS, TILE, drain, share, shared
from pallas_kernels.schedule import Side, Static
from pallas_kernels.tile import LOW


def calls(static: Static, groups: int, layout=TILE) -> tuple[Call, Call]:
    """The calls of the kernel for dk and dv and of that for dq."""
    tile = static.tiles[1]
    by_key = Call(static.form, static.backward, groups, 2, (tile.num_stages,),
                  bool(static.interpret), layout, static.variant)
    # the kernel for dq has a tile and rings of its own
    tiling = by_key.tiling._replace(rows=2 * ROWS, columns=tile.dq_block_kv)
    rings = tile.dq_k_stages, tile.dq_v_stages
    return by_key, by_key._replace(stages=rings, tiling=tiling)


def _given(call: Call, side: Side, q, k, v, do, base, delta) -> Arrays:
    rows = call.tiling.rows
    x = arrays(call, side, q, k, v, None, do)
    # queries beyond the end get weights 2^(s + LOW) = 0
    return x._replace(lse=tokens(base, rows, 2, -LOW),
                      delta=tokens(delta.astype(F32), rows, 2))


def key_gradients(call: Call, static: Static, own: int, more, sums, side: Side, q, k, v,
                  *rest):
    """dk and dv. own: in how many parts the keys of a tile lie in shared memory; more:
    scratch that only `sums` knows, by which a warpgroup computes."""
    x = _given(call, side, q, k, v, *rest)
    table, ask = static.block_masks(call.tiling, side)
    seen = line(table.T, None if ask is None else ask.swapaxes(1, 2))
    n, rows, groups = call.stages[0], call.tiling.rows, call.warpgroups
    d, width, kind = x.q.shape[3], x.v.shape[3], x.q.dtype
    keys, barrier = call.tiling.columns // own, plgpu.Barrier
    scratch = KeyScratch(
        shared((own, keys, d), kind), shared((own, keys, width), kind),  # k, v
        shared((n, rows, d), kind), shared((n, rows, width), kind),  # rings of q, do
        plgpu.SMEM((n, rows), F32), plgpu.SMEM((n, rows), F32),  # rings of lse, delta
        # a barrier for both tiles of each part, or for each tile of the one
        barrier(num_barriers=2, num_arrivals=own),
        barrier(num_barriers=n, num_arrivals=2),  # q and lse are there
        barrier(num_barriers=n, num_arrivals=2),  # do and delta are there
        barrier(num_barriers=n, num_arrivals=groups),  # all have used them
    )

    def like(a):
        return jax.ShapeDtypeStruct(a.shape, a.dtype)

    # what passes by a key head are q and do of all its query heads
    passed = of_a_head(x.q) + of_a_head(x.do)
    order_ = order(call.tiling.grid[1], k.shape[0], k.shape[2], 1, passed * call.groups,
                   call.variant)
    dk, dv = run(
        call, functools.partial(_by_key, sums, order_), order_.grid, x, seen,
        [like(x.k), like(x.v)], (*scratch, *more), "flash_backward_keys")
    return (dk[:, :k.shape[1], :, :k.shape[3]], dv[:, :k.shape[1], :, :v.shape[3]])


def _by_key(sums, order_: Order, call: Call, x: Arrays, seen: Line, outs, scratch):
    """dk and dv of a tile of keys."""
    group = jax.lax.axis_index("group")
    tile, b, kv = order_.here()
    at, steps = seen.of(b, tile)

    def head(g):
        return kv * call.groups + g

    place = group, tile, b, kv
    own, more = split(KeyScratch, scratch)
    share(group, call.warpgroups,
          lambda: _fetch_queries(call, x, at, steps[1], own, b, head),
          lambda: sums(call, x, at, steps, outs, own, more, place, head))


def _fetch_queries(call: Call, x: Arrays, at, count, own: KeyScratch, b, head):
    """Loads tiles of q and do of every query head, as room comes free."""
    rows, stages = call.tiling.rows, jnp.int32(call.stages[0])
    total = count * call.groups

    def load(n, carry):
        slot = jax.lax.rem(n, stages)
        h = head(jax.lax.div(n, count))  # all tiles of a head, then the next head's
        some = pl.ds(at(jax.lax.rem(n, count)) * rows, rows)

        # until the tiles that lie there have been used
        @pl.when(n >= stages)
        def _():
            plgpu.barrier_wait(own.free.at[slot])

        for ref, ring, place, there in (
            (x.q, own.q_ring, (b, some, h), own.q_there),
            (x.lse, own.lse_ring, (b, h, some), own.q_there),
            (x.do, own.do_ring, (b, some, h), own.do_there),
            (x.delta, own.delta_ring, (b, h, some), own.do_there),
        ):
            plgpu.copy_gmem_to_smem(ref.at[place], ring.at[slot], there.at[slot])
        return carry

    jax.lax.fori_loop(0, total, load, None)
    drain(own.free, stages, total)


def query_gradients(call: Call, static: Static, own: int, more, sums, side: Side, q,
                    *rest):
    """dq. own: in how many parts the queries of a tile lie in shared memory; more:
    scratch that only `sums` knows, by which a warpgroup computes."""
    x = _given(call, side, q, *rest)
    c, groups = call.tiling.columns, call.warpgroups
    k_stages, v_stages = call.stages
    d, width, kind = x.q.shape[3], x.v.shape[3], x.q.dtype
    rows, barrier = call.tiling.rows // own, plgpu.Barrier
    scratch = QueryScratch(
        shared((own, rows, d), kind), shared((own, rows, width), kind),  # q, do
        shared((k_stages, c, d), kind), shared((v_stages, c, width), kind),  # rings
        barrier(num_barriers=2, num_arrivals=own),
        barrier(num_barriers=k_stages), barrier(num_barriers=v_stages),
        barrier(num_barriers=k_stages, num_arrivals=groups),
        barrier(num_barriers=v_stages, num_arrivals=groups),
    )
    passed = of_a_head(x.k) + of_a_head(x.v)
    order_ = order(call.tiling.grid[0], q.shape[0], q.shape[2], call.groups, passed,
                   call.variant)
    dq, = run(
        call, functools.partial(_by_query, sums, order_), order_.grid, x,
        line(*static.block_masks(call.tiling, side)),
        [jax.ShapeDtypeStruct(x.q.shape, x.q.dtype)], (*scratch, *more),
        "flash_backward_queries",
    )
    return dq[:, :q.shape[1], :, :q.shape[3]]


def _by_query(sums, order_: Order, call: Call, x: Arrays, seen: Line, outs, scratch):
    """dq of a tile of queries."""
    group = jax.lax.axis_index("group")
    tile, b, h = order_.here()
    # later query tiles have the longer lines under a causal mask: they start first
    tile = call.tiling.grid[0] - 1 - tile
    ctx = TileContext(call, x, b, h)
    at, steps = seen.of(b, tile)

    own, more = split(QueryScratch, scratch)
    share(group, call.warpgroups,
          lambda: fetch_keys(ctx, at, steps[1], own),
          lambda: sums(ctx, at, steps, outs[0], own, more, group, tile))
