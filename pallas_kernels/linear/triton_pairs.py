"""The pairs of a chunk under decays of channels on GPU, made once a chunk and head.

Levels of 16 and more are as in `chunk.py`. The pairs inside a block of 16 tokens are
one product: both parts of a decay are measured from the middle of the block, so that
one of the two exponents is positive, and is at most the sum over 8 tokens. Where that
passes 80 for any token and channel (e^88 is the end of float32), as where a segment
begins, the levels 8, 4, 2 and 1 are taken instead. In float32 they always are, whose
exactness one large factor and one small one would not keep.

Source: the split at the middle of a block is that of flash-linear-attention's kernel
for bounded gates; the bound that is looked at, and the levels behind it, are proposed
here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.linear.chunk import ChannelDecay
from pallas_kernels.linear.triton_chunk import Arrays, Call, ChunkContext
from pallas_kernels.machine.product import F32, NT, dot
from pallas_kernels.machine.sums import add_up, levels

BLOCK, LIMIT = 16, 80.0


class BlockDecay(ChannelDecay):
    """A chunk whose pairs inside blocks of 16 tokens are one product."""

    def pairs(self, q, k):
        if q.dtype == F32:
            return super().pairs(q, k)
        clock = self.clock()
        near_by = jnp.max(jnp.abs(clock)) <= LIMIT
        near = (q.astype(F32) * jnp.exp(clock)).astype(q.dtype)
        far = (k.astype(F32) * jnp.exp(-clock)).astype(k.dtype)
        same = ((self.i ^ self.j) < BLOCK) & (self.i > self.j) & near_by
        found = jnp.where(same, self.scale * dot(near, far, NT), self.own(q, k))

        def step(n, found):
            return self.more_pairs(jax.lax.shift_left(jnp.int32(1), n), found, q, k)

        first = jnp.where(near_by, jnp.int32(len(levels(BLOCK))), jnp.int32(0))
        return jax.lax.fori_loop(first, jnp.int32(len(levels(self.c))), step, found)

    def clock(self):
        """The log decay [c,D] from the middle of each token's block to it: what lies
        between them, negative behind the middle and positive before it."""
        apart = add_up(self.between_middle(), self.g)
        late = (jax.lax.broadcasted_iota(jnp.int32, apart.shape, 0) & BLOCK // 2) != 0
        return jnp.where(late, apart, -apart)

    def between_middle(self):
        """[i,t]: whether token t lies between token i and the middle of its block."""
        half = BLOCK // 2
        # on one side of the middle, and between it and i
        return ((self.i ^ self.j) < half) & (
            ((self.i & half) != 0) == (self.j <= self.i))


def kernel(call: Call, x: Arrays, pairs_ref) -> None:
    """The pairs of one chunk of one head [c,c], over some key channels at a time."""
    n, h, b = (pl.program_id(axis) for axis in range(3))
    ctx = ChunkContext(call, x, b, h, n)

    def step(i, found):
        first = i * call.keys
        q = ctx.rows(x.q, h, first, call.keys)  # [c,keys]
        k = ctx.rows(x.k, ctx.kv, first, call.keys)  # [c,keys]
        g = ctx.by_channel(first, call.keys)
        return found + BlockDecay(call.c, call.scale, g, rolled=True).pairs(q, k)

    zeros = jnp.zeros((call.c, call.c), F32)
    found = jax.lax.fori_loop(0, call.lanes // call.keys, step, zeros)
    triton.store(pairs_ref.at[b, h, n], found.astype(pairs_ref.dtype))
