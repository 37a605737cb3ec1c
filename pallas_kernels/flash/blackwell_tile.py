"""Tiles of a backward pass for Blackwell by Mosaic GPU: tiles in tensor memory that two
warpgroups share.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash.mosaic_tile import Call
from pallas_kernels.machine.blackwell import (
    COLUMNS, COPIED, ROW, commit, load, multiply, store, tensor
)
from pallas_kernels.machine.hopper import F32, matrix

PART = 64  # columns that are written at once: a line of shared memory


def halved(call: Call, columns: int, kind, sums: tuple[int, ...], own):
    """What `Halves` uses, for tiles of so many columns and sums so wide, and tensor
    memory for those of the block's own two tiles, `own` wide, that it has room for."""
    parts = [(columns, F32)] * 2 + [(columns, kind)] * len(sums)  # s, dp; left sides
    parts += [(n, F32) for n in sums]
    # in columns of 32 bits, of which numbers of 16 bits take half
    used = columns * (4 + len(sums)) // 2 + sum(sums)
    kept = [(n, kind) for n, end in zip(own, itertools.accumulate(own))
            if used + end // 2 <= COLUMNS]

    def barrier(n):
        return plgpu.Barrier(num_arrivals=n, orders_tensor_core=True)

    many = call.warpgroups
    return (*tensor(call.interpret, *parts), barrier(1), barrier(1),  # s, dp there
            barrier(len(sums)), barrier(many), barrier(many),  # added, read, stored
            *tensor(call.interpret, *kept))


class Halves(NamedTuple):
    """Tiles whose columns are halved between two warpgroups, the first of which begins
    all products.

    s, dp: tensor memory for the logits and for the gradients of the weights; lefts: for
    the left sides of the products that add to `sums`; kept: for the left sides of s and
    dp, as far as there is room. Barriers: s and dp are there, the sums are; both
    warpgroups have read s and dp, and have stored the left sides.
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
    kept: tuple[Any, ...]

    @classmethod
    def of(cls, call: Call, group, refs, many: int) -> Halves:
        """From `halved` for that many sums."""
        s, dp, *rest = refs
        barriers, kept = rest[2 * many:2 * many + 5], rest[2 * many + 5:]
        s_there, dp_there, added, read, stored = barriers
        return cls(call, group, s, dp, tuple(rest[:many]), tuple(rest[many:2 * many]),
                   s_there, dp_there, added, read, stored, tuple(kept))

    @property
    def first(self):
        """The first column of this warpgroup's half."""
        return self.group * (self.s.shape[1] // self.call.warpgroups)

    @property
    def mine(self):
        """This warpgroup's columns."""
        return pl.ds(self.first, self.s.shape[1] // self.call.warpgroups)

    def open(self, copies) -> tuple[Any, Any]:
        """Loads the block's own two tiles by `copies` (from, to, barrier), and gives
        what is then the left side of s and of dp."""
        @pl.when(self.group == 0)
        def _():
            for copy in copies:
                plgpu.copy_gmem_to_smem(*copy)
            for _, smem, there in copies:
                plgpu.barrier_wait(there)
            for (_, smem, _), ref in zip(copies, self.kept):
                store(ref, matrix(smem, self.call.interpret, ROW), self.call.interpret)

        self.settle()
        return *self.kept, *(smem for _, smem, _ in copies[len(self.kept):])

    def begin(self, s, dp) -> None:
        """Begins the products s and dp; both warpgroups have read those before."""
        @pl.when(self.group == 0)
        def _():
            # s first, which is waited for first
            for acc, (left, right), there in ((self.s, s, self.s_there),
                                              (self.dp, dp, self.dp_there)):
                multiply(acc, left, right, there, False, self.call.interpret)

    def tile(self):
        """This half of s and dp, which may be overwritten once both warpgroups are
        here."""
        plgpu.barrier_wait(self.s_there)
        s = load(self.s.at[:, self.mine], self.call.interpret)  # [128,columns/2]
        plgpu.barrier_wait(self.dp_there)
        dp = load(self.dp.at[:, self.mine], self.call.interpret)  # [128,columns/2]
        plgpu.barrier_arrive(self.read)

        # only who begins the next products waits: these overwrite s and dp
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
            left = left.astype(ref.dtype)  # 16 bits
            store(ref.at[:, self.mine], left, self.call.interpret)
        self.settle()  # both halves before a product reads them

        @pl.when(self.group == 0)
        def _():
            # sum += left right: [128,columns] by [columns,width] is [128,width]
            for acc, left, right in zip(self.sums, self.lefts, rights):
                multiply(acc, left, right, self.added, accumulate, self.call.interpret)

    def save(self, n: int, scale: float, smem, ref) -> None:
        """Writes the n-th sum, when all products are done."""
        for start in range(0, smem.shape[1], PART):
            part = pl.ds(start, PART)
            total = load(self.sums[n].at[:, part], self.call.interpret, COPIED)
            smem.at[:, part][...] = (total * scale).astype(smem.dtype)
        plgpu.commit_smem()  # before the copy reads it
        plgpu.copy_smem_to_gmem(smem, ref)
        plgpu.wait_smem_to_gmem(0)
