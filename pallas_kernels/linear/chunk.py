"""The arithmetic of one chunk of tokens in linear attention with decay, as tiles.

The kernels for TPU and GPU do this arithmetic alike; they differ in how chunks are
fetched and in who passes the state on. A chunk has c tokens, as rows: q, k [c,D], v
[c,V]. The state is turned, s [V,D], so that decays of channels lie along its lanes.

    pairs_ij = q_i.k_j scale exp(decay from j to i),  j <= i
    o = pairs v + enter(q) s^T,     s' = total s + v^T leave(k)

No exponent is the difference of two large sums: each is the sum of just the decays
that lie between two tokens. These sums are products with matrices of 0 and 1, in which
float32 is taken apart into three bfloat16 numbers, which is exact.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.machine.sums import add_columns, add_up, levels

FLOOR = -128.0  # exp of it is 0 in float32


def places(c: int):
    """Row and column numbers of a [c,c] matrix."""

    def number(axis):
        return jax.lax.broadcasted_iota(jnp.int32, (c, c), axis)

    return number(0), number(1)


class Gradients(NamedTuple):
    """dq, dk [c,D]; dg: [1,c] for decays of tokens, of which only the sum counts if
    they are all one number, [c,D] for those of channels, None without."""

    dq: Any
    dk: Any
    dg: Any


class NoDecay:
    """A chunk without decay; `scale` multiplies what queries read."""

    def __init__(self, c: int, scale: float):
        self.c, self.scale = c, scale
        self.i, self.j = places(c)

    def within(self):
        """scale times the decay from j to i [c,c], 0 for j > i."""
        return jnp.where(self.j <= self.i, self.scale, 0.0)

    def enter(self, q):
        """Queries as they meet the state that the chunk begins with, float32."""
        return q.astype(F32) * self.scale

    def leave(self, k):
        """Keys as they enter the state that the chunk ends with, float32."""
        return k.astype(F32)

    def kept(self, s):
        """What is left of a state [V,D] at the end of the chunk."""
        return s

    def pairs(self, q, k):
        """[c,c] float32, 0 for j > i."""
        return dot(q, k, NT) * self.within()  # [c,D] [c,D] -> [c,c]

    def back(self, q, k, dp, entered, left, held) -> Gradients:
        """Gradients from dp [c,c], the cotangent of pairs; entered, left [c,D]: those
        of enter(q) and leave(k); held [1,D]: sum over v of the state that comes in
        times the cotangent of the one that goes out."""
        within = self.within()
        ds = (dp * within).astype(q.dtype)  # d(q.k) [c,c]
        from_state, to_state = self.enter(entered), self.leave(left)  # [c,D]
        dg = self.decay_gradient(
            lambda: dot(q, k, NT) * within * dp, q, k, from_state, to_state, held)
        # ds k and ds^T q: [c,c] by [c,D] is [c,D]
        return Gradients(dot(ds, k, NN) + from_state, dot(ds, q, TN) + to_state, dg)

    def decay_gradient(self, weigh, q, k, from_state, to_state, held):
        """The gradient of the decays; weigh() -> pairs times their cotangents."""
        return None


class HeadDecay(NoDecay):
    """A chunk with the same log decay g <= 0 at each of its first `count` tokens; those
    behind them only fill it up."""

    def __init__(self, c: int, scale: float, g, count):
        super().__init__(c, scale)
        self.g, self.count = g, count

    def number(self):
        """The tokens' numbers [c,1]."""
        return jax.lax.broadcasted_iota(jnp.int32, (self.c, 1), 0)

    def within(self):
        # 0 for j > i, so that no exponent is positive
        apart = jnp.maximum(self.i - self.j, 0).astype(F32)
        return jnp.where(self.j <= self.i, self.scale * jnp.exp(self.g * apart), 0.0)

    def enter(self, q):
        # a token's own decay counts
        factor = jnp.exp(self.g * (self.number() + 1).astype(F32))
        return q.astype(F32) * (self.scale * factor)

    def later(self):
        """How many tokens come behind each [c,1]."""
        return jnp.maximum(self.count - 1 - self.number(), 0).astype(F32)

    def leave(self, k):
        return k.astype(F32) * jnp.exp(self.g * self.later())

    def kept(self, s):
        whole = jnp.full((1, 1), self.count, jnp.int32).astype(F32)
        return s * jnp.exp(self.g * whole)

    def decay_gradient(self, weigh, q, k, from_state, to_state, held):
        apart = (self.i - self.j).astype(F32)  # how often a pair has g
        # how often enter(q) and leave(k) have g
        x = rows(q, from_state) * (self.number() + 1).astype(F32)
        y = rows(k, to_state) * self.later()
        own = jnp.where(self.i == self.j, x + y, weigh() * apart)
        whole = jnp.full((1, 1), self.count, jnp.int32).astype(F32)
        held = self.kept(held).sum(1, keepdims=True) * whole
        # at the first token, which is there in every chunk that is not empty
        first = jax.lax.broadcasted_iota(jnp.int32, (1, self.c), 1) == 0
        held = jnp.where(first, held, 0.0)
        return own.sum(0, keepdims=True) + held


def rows(a, b):
    """Sums of the products of each row [c,1]."""
    return (a.astype(F32) * b).sum(1, keepdims=True)


class TokenDecay(NoDecay):
    """A chunk with a log decay for each token, g [1,c]."""

    def __init__(self, c: int, scale: float, g):
        super().__init__(c, scale)
        self.g = g

    def within(self):
        until = jnp.where(self.j <= self.i, self.g, 0.0)  # [i,t]: g_t for t <= i
        # the sum over j < t <= i alone, not the difference of two sums
        factor = jnp.exp(add_columns(until, self.i > self.j))
        return jnp.where(self.j <= self.i, self.scale * factor, 0.0)

    def enter(self, q):
        until = jnp.where(self.j <= self.i, self.g, 0.0).sum(1, keepdims=True)
        return q.astype(F32) * (self.scale * jnp.exp(until))

    def leave(self, k):
        behind = jnp.where(self.j > self.i, self.g, 0.0).sum(1, keepdims=True)
        return k.astype(F32) * jnp.exp(behind)

    def kept(self, s):
        return s * jnp.exp(self.g.sum(1, keepdims=True))

    def decay_gradient(self, weigh, q, k, from_state, to_state, held):
        # the decay at t acts on the pairs j < t <= i
        p = jnp.where(self.j < self.i, weigh(), 0.0)  # [i,j]
        crossing = add_columns(p, self.i < self.j) + rows(q, from_state)  # [i,t]
        own = jnp.where(self.i >= self.j, crossing, rows(k, to_state))
        held = self.kept(held).sum(1, keepdims=True)
        return own.sum(0, keepdims=True) + held


class ChannelDecay(NoDecay):
    """A chunk with a log decay for each token and channel, g [c,D].

    A pair's decay does not leave the sum over channels, so queries and keys each take
    their part of it. Pairs are sorted by level: at level s, a power of two, i lies in
    the second half of a block of 2s tokens and j in the first, and both parts are
    measured from the middle of that block: neither exponent is positive. Each pair
    i > j belongs to just one level, the highest bit in which i and j differ. `rolled`:
    levels are a loop, so that few arrays are alive at once, not written out.
    """

    def __init__(self, c: int, scale: float, g, rolled: bool = False):
        super().__init__(c, scale)
        self.g, self.rolled = g, rolled

    def for_each_level(self, step: Callable, carry):
        """step(s, carry) for each level."""
        if self.rolled:
            # a traced power of two, so that the loop has one body
            def one(n, carry):
                return step(jax.lax.shift_left(jnp.int32(1), n), carry)

            return jax.lax.fori_loop(0, len(levels(self.c)), one, carry)
        return functools.reduce(lambda carry, s: step(s, carry), levels(self.c), carry)

    def decays(self, s):
        """The log decay [c,D] from each token to the middle of its block at level s, or
        that to "enter" from the chunk's start, or to "leave" for its end."""
        return add_up(between(self.i, self.j, s), self.g)

    def spread(self, s, x):
        """The gradient of g from that of decays(s)."""
        return add_up(between(self.i, self.j, s), x, TN)

    def paired(self, s):
        """[i,j]: whether a pair belongs to level s."""
        apart = self.i ^ self.j
        return (apart >= s) & (apart < 2 * s) & (self.i > self.j)

    def at(self, s, q, k):
        """The decay to the middle [c,D] float32, and q and k with it."""
        factor = jnp.exp(self.decays(s))  # at most 1
        return factor, *((a.astype(F32) * factor).astype(a.dtype) for a in (q, k))

    def enter(self, q):
        return q.astype(F32) * (self.scale * jnp.exp(self.decays("enter")))

    def leave(self, k):
        return k.astype(F32) * jnp.exp(self.decays("leave"))

    def kept(self, s):
        return s * jnp.exp(self.g.sum(0, keepdims=True))

    def pairs(self, q, k):
        def step(s, found):
            return self.more_pairs(s, found, q, k)

        return self.for_each_level(step, self.own(q, k))

    def own(self, q, k):
        """The pairs of tokens with themselves [c,c]."""
        return jnp.where(self.i == self.j, self.scale * rows(q, k.astype(F32)), 0.0)

    def more_pairs(self, s, found, q, k):
        """`found` with the pairs of a level put in."""
        _, near, far = self.at(s, q, k)  # q, k to the middle
        return jnp.where(self.paired(s), self.scale * dot(near, far, NT), found)

    def back(self, q, k, dp, entered, left, held) -> Gradients:
        def step(s, found):
            return self.more_back(s, found, q, k, dp)

        return self.for_each_level(step, self.start_back(q, k, dp, entered, left, held))

    def start_back(self, q, k, dp, entered, left, held) -> Gradients:
        """Gradients from the tokens' own pairs and from the states."""
        from_state, to_state = self.enter(entered), self.leave(left)
        own = jnp.where(self.i == self.j, self.scale * dp, 0.0).sum(1, keepdims=True)
        q, k = q.astype(F32), k.astype(F32)
        dg = self.kept(held) + self.spread("enter", q * from_state)
        dg = dg + self.spread("leave", k * to_state)
        return Gradients(from_state + own * k, to_state + own * q, dg)

    def more_back(self, s, found: Gradients, q, k, dp) -> Gradients:
        """`found` and the gradients from the pairs of a level."""
        factor, near, far = self.at(s, q, k)
        ds = jnp.where(self.paired(s), self.scale * dp, 0.0).astype(q.dtype)  # [c,c]
        # ds k and ds^T q of this level's pairs: [c,D]
        to_q, to_k = dot(ds, far, NN) * factor, dot(ds, near, TN) * factor
        more = self.spread(s, q.astype(F32) * to_q + k.astype(F32) * to_k)
        return Gradients(found.dq + to_q, found.dk + to_k, found.dg + more)


def between(i, t, s):
    """Whether token t lies between token i and the middle of the block of 2s tokens
    that i is in; or between the chunk's start and i, i with it, for "enter"; or behind
    i for "leave"."""
    if isinstance(s, str):
        return t <= i if s == "enter" else t > i
    # on one side of the middle, and between it and i
    return ((i ^ t) < s) & (((i & s) != 0) == (t <= i))
