"""Pointer Networks (Vinyals et al., 2015) arXiv:1506.03134: answers are positions of
the input.

An LSTM reads points, another one writes: at each step its softmax over the points (and
an end symbol, index 0) is the distribution of the next index. So the network knows no
dictionary, and lists may be longer than those of the training.

    u_ij = v.tanh(W1 e_j + W2 d_i),   p(C_i | C_<i, P) = softmax_j u_ij

The decoder's next input is the point that was pointed at. What the paper leaves open is
as in a replication (gchaperon/pointer-networks): the end symbol is a learned vector,
which the encoder begins with; the start symbol is a learned point; both LSTMs are one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.exact.additive import additive, additive_scores

RULES = "free", "hull", "tour"
NEVER = -1e30


def _uniform(spread: float, key, shape, dtype=jnp.float32) -> jax.Array:
    """Uniform in [-spread, spread], as all parameters here."""
    return jax.random.uniform(key, shape, dtype, -spread, spread)


class Carry(NamedTuple):
    """h and c [B,h] of an LSTM."""

    h: jax.Array
    c: jax.Array


class Encoded(NamedTuple):
    """What the decoder reads: memory [B,n+1,h], end first; keys, memory W1; points
    [B,n+1,F], the end's a zero; there [B,n+1] bool; carry, which it starts from."""

    memory: jax.Array
    keys: jax.Array
    points: jax.Array
    there: jax.Array
    carry: Carry


class LSTM(nn.Module):
    """i, f, o = sigma(x W + h U + b), g = tanh(...): c = f c + i g, h = o tanh(c).

    Gates stand in the order i, f, g, o of `inputs` [F,4h], `hidden` [h,4h] and `bias`.
    """

    width: int
    spread: float = 0.08

    @nn.compact
    def __call__(self, x, carry: Carry, there=None):
        """x [B,T,F] -> the last carry, h of all steps [B,T,h]. there [B,T]: at other
        steps the carry stays."""
        many, init = 4 * self.width, functools.partial(_uniform, self.spread)
        w = self.param("inputs", init, (x.shape[-1], many))
        u = self.param("hidden", init, (self.width, many))
        b = self.param("bias", init, (many,))
        if there is None:
            there = jnp.ones(x.shape[:2], bool)

        def step(carry, at):
            gates, real = at
            i, f, g, o = jnp.split(gates + carry.h @ u, 4, -1)
            c = nn.sigmoid(f) * carry.c + nn.sigmoid(i) * jnp.tanh(g)
            new = Carry(nn.sigmoid(o) * jnp.tanh(c), c)
            new = jax.tree.map(lambda a, old: jnp.where(real[:, None], a, old), new,
                               carry)
            return new, new.h

        # what x says to all gates needs no order: [B,T,F] [F,4h], then time first
        ahead = (x @ w + b[None, None]).swapaxes(0, 1), there.T
        carry, h = jax.lax.scan(step, carry, ahead)
        return carry, h.swapaxes(0, 1)


class PointerNet(nn.Module):
    """Pointer Networks (Vinyals et al., 2015) arXiv:1506.03134.

    hidden h: of both LSTMs. features F: of a point. dictionary: None to point; n for
    the paper's baseline, which reads the same memory by attention and chooses one of n
    indices from [d_i ; sum_j a_j e_j]: points beyond the n-th have no index. (The
    paper's feeds the second half to the next step too; this one does not.) spread: all
    parameters begin uniform within it.
    """

    hidden: int = 256
    features: int = 2
    dictionary: int | None = None
    spread: float = 0.08

    def setup(self):
        h, init = self.hidden, functools.partial(_uniform, self.spread)
        if h < 1 or self.features < 1:
            raise ValueError(f"PointerNet: hidden={h}, features={self.features}: "
                             "expected 1 or more")
        self.encoder, self.decoder = (LSTM(h, self.spread) for _ in range(2))
        self.start = self.param("start", init, (self.features,))
        self.end = self.param("end", init, (h,))
        self.cell = self.param("cell", init, (h,))  # the encoder's first c
        self.w1, self.w2 = (self.param(n, init, (h, h)) for n in ("w1", "w2"))
        self.v = self.param("v", init, (h,))
        if self.dictionary is not None:
            self.choose = nn.Dense(
                self.dictionary + 1, kernel_init=init, bias_init=init)

    def __call__(self, points, targets=None, there=None):
        """points [B,n,F], targets [B,steps] int, 0 the end, k the k-th point, -1 for
        nothing, there [B,n] bool -> logits [B,steps,n+1] (or dictionary + 1), each
        given the targets before it."""
        encoded = self.encode(points, there)
        if targets is None:
            targets = jnp.zeros((points.shape[0], 1), jnp.int32)
        before = jnp.maximum(targets[:, :-1], 0)
        x = jnp.take_along_axis(encoded.points, before[..., None], 1)
        first = jnp.broadcast_to(
            self.start[None, None], (x.shape[0], 1, self.features))
        _, d = self.decoder(jnp.concatenate([first, x], 1), encoded.carry)
        return self._logits(d, encoded)

    def encode(self, points, there=None) -> Encoded:
        """The memory of points [B,n,F]."""
        if points.ndim != 3 or points.shape[2] != self.features:
            raise ValueError(f"points have shape {points.shape}: expected "
                             f"[B,n,{self.features}]")
        b, n, _ = points.shape
        if self.dictionary is not None and n > self.dictionary:
            raise ValueError(f"{n} points: expected at most dictionary="
                             f"{self.dictionary}")
        there = jnp.ones((b, n), bool) if there is None else there
        h, c = (jnp.broadcast_to(a[None], (b, self.hidden))
                for a in (self.end, self.cell))
        carry, e = self.encoder(points, Carry(h, c), there)
        memory = jnp.concatenate([h[:, None], e], 1)
        ends = jnp.ones((b, 1), bool)
        return Encoded(
            memory, memory @ self.w1, jnp.pad(points, ((0, 0), (1, 0), (0, 0))),
            jnp.concatenate([ends, there], 1), carry)

    def step(self, encoded: Encoded, carry: Carry, index):
        """One step of the decoder: index [B] of the last one, -1 at the start -> carry,
        log probabilities [B,n+1] of the next one."""
        x = jnp.take_along_axis(
            encoded.points, jnp.maximum(index, 0)[:, None, None], 1)
        x = jnp.where((index < 0)[:, None, None], self.start[None, None], x)
        carry, d = self.decoder(x, carry)
        n = encoded.points.shape[1]
        return carry, nn.log_softmax(self._logits(d, encoded)[:, 0, :n])

    def _logits(self, d, encoded: Encoded):
        there = encoded.there[:, None]  # [B,1,n+1]
        query = d @ self.w2
        if self.dictionary is None:
            u = additive_scores(query, encoded.keys, self.v)  # [B,T,n+1]
        else:
            found = additive(query, encoded.keys, self.v, encoded.memory, there)
            u = self.choose(jnp.concatenate([d, found], -1))
            more = self.dictionary + 1 - there.shape[2]
            there = jnp.pad(there, ((0, 0), (0, 0), (0, more)))
        return jnp.where(there, u, NEVER)


class Beam(NamedTuple):
    """W partial answers a row. carry [B W,h]; score [B,W]: log probability; last, first
    [B,W]: indices, -1 for none; points [B,W]: how many so far; used [B,W,n+1]; closed
    [B,W]: nothing but the end may follow."""

    carry: Carry
    score: jax.Array
    last: jax.Array
    first: jax.Array
    points: jax.Array
    used: jax.Array
    closed: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "steps", "rule", "width"))
def search(model: PointerNet, params: Any, points: jax.Array, there: jax.Array, *,
           steps: int, rule: str = "free", width: int = 1) -> jax.Array:
    """The most probable answers that beams of `width` find: [B,steps] int, 0 after the
    end. points [B,n,F], there [B,n].

    rule: "tour": every point once, then the first one, then the end; "hull": three
    points or more, none twice, closed by the first one, then the end; "free": anything
    up to the end. Probabilities are the network's own, those of what a rule forbids
    counting as 0. ValueError for another rule, or fewer steps than any answer needs.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {RULES}")
    b, n = points.shape[:2]
    # points, the first one again where a rule wants it, and the end
    needs = {"tour": n + 2, "hull": 5, "free": 1}[rule]
    if steps < needs:
        raise ValueError(f"steps={steps}: expected {needs} or more for rule={rule!r} "
                         f"and {n} points")
    encoded: Any = model.apply(params, points, there, method="encode")
    wide = jax.tree.map(lambda a: jnp.repeat(a, width, 0), encoded)  # [B W,...]
    none = jnp.full((b, width), -1, jnp.int32)
    beam = Beam(
        wide.carry, jnp.where(jnp.arange(width) > 0, NEVER, 0.0)[None].repeat(b, 0),
        none, none, none + 1, jnp.zeros((b, width, n + 1), bool), none > 0)

    def step(beam: Beam, _):
        stepped: Any = model.apply(
            params, wide, beam.carry, beam.last.reshape(-1), method="step")
        carry, logp = stepped
        allowed = _allowed(beam, encoded.there, rule)
        # an answer that is closed ends, and costs no more
        ended = (beam.last == 0)[..., None]
        logp = jnp.where(ended, 0.0, logp.reshape(b, width, n + 1))
        total = jnp.where(allowed, beam.score[..., None] + logp, NEVER * 2)
        score, at = jax.lax.top_k(total.reshape(b, -1), width)
        parent, index = at // (n + 1), at % (n + 1)

        def of_parent(a):
            at = parent.reshape(b, width, *(1,) * (a.ndim - 2))
            return jnp.take_along_axis(a, at, 1)

        carry = jax.tree.map(
            lambda a: of_parent(a.reshape(b, width, -1)).reshape(b * width, -1), carry)
        first, count, used = map(of_parent, (beam.first, beam.points, beam.used))
        closes = (index == 0) | ((index == first) & (rule != "free"))
        beam = Beam(
            carry, score, index, jnp.where(first < 0, index, first),
            count + (index > 0), used | jax.nn.one_hot(index, n + 1, dtype=bool),
            of_parent(beam.closed) | closes)
        return beam, (parent, index)

    beam, (parents, indices) = jax.lax.scan(step, beam, None, steps)
    return _traced_back(parents, indices, beam.score.argmax(1))


def _allowed(beam: Beam, there, rule: str) -> jax.Array:
    """Which index [B,W,n+1] may follow."""
    index = jnp.arange(there.shape[1])[None, None]
    points = there[:, None] & (index > 0)
    if rule == "free":
        following = there[:, None] & jnp.ones_like(beam.used)
    else:
        returns = (index == beam.first[..., None]) & points
        free = points & ~beam.used
        if rule == "tour":
            # the first one when there is no other
            following = jnp.where(free.any(-1, keepdims=True), free, returns)
        else:
            following = free | (returns & (beam.points >= 3)[..., None])
    return jnp.where(beam.closed[..., None], index == 0, following)


def _traced_back(parents, indices, best) -> jax.Array:
    """The indices [B,steps] of the best beam [B]; parents, indices [steps,B,W]."""
    def back(at, step):
        parent, index = (jnp.take_along_axis(a, at[:, None], 1)[:, 0] for a in step)
        return parent, index

    return jax.lax.scan(back, best, (parents, indices), reverse=True)[1].T
