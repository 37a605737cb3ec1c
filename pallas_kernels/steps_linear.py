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

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

F32, BF16 = jnp.float32, jnp.bfloat16
FLOOR = -128.0  # exp of it is 0 in float32


def dot(a, b, left: int, right: int):
    """A matrix product over the given axes into float32; float32 is not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    return jax.lax.dot_general(
        a, b, (((left,), (right,)), ((), ())), precision=precision,
        preferred_element_type=F32,
    )


def thirds(x) -> list[Any]:
    """x float32 as three bfloat16 arrays whose sum it is."""
    found = []
    for _ in range(2):
        # cut off, not rounded: a conversion there and back may be optimised away
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -65536
        part = jax.lax.bitcast_convert_type(bits, F32)
        found.append(part.astype(BF16))
        x = x - part
    return [*found, x.astype(BF16)]


def chosen(where):
    """A boolean matrix as 0 and 1 in bfloat16."""
    return jnp.where(where, 1.0, 0.0).astype(BF16)


def add_up(where, x, left: int = 1):
    """sum_t where[i,t] x[t,n] -> [i,n] float32; left = 0: where[t,i]."""
    w = chosen(where)
    high, middle, low = (dot(w, part, left, 0) for part in thirds(x))
    return (low + middle) + high


def places(c: int):
    """Row and column numbers of a [c,c] matrix."""
    number = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (c, c), axis)
    return number(0), number(1)


class Gradients(NamedTuple):
    """dq, dk [c,D]; dg: [1,c] for decays of tokens, of which only the sum counts if
    they are all one number, [c,D] for those of channels, None without."""

    dq: Any
    dk: Any
    dg: Any


class Still:
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
        return dot(q, k, 1, 1) * self.within()

    def back(self, q, k, dp, entered, left, held) -> Gradients:
        """Gradients from dp [c,c], the cotangent of pairs; entered, left [c,D]: those
        of enter(q) and leave(k); held [1,D]: sum over v of the state that comes in
        times the cotangent of the one that goes out."""
        within = self.within()
        ds = (dp * within).astype(q.dtype)
        from_state, to_state = self.enter(entered), self.leave(left)
        dg = self.decay(lambda: dot(q, k, 1, 1) * within * dp, q, k, from_state,
                        to_state, held)
        return Gradients(dot(ds, k, 1, 0) + from_state, dot(ds, q, 0, 0) + to_state, dg)

    def decay(self, weigh, q, k, from_state, to_state, held):
        """The gradient of the decays; weigh() -> pairs times their cotangents."""
        return None


class Steady(Still):
    """A chunk with the same log decay g <= 0 at each of its first `count` tokens; those
    behind them only fill it up."""

    def __init__(self, c: int, scale: float, g, count):
        super().__init__(c, scale)
        self.g, self.count = g, count

    def number(self):
        """The tokens' numbers [c,1]."""
        return jax.lax.broadcasted_iota(jnp.int32, (self.c, 1), 0)

    def within(self):
        apart = jnp.maximum(self.i - self.j, 0).astype(F32)
        return jnp.where(self.j <= self.i, self.scale * jnp.exp(self.g * apart), 0.0)

    def enter(self, q):
        fade = jnp.exp(self.g * (self.number() + 1).astype(F32))
        return q.astype(F32) * (self.scale * fade)

    def later(self):
        """How many tokens come behind each [c,1]."""
        return jnp.maximum(self.count - 1 - self.number(), 0).astype(F32)

    def leave(self, k):
        return k.astype(F32) * jnp.exp(self.g * self.later())

    def kept(self, s):
        whole = jnp.full((1, 1), self.count, jnp.int32).astype(F32)
        return s * jnp.exp(self.g * whole)

    def decay(self, weigh, q, k, from_state, to_state, held):
        apart = (self.i - self.j).astype(F32)
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


class Tokens(Still):
    """A chunk with a log decay for each token, g [1,c]."""

    def __init__(self, c: int, scale: float, g):
        super().__init__(c, scale)
        self.g = g

    def within(self):
        until = jnp.where(self.j <= self.i, self.g, 0.0)
        behind = chosen(self.i > self.j)  # [t,j]
        high, middle, low = (dot(part, behind, 1, 0) for part in thirds(until))
        fade = jnp.exp((low + middle) + high)
        return jnp.where(self.j <= self.i, self.scale * fade, 0.0)

    def enter(self, q):
        until = jnp.where(self.j <= self.i, self.g, 0.0).sum(1, keepdims=True)
        return q.astype(F32) * (self.scale * jnp.exp(until))

    def leave(self, k):
        behind = jnp.where(self.j > self.i, self.g, 0.0).sum(1, keepdims=True)
        return k.astype(F32) * jnp.exp(behind)

    def kept(self, s):
        return s * jnp.exp(self.g.sum(1, keepdims=True))

    def decay(self, weigh, q, k, from_state, to_state, held):
        # the decay at t acts on the pairs j < t <= i
        p = jnp.where(self.j < self.i, weigh(), 0.0)
        before = chosen(self.i < self.j)  # [j,t]
        high, middle, low = (dot(part, before, 1, 0) for part in thirds(p))
        crossing = (low + middle) + high + rows(q, from_state)
        own = jnp.where(self.i >= self.j, crossing, rows(k, to_state))
        held = self.kept(held).sum(1, keepdims=True)
        return own.sum(0, keepdims=True) + held


class Channels(Still):
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

    def over(self, step: Callable, carry):
        """step(s, carry) for each level."""
        many = (self.c - 1).bit_length()
        if self.rolled:
            one = lambda n, carry: step(jax.lax.shift_left(jnp.int32(1), n), carry)
            return jax.lax.fori_loop(0, many, one, carry)
        for n in range(many):
            carry = step(1 << n, carry)
        return carry

    def to_middle(self, s: int):
        """[i,t]: whether t lies between i and the middle of its block at level s."""
        i, t = self.i, self.j
        return ((i ^ t) < s) & (((i & s) != 0) == (t <= i))

    def paired(self, s: int):
        """[i,j]: whether a pair belongs to level s."""
        apart = self.i ^ self.j
        return (apart >= s) & (apart < 2 * s) & (self.i > self.j)

    def at(self, s: int, q, k):
        """The decay to the middle [c,D] float32, and q and k with it."""
        fade = jnp.exp(add_up(self.to_middle(s), self.g))
        return fade, *((a.astype(F32) * fade).astype(a.dtype) for a in (q, k))

    def enter(self, q):
        return q.astype(F32) * (
            self.scale * jnp.exp(add_up(self.j <= self.i, self.g)))

    def leave(self, k):
        return k.astype(F32) * jnp.exp(add_up(self.j > self.i, self.g))

    def kept(self, s):
        return s * jnp.exp(self.g.sum(0, keepdims=True))

    def pairs(self, q, k):
        def step(s, found):
            _, near, far = self.at(s, q, k)
            return jnp.where(self.paired(s), dot(near, far, 1, 1), found)

        own = jnp.where(self.i == self.j, rows(q, k.astype(F32)), 0.0)
        return self.over(step, own) * self.scale

    def back(self, q, k, dp, entered, left, held) -> Gradients:
        dp = dp * self.scale
        from_state, to_state = self.enter(entered), self.leave(left)
        own = jnp.where(self.i == self.j, dp, 0.0).sum(1, keepdims=True)
        wide = lambda a: a.astype(F32)
        dq, dk = from_state + own * wide(k), to_state + own * wide(q)
        dg = self.kept(held) + add_up(self.j <= self.i, wide(q) * from_state, 0)
        dg = dg + add_up(self.j > self.i, wide(k) * to_state, 0)

        def step(s, found):
            fade, near, far = self.at(s, q, k)
            ds = jnp.where(self.paired(s), dp, 0.0).astype(q.dtype)
            to_q, to_k = dot(ds, far, 1, 0) * fade, dot(ds, near, 0, 0) * fade
            more = add_up(self.to_middle(s), wide(q) * to_q + wide(k) * to_k, 0)
            return Gradients(found.dq + to_q, found.dk + to_k, found.dg + more)

        return self.over(step, Gradients(dq, dk, dg))
