"""Decays of each channel of the key in one chunk of the delta rule: the weights between
its tokens and their gradients. The same on TPU and GPU, on values in a kernel.

A decay of a channel does not leave the sum over channels, so both tokens of a pair take
their part of it. Pairs are sorted by level, as in `pallas_kernels/linear/chunk.py`: at
level s, a power of two, the later token lies in the second half of a block of 2s tokens
and the earlier one in the first, and both parts are measured from the middle of that
block. What a token decays to the middle of its block is known level by level: a block
of 2s knows it from its halves, whose totals it adds. All of these sums are of decays
that do lie between two tokens, at most 0, and none is the difference of two others, so
no exponent is positive and none loses bits behind a token that decays strongly.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, Iterator, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta.chunk import CHUNK, F32, grid
from pallas_kernels.machine.product import NN, NT, TN, dot
from pallas_kernels.machine.sums import add_up, levels


class Level(NamedTuple):
    """pairs [CHUNK,CHUNK]: those that belong to it; factor [CHUNK,D]: the decay between
    a token and the middle of its block, float32; near, far: q and k with it."""

    pairs: Any
    factor: Any
    near: Any
    far: Any


class Climb:
    """The levels of a chunk, once, from the lowest to the highest. Then: enter and
    leave [CHUNK,D], the decay since the chunk began and that until it ends, and whole
    [CHUNK,D], the same in every row, that of the chunk.

    g, q, k [CHUNK,D]; sibling(x, s): x of the token whose number differs in bit s.
    """

    def __init__(self, g, q, k, sibling: Callable):
        self.given, self.sibling = (g, q, k), sibling

    def __iter__(self) -> Iterator[Level]:
        g, q, k = self.given
        # inside its block: up to a token, the token with it; behind it; all of it
        until, behind, total = g, jnp.zeros_like(g), g
        number = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0)
        level = _levels()
        for s in levels(CHUNK):
            second = (number & s) != 0
            factor = jnp.exp(jnp.where(second, until, behind))
            yield Level(level == s, factor, *(_faded(a, factor) for a in (q, k)))
            other = self.sibling(total, s)
            until = until + jnp.where(second, other, 0.0)
            behind = behind + jnp.where(second, 0.0, other)
            total = total + other
        self.enter, self.leave, self.whole = map(jnp.exp, (until, behind, total))

    def met(self):
        """q and k as they meet the state that the chunk begins with, and k as it enters
        the one that it ends with [CHUNK,D], in the type of q."""
        _, q, k = self.given
        return (_faded(q, self.enter), _faded(k, self.enter), _faded(k, self.leave))


def _levels():
    """The level of each pair [CHUNK,CHUNK], 0 for j >= i."""
    i, j = grid()
    apart = i ^ j
    for n in (1, 2, 4):  # all bits below the highest: numbers have 6
        apart = apart | (apart >> n)
    return jnp.where(i > j, apart - (apart >> 1), 0)


def _faded(a, factor):
    return (a.astype(F32) * factor).astype(a.dtype)


def pairs(climb: Iterable[Level], q, k) -> tuple[Any, Any]:
    """q_i.k_j, j <= i, and k_i.k_j, j < i, [CHUNK,CHUNK] under the decays between."""
    i, j = grid()
    own = (q.astype(F32) * k.astype(F32)).sum(1, keepdims=True)
    qk, kk = jnp.where(i == j, own, 0.0), jnp.zeros((CHUNK, CHUNK), F32)
    for at in climb:
        qk = jnp.where(at.pairs, dot(at.near, at.far, NT), qk)
        kk = jnp.where(at.pairs, dot(at.far, at.far, NT), kk)
    return qk, kk


def back(climb: Iterable[Level], q, k, dqk, dkk) -> tuple[Any, Any, Any]:
    """dq, dk and the gradient of the clock, the sum of the log decays of a token and
    all before it, [CHUNK,D], from those of `pairs` [CHUNK,CHUNK], 0 where there is no
    pair."""
    i, j = grid()
    own = jnp.where(i == j, dqk.astype(F32), 0.0).sum(1, keepdims=True)
    dq, dk = own * k.astype(F32), own * q.astype(F32)
    clock = jnp.zeros_like(dq)
    for at in climb:
        a, b = (jnp.where(at.pairs, d.astype(F32), 0.0).astype(q.dtype)
                for d in (dqk, dkk))
        # [CHUNK,CHUNK] by [CHUNK,D]: of q, of k as the later token and as the earlier
        to_q, to_late = dot(a, at.far, NN), dot(b, at.far, NN)
        to_early = dot(a, at.near, TN) + dot(b, at.far, TN)
        dq, dk = dq + at.factor * to_q, dk + at.factor * (to_late + to_early)
        # a decay counts at the later token of a pair and against the earlier one's. Of
        # the rounded factors, so that pairs that a decay is not between cancel in dg
        far = at.far.astype(F32)
        clock = clock + at.near.astype(F32) * to_q + far * (to_late - to_early)
    return dq, dk, clock


def gradients(climb: Climb, levels: Iterable[Level], d_pairs, d_met, held):
    """dq, dk and dg [CHUNK,D] from the gradients of `pairs` and of `met`; levels: those
    of `climb`, or itself; held [1,D]: the state that the chunk begins with times the
    gradient of the one that it ends with, where one goes on as the other."""
    _, q, k = climb.given
    dq, dk, clock = back(levels, q, k, *d_pairs)
    entered, early, late = d_met
    dq = dq + climb.enter * entered
    dk = dk + climb.enter * early + climb.leave * late
    qe, ke, kl = (a.astype(F32) for a in climb.met())
    (i, j), clock = grid(), clock + qe * entered + ke * early
    # a log decay counts for all tokens behind it, itself with them, and, as keys enter
    # the next state, for those before it
    return dq, dk, add_up(j >= i, clock) + add_up(j < i, kl * late) + climb.whole * held
