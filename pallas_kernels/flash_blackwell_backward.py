"""Flash attention for Blackwell by Mosaic GPU, backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blackwell import (
    COLUMNS, COPIED, ROW, ROWS, commit, load, multiply, store, tensor
)
from pallas_kernels.flash_mosaic_backward import (
    based, calls, key_gradients, query_gradients
)
from pallas_kernels.hopper import F32, Tile, matrix, spread, vector
from pallas_kernels.schedule import Side, Static
from pallas_kernels.steps_mosaic import Arrays, Call, Here, weights

PART = 64  # columns that are written at once: a line of shared memory


def backward(static: Static, side: Side, q, k, v, lse, delta, do):
    """dq, dk, dv, given lse, delta [B,H,T] and do [B,T,H,V]."""
    by_key, by_query = calls(static, q.shape[2] // k.shape[2], ROW)
    d, width = (-(-a.shape[3] // 64) * 64 for a in (q, v))
    given = side, q, k, v, do, based(lse), delta
    kind, rows, columns = q.dtype, by_key.tiling.rows, by_query.tiling.columns
    more = _scratch(by_key, rows, (kind, kind), (width, d))
    # as much of k and v as there is room for
    kept = [n for n, end in ((d, d), (width, d + width))
            if 3 * rows + d + width + end // 2 <= COLUMNS]
    more += tuple(tensor(by_key.interpret, *((n, kind) for n in kept)))
    dk, dv = key_gradients(by_key, static, 1, more, _key_sums, *given)
    more = _scratch(by_query, columns, (kind,), (d,))
    return query_gradients(by_query, static, 1, more, _query_sums, *given), dk, dv


def _scratch(call: Call, columns: int, lefts, widths: tuple[int, ...]):
    """Tensor memory and barriers of `Halves`, for tiles of so many columns."""
    pair = ((columns, F32), (columns, F32))
    parts = *pair, *((columns, kind) for kind in lefts), *((n, F32) for n in widths)
    barrier = lambda n: plgpu.Barrier(num_arrivals=n, orders_tensor_core=True)
    many = call.warpgroups
    return (*tensor(call.interpret, *parts), barrier(1), barrier(1),
            barrier(len(widths)), barrier(many), barrier(many))


class Halves(NamedTuple):
    """Tiles whose columns are halved between two warpgroups, the first of which begins
    all products.

    s, dp: tensor memory for the logits and for the gradients of the weights; lefts: for
    the left sides of the products that add to `sums`. Barriers: s and dp are there, the
    sums are; both have read s and dp, and have stored the left sides.
    """

    call: Call
    group: Any
    s: Any
    dp: Any
    lefts: tuple[Any, ...]
    sums: tuple[Any, ...]
    s_there: Any
    dp_there: Any
    added: Any
    read: Any
    stored: Any

    @classmethod
    def of(cls, call: Call, group, scratch, many: int) -> Halves:
        """From `_scratch` for that many sums."""
        s, dp, *rest = scratch
        return cls(call, group, s, dp, tuple(rest[:many]),
                   tuple(rest[many:2 * many]), *rest[2 * many:])

    @property
    def first(self):
        """The first column of this warpgroup's half."""
        return self.group * (self.s.shape[1] // self.call.warpgroups)

    @property
    def mine(self):
        """This warpgroup's columns."""
        return pl.ds(self.first, self.s.shape[1] // self.call.warpgroups)

    def begin(self, s, dp) -> None:
        """Begins the two products of a tile; both have read those before."""
        @pl.when(self.group == 0)
        def _():
            more = False, self.call.interpret
            multiply(self.s, *s, self.s_there, *more)
            multiply(self.dp, *dp, self.dp_there, *more)

    def tile(self):
        """This half of s and dp, which may be overwritten once both warpgroups are
        here."""
        plgpu.barrier_wait(self.s_there)
        s = load(self.s.at[:, self.mine], self.call.interpret)
        plgpu.barrier_wait(self.dp_there)
        dp = load(self.dp.at[:, self.mine], self.call.interpret)
        plgpu.barrier_arrive(self.read)

        @pl.when(self.group == 0)
        def _():
            plgpu.barrier_wait(self.read)

        return s, dp

    def settle(self) -> None:
        """Until what both warpgroups have stored is there for a product."""
        commit(self.call.interpret)
        plgpu.barrier_arrive(self.stored)

        @pl.when(self.group == 0)
        def _():
            plgpu.barrier_wait(self.stored)

    def add(self, lefts, rights, accumulate) -> None:
        """Begins the products of both halves of `lefts` with `rights`, which add to the
        sums; those before are done."""
        for ref, left in zip(self.lefts, lefts):
            left = left.astype(ref.dtype)
            store(ref.at[:, self.mine], left, self.call.interpret)
        self.settle()

        @pl.when(self.group == 0)
        def _():
            for acc, left, right in zip(self.sums, self.lefts, rights):
                multiply(acc, left, right, self.added, accumulate, self.call.interpret)

    def save(self, n: int, scale: float, smem, ref) -> None:
        """Writes the n-th sum, when all products are done."""
        for start in range(0, smem.shape[1], PART):
            part = pl.ds(start, PART)
            total = load(self.sums[n].at[:, part], self.call.interpret, COPIED)
            smem.at[:, part][...] = (total * scale).astype(smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, ref)
        plgpu.wait_smem_to_gmem(0)


def _key_sums(call: Call, x: Arrays, at, steps, outs, scratch, place, head) -> None:
    """A warpgroup's part of dk and dv of 128 keys: half of the queries of each tile."""
    (k_smem, v_smem, q_ring, do_ring, lse_ring, delta_ring, there, q_there, do_there,
     free) = scratch[:10]
    group, tile, b, kv = place
    halves, kept = Halves.of(call, group, scratch[10:21], 2), scratch[21:]
    (whole, count), size = steps, call.tiling.rows
    total, first = count * call.groups, tile * call.tiling.columns
    keys = b, pl.ds(first, ROWS), kv
    k, v = k_smem.at[0], v_smem.at[0]
    k_left, v_left = *kept, *(k, v)[len(kept):]
    slot = lambda n: jax.lax.rem(n, jnp.int32(call.stages[0]))

    def begin(n):
        plgpu.barrier_wait(q_there.at[slot(n)])
        plgpu.barrier_wait(do_there.at[slot(n)])
        q, do = q_ring.at[slot(n)], do_ring.at[slot(n)]
        halves.begin((k_left, Tile(q)), (v_left, Tile(do)))

    def end(n):
        plgpu.barrier_wait(halves.added)
        plgpu.commit_smem()  # lse and delta were read, and a copy may overwrite them
        plgpu.barrier_arrive(free.at[slot(n)])

    def one_head(g, carry):
        here = Here(call, x, b, head(g), turned=True)

        def step(i, carry, masked):
            n = g * count + i
            need = masked or call.form.score is not None
            row = at(i) * size + halves.first if need else None
            s, dp = halves.tile()

            @pl.when(n + 1 < total)
            def _():
                begin(n + 1)

            lse, delta = (
                vector(ring.at[slot(n), halves.mine], True, call.interpret, ROW)
                for ring in (lse_ring, delta_ring))
            s, unit, slope = here.logits(s, row, first, masked)
            p = weights(s, unit, lse, True)
            ds = p * (dp - spread(delta, dp.shape, True))
            ds = ds if slope is None else ds * slope

            @pl.when(n > 0)
            def _():
                end(n - 1)

            halves.add((p, ds), (do_ring.at[slot(n)], q_ring.at[slot(n)]), n > 0)
            return carry

        carry = jax.lax.fori_loop(0, whole, lambda n, c: step(n, c, False), carry)
        return jax.lax.fori_loop(whole, count, lambda n, c: step(n, c, True), carry)

    @pl.when(group == 0)
    def _():
        plgpu.copy_gmem_to_smem(x.k.at[keys], k, there.at[0])
        plgpu.copy_gmem_to_smem(x.v.at[keys], v, there.at[1])
        plgpu.barrier_wait(there.at[0])
        plgpu.barrier_wait(there.at[1])
        for ref, left in zip((k, v), kept):
            store(left, matrix(ref, call.interpret, ROW), call.interpret)

    halves.settle()
    begin(jnp.int32(0))
    jax.lax.fori_loop(0, call.groups, one_head, None)
    end(total - 1)

    @pl.when(group == 0)
    def _():
        halves.save(1, call.form.scale, k, outs[0].at[keys])

    @pl.when(group == 1)
    def _():
        halves.save(0, 1.0, v, outs[1].at[keys])


def _query_sums(here: Here, at, steps, dq_ref, scratch, group, tile) -> None:
    """A warpgroup's part of dq of 128 queries: half of the keys of each tile."""
    q_smem, do_smem, k_ring, v_ring, there, k_there, v_there, k_free, v_free = (
        scratch[:9])
    call, x = here.call, here.x
    halves = Halves.of(call, group, scratch[9:], 1)
    (whole, count), size = steps, call.tiling.columns
    first = tile * call.tiling.rows
    queries = here.b, pl.ds(first, ROWS), here.h
    vectors = here.b, here.h, pl.ds(first, ROWS)
    q, do = q_smem.at[0], do_smem.at[0]
    slot, v_slot = (lambda n, m=m: jax.lax.rem(n, jnp.int32(m)) for m in call.stages)

    def begin(n):
        plgpu.barrier_wait(k_there.at[slot(n)])
        plgpu.barrier_wait(v_there.at[v_slot(n)])
        halves.begin((q, Tile(k_ring.at[slot(n)])), (do, Tile(v_ring.at[v_slot(n)])))

    def end(n):
        plgpu.barrier_wait(halves.added)
        plgpu.barrier_arrive(k_free.at[slot(n)])

    def step(n, carry, masked):
        need = masked or call.form.score is not None
        key = at(n) * size + halves.first if need else None
        s, dp = halves.tile()
        plgpu.barrier_arrive(v_free.at[v_slot(n)])

        @pl.when(n + 1 < count)
        def _():
            begin(n + 1)

        s, unit, slope = here.logits(s, first, key, masked)
        p = weights(s, unit, lse, False)
        ds = p * (dp - spread(delta, dp.shape, False))
        ds = ds if slope is None else ds * slope

        @pl.when(n > 0)
        def _():
            end(n - 1)

        halves.add((ds,), (k_ring.at[slot(n)],), n > 0)
        return carry

    @pl.when(group == 0)
    def _():
        plgpu.copy_gmem_to_smem(x.q.at[queries], q, there.at[0])
        plgpu.copy_gmem_to_smem(x.do.at[queries], do, there.at[0])
        plgpu.barrier_wait(there.at[0])

    lse, delta = (vector(ref.at[vectors], False, call.interpret, ROW)
                  for ref in (x.lse, x.delta))
    begin(jnp.int32(0))
    jax.lax.fori_loop(0, whole, lambda n, c: step(n, c, False), None)
    jax.lax.fori_loop(whole, count, lambda n, c: step(n, c, True), None)
    end(count - 1)

    @pl.when(group == 0)
    def _():
        halves.save(0, call.form.scale, q, dq_ref.at[queries])
