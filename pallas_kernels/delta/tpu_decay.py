"""What decays in a chunk of the delta rule on TPU: heads or the channels of their keys.

Both say the same things of a chunk, so that the passes are one code: q and k as they
meet the states, the weights between tokens, what is kept of a state, and the gradients
of all of these.

Two limits, counted and not measured, for T = 8192, 16 heads of D = V = 128 and bfloat16
on a v5e (197 TFLOP/s, 0.82 TB/s), with decays of channels; everything is read and
written once. The recurrence, 6 D V flops a token and head and 2.5 times that backward:
13 G, 0.07 ms, and 32 G, 0.16 ms. Bytes: 0.20 G, 0.25 ms, and 0.45 G, 0.55 ms, of which
0.08 are states and inverses that the forward pass left. The kernels' products: 56 G,
0.28 ms, and 131 G, 0.66 ms. By the compiled schedule they take 1.5 and 2.3 ms, in which
the matrix units are busy for 38% and 49%: a chunk has only 64 rows for them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta import channels
from pallas_kernels.delta.chunk import CHUNK, Side, decays, strict
from pallas_kernels.machine.product import NN, NT, TN, dot


class HeadDecay:
    """A log decay a token and head, or none: its factors are in the chunk's numbers."""

    def __init__(self, own: Side, row: Side, q, k, gated: bool):
        self.row, self.q, self.k = row, q, k
        self.decay = decays(own, row, gated)  # [CHUNK,CHUNK], 0 for j > i

    def met(self) -> tuple[Any, ...]:
        """q and k as they meet the state that the chunk begins with, and k as it enters
        the one that it ends with [CHUNK,D], but for `enter` and `leave`."""
        return self.q, self.k, self.k

    def pairs(self) -> tuple[Any, Any]:
        """The weights between tokens but for scale and beta [CHUNK,CHUNK]: of queries
        and keys, j <= i, and of keys, j < i."""
        # [CHUNK,D] by [CHUNK,D]
        return (self.decay * dot(self.q, self.k, NT),
                strict(self.decay * dot(self.k, self.k, NT)))

    def kept(self):
        """What is kept of the state, [1,1] or [D,1]."""
        return self.row.keep[:, :1]

    def back(self, pairs, d_pairs, d_met, held) -> tuple[Any, ...]:
        """dq, dk and dg, here None, [CHUNK,D], and gradients of the chunk's numbers as
        columns and rows, of what `pairs` and `met` gave; held [D,V]: the state times
        the gradient of the next one."""
        q, k, (entered, early, late) = self.q, self.k, d_met
        # weights times their gradients: what the decay between two tokens gets
        pair = strict(sum(a * b for a, b in zip(pairs, d_pairs)))
        dqk, dkk = ((self.decay * d).astype(q.dtype) for d in d_pairs)  # d(q k^T) ..
        dk = dot(dqk, q, TN) + late + early
        # k stands on both sides of k k^T
        dk = dk + dot(dkk, k, NN) + dot(dkk, k, TN)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK), 1)
        kept = jnp.sum(held, axis=(0, 1), keepdims=True)
        # a log decay counts at the later token of a pair, and against the earlier one's
        numbers = {"fine": pair.sum(1, keepdims=True)}, {
            "fine": -pair.sum(0, keepdims=True),
            "keep": jnp.where(lane == 0, kept, 0.0)}
        return entered + dot(dqk, k, NN), dk, None, numbers


class ChannelDecay:
    """A log decay of each channel of the key, g [CHUNK,D]; the chunk's numbers say only
    which tokens belong together. See `HeadDecay` for the methods."""

    def __init__(self, own: Side, row: Side, q, k, g):
        self.row, self.q, self.k = row, q, k
        self.seen = decays(own, row, False)
        self.climb = channels.Climb(g, q, k, _sibling)
        self.levels = list(self.climb)

    def met(self):
        return self.climb.met()

    def pairs(self):
        qk, kk = channels.pairs(self.levels, self.q, self.k)
        return self.seen * qk, self.seen * kk

    def kept(self):
        return self.row.keep[:, :1] * self.climb.whole[:8].T[:, :1]

    def back(self, pairs, d_pairs, d_met, held):
        held = jnp.broadcast_to((self.row.keep[:, :1] * held).sum(1, keepdims=True),
                                (held.shape[0], 8)).T[:1]  # [D,V] -> [1,D]
        return *channels.gradients(
            self.climb, self.levels, [self.seen * d for d in d_pairs], d_met, held
        ), ({}, {})


def _sibling(x, s: int):
    """x [CHUNK,D] of the token whose number differs in bit s."""
    number = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(number & s != 0, pltpu.roll(x, s, 0), pltpu.roll(x, CHUNK - s, 0))
