"""Decays of channels on TPU: one matrix product makes the sums of decays of all chunks
of a block, and their pairs level by level, so that no product waits for another.

All sums of a chunk are one matrix of 0 and 1, [sums * c, c], times the decays [c,D].
The chunks of a block stand beside each other as columns, the three bfloat16 parts of
float32 below each other: one product, with the long axes where the matrix unit has
them. The gradients of the decays come back by the transposed matrix.
"""

from __future__ import annotations

from typing import Any, Sequence

import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear.chunk import ChannelDecay, Gradients, between
from pallas_kernels.machine.product import F32, NN, dot
from pallas_kernels.machine.sums import BF16, levels, split_bf16x3


def names(c: int) -> list[Any]:
    """The sums of decays that a chunk of c tokens needs."""
    return ["enter", "leave", *levels(c)]


def sums(c: int) -> np.ndarray:
    """[sums * c, c]: which tokens each sum of each token takes."""
    i, t = np.arange(c)[:, None], np.arange(c)[None]  # [c,1], [1,c]
    return np.concatenate([between(i, t, s) for s in names(c)])


def matrices(c: int) -> tuple[Any, Any]:
    """`sums` for three parts beside each other, and turned, in bfloat16."""
    ones = jnp.asarray(sums(c), BF16)
    return jnp.tile(ones, (1, 3)), ones.T  # [sums*c,3*c], [c,sums*c]


class Joint(ChannelDecay):
    """A chunk whose sums of decays were made with those of others."""

    def __init__(self, c: int, scale: float, g, known: dict[Any, Any], masks: dict):
        super().__init__(c, scale, g)
        self.known, self.masks = known, masks
        self.gradients: dict[Any, Any] = {}
        self.decayed: dict[Any, Any] = {}

    def decays(self, s):
        return self.known[s]

    def spread(self, s, x):
        self.gradients[s] = x
        return 0.0  # added up by `back`, for all chunks at once

    def paired(self, s):
        if s not in self.masks:
            self.masks[s] = super().paired(s)
        return self.masks[s]

    def at(self, s, q, k):
        if s not in self.decayed:
            self.decayed[s] = super().at(s, q, k)
        return self.decayed[s]


def joint(c: int, scale: float, g: Sequence[Any], matrix) -> list[Joint]:
    """The chunks of a block, from their log decays [c,D]."""
    width = g[0].shape[1]
    beside = jnp.concatenate(list(g), 1)  # [c,n*D]
    # [sums*c,3*c] by [3*c,n*D] is [sums*c,n*D]
    found = dot(matrix[...], jnp.concatenate(split_bf16x3(beside), 0), NN)
    masks: dict[Any, Any] = {}
    return [
        Joint(c, scale, own, {
            s: found[m * c:(m + 1) * c, n * width:(n + 1) * width]
            for m, s in enumerate(names(c))}, masks)
        for n, own in enumerate(g)
    ]


def pairs(decays: Sequence[Joint], rows) -> list[Any]:
    """Pairs of all chunks [c,c], level by level; rows: q and k of each."""
    found = [f.own(q, k) for f, (q, k) in zip(decays, rows)]
    for s in levels(decays[0].c):
        found = [f.more_pairs(s, p, q, k) for f, p, (q, k) in zip(decays, found, rows)]
    return found


def back(decays: Sequence[Joint], rows, given, matrix) -> list[Gradients]:
    """Gradients of all chunks; given: dp, entered, left and held of each."""
    found = [f.start_back(*r, *own) for f, r, own in zip(decays, rows, given)]
    for s in levels(decays[0].c):
        found = [f.more_back(s, one, q, k, own[0])
                 for f, one, (q, k), own in zip(decays, found, rows, given)]
    beside = [jnp.concatenate([f.gradients[s] for f in decays], 1)
              for s in names(decays[0].c)]
    dg = jnp.zeros((decays[0].c, beside[0].shape[1]), F32)
    # [c,sums*c] by [sums*c,n*D] is [c,n*D], the smallest parts first
    for part in reversed(split_bf16x3(jnp.concatenate(beside, 0))):
        dg = dg + dot(matrix[...], part, NN)
    width = decays[0].g.shape[1]
    return [one._replace(dg=one.dg + dg[:, n * width:(n + 1) * width])
            for n, one in enumerate(found)]
