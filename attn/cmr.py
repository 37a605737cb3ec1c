"""Contextual Memory Reweaving (Dillon et al., 2025) arXiv:2502.02046: states come back.

While a long text is read segment by segment, hidden states of a few layers are captured
in a buffer of `entries` a layer, the most relevant ones. Before one layer of a later
segment every token reads these buffers, by a small cross attention a captured layer,
weighs layers against each other, and adds what it found through a gate. So a network
whose attention does not reach beyond a segment still knows what came before, with a
memory that does not grow.

    rho = sigmoid(w . norm(s) + b)
    logit_(t,l,j) = q_t k_(l,j) / sqrt(d) + log rho_(l,j) - decay (pos_t - pos_(l,j))
    r_t = sum_l softmax_l(norm(h_t) W_l) softmax_j(logit_(t,l,j)) v_l
    out_t = h_t + sigmoid([norm(h_t); r_t] W_g + b_g) * (r_t W_o)

The paper's equations were not found: all of this is an instance of its idea that is
proposed here, not published. W_o is 0 at first, so that a trained network is unchanged.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.fields import check_fields
from attn.exact.dense import weights

LEAST = 1e-6  # of a relevance


class Buffer(NamedTuple):
    """Of m layers M entries each: states [B,m,M,E], positions pos [B,m,M] int32, -1 for
    an empty entry, and rho [B,m,M] float32, the relevance when they were captured."""

    states: jax.Array
    pos: jax.Array
    rho: jax.Array


class Reading(NamedTuple):
    """out [B,T,E]; r [B,T,d], the reconstruction; layer weights a [B,T,m]; gate
    [B,T,E]."""

    out: jax.Array
    r: jax.Array
    a: jax.Array
    gate: jax.Array


def normed(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32, without a scale."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


def read(
    h: jax.Array, buffer: Buffer, rho: jax.Array, pos: jax.Array, w: dict[str, Any],
    decay: Any = 0.01, eps: float = 1e-6,
) -> Reading:
    """Steps 2 to 4 of the head of this file: tokens h [B,T,E] at pos [B,T] read.

    rho [B,m,M]: relevance now. w: Wq [E,d], Wk, Wv [m,E,d], Wl [E,m], Wo [d,E], Wg
    [E+d,E], bg [E].
    """
    hn, mn = normed(h, eps), normed(buffer.states, eps)
    q = hn @ w["Wq"]  # [B,T,d]
    # each captured layer has a Wk and a Wv: [B,m,M,E] x [m,E,d] -> [B,m,M,d]
    k = jnp.einsum("bmje,med->bmjd", mn, w["Wk"])
    v = jnp.einsum("bmje,med->bmjd", mn, w["Wv"])
    # [B,T,d] x [B,m,M,d] -> [B,m,T,M]
    logit = jnp.einsum("btd,bmjd->bmtj", q, k) * q.shape[-1] ** -0.5
    age = pos[:, None, :, None] - buffer.pos[:, :, None]  # [B,m,T,M]
    # q.k / sqrt(d) + log rho - decay age: what is relevant counts rho times
    logit = logit + jnp.log(jnp.maximum(rho, LEAST))[:, :, None]
    logit = logit - decay * age.astype(jnp.float32)
    there = jnp.broadcast_to((buffer.pos >= 0)[:, :, None], logit.shape)
    # [B,m,T,M] x [B,m,M,d] -> [B,T,m,d]
    # of an empty buffer nothing is read
    found = jnp.einsum("bmtj,bmjd->btmd", weights(logit, there), v)
    some = jnp.broadcast_to((buffer.pos >= 0).any(2)[:, None], found.shape[:3])
    a = weights(hn @ w["Wl"], some)  # [B,T,m]
    # [B,T,m] x [B,T,m,d] -> [B,T,d]
    r = jnp.einsum("btm,btmd->btd", a, found)
    gate = jax.nn.sigmoid(
        # [B,T,E+d] [E+d,E]
        jnp.concatenate([hn, r], -1) @ w["Wg"] + w["bg"][None, None])
    # [B,T,d] [d,E]
    out = h + (gate * (r @ w["Wo"])).astype(h.dtype)
    return Reading(out, r, a, gate)


class CMR(nn.Module):
    """Contextual Memory Reweaving (Dillon et al., 2025) arXiv:2502.02046: an instance.

    features E; layers m: how many layers are captured; entries M of each; width d of
    reading, None for E/4. The model hands states over, `LM(memory=CMR(...))`: `capture`
    after a segment, with the states of the captured layers, and the call before the
    layer that reads. What is captured of a segment can be read from the next one on.
    segment: tokens of one; captured: the layers whose outputs are captured, None for m
    at even depths; reading: the layer that reads, None for the middle one. decay: how
    fast entries grow old, where its learned value begins; through: whether gradients
    reach the segment that captured.
    """

    features: int = 128
    layers: int = 3
    entries: int = 64
    width: int | None = None
    decay: float = 0.01
    through: bool = False
    segment: int = 64
    captured: tuple[int, ...] | None = None
    reading: int | None = None

    def setup(self):
        self._check()
        e, m = self.features, self.layers
        d = self.width or max(e // 4, 1)
        one, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        many, constant = nn.initializers.lecun_normal(batch_axis=0), (
            nn.initializers.constant)
        forms: dict[str, tuple[Any, ...]] = {
            "Wq": (one, e, d), "Wk": (many, m, e, d), "Wv": (many, m, e, d),
            "Wl": (one, e, m), "Wo": (zeros, d, e), "Wg": (one, e + d, e),
            "bg": (constant(-2.0), e),
        }
        self.w = {name: self.param(name, init, tuple(shape), jnp.float32)
                  for name, (init, *shape) in forms.items()}
        self.w_rho = self.param("w_rho", zeros, (e,), jnp.float32)
        self.b_rho = self.param("b_rho", zeros, (), jnp.float32)
        # softplus of it is the decay
        start = self.decay + math.log(-math.expm1(-self.decay))
        self.rate = self.param("rate", constant(start), (), jnp.float32)
        self.decode = self.param("decode", one, (d, e), jnp.float32)

    def _check(self) -> None:
        names = ("features", "layers", "entries", "width", "segment")
        check_fields(self, least=dict.fromkeys(names, 1), above={"decay": 0})

    def places(self, depth: int) -> tuple[tuple[int, ...], int]:
        """(layers whose outputs are captured, layer that reads) of a network of so many
        layers. ValueError for numbers that it does not have."""
        self._check()
        m = self.layers
        if self.captured is not None and not (isinstance(self.captured, tuple) and all(
                type(n) is int for n in self.captured)):
            raise ValueError(f"CMR: captured={self.captured!r}: expected a tuple of "
                             "whole numbers, or None")
        own = tuple(max(round(depth * (n + 1) / (m + 1)) - 1, 0) for n in range(m))
        own = own if self.captured is None else self.captured
        at = depth // 2 if self.reading is None else self.reading
        if len(own) != m or not all(0 <= n < depth for n in (*own, at)):
            raise ValueError(
                f"CMR: captured={self.captured}, reading={self.reading}: expected "
                f"layers={m} numbers and one, below {depth}, the layers of the network"
            )
        return own, at

    def init_state(self, x: Any) -> Buffer:
        """Empty buffers for tokens like x [B,T,E]. Needs no parameters."""
        shape = (x.shape[0], self.layers, self.entries)
        return Buffer(jnp.zeros((*shape, x.shape[2]), x.dtype),
                      jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))

    def __call__(self, h, buffer: Buffer, pos) -> jax.Array:
        """Tokens h [B,T,E] at pos [B,T], with what they find in the buffer: [B,T,E]."""
        want = (h.shape[0], self.layers, self.entries, self.features)
        if buffer.states.shape != want or h.shape[2] != self.features:
            raise ValueError(
                f"the buffer holds states {buffer.states.shape} for tokens {h.shape}: "
                f"expected {want}"
            )
        # with today's gate: it is trained by the segment that reads
        rho = self.relevance(buffer.states)
        return read(h, buffer, rho, pos, self.w, jax.nn.softplus(self.rate)).out

    def capture(self, buffer: Buffer, states, pos, segments=None) -> Buffer:
        """The buffer after a segment: of what it holds and the new states [B,m,T,E] at
        pos [B,T] the `entries` with the greatest log rho - decay age. segments [B,T]: 0
        is padding, which is not captured. Choosing has no gradient."""
        rho = self.relevance(states)  # [B,m,T]
        new = jnp.broadcast_to(pos[:, None], rho.shape)
        if segments is not None:
            new = jnp.where((segments > 0)[:, None], new, -1)
        if not self.through:
            states = jax.lax.stop_gradient(states)
        states, at, rho = (jnp.concatenate([a, c.astype(a.dtype)], 2) for a, c in zip(
            buffer, (states, new, jax.lax.stop_gradient(rho))))
        # from the newest entry of the layer [B,m,M+T]
        age = (at.max(2, keepdims=True) - at).astype(jnp.float32)
        score = jnp.log(jnp.maximum(rho, LEAST)) - jax.nn.softplus(self.rate) * age
        score = jax.lax.stop_gradient(jnp.where(at >= 0, score, -jnp.inf))
        best = jnp.sort(jax.lax.top_k(score, self.entries)[1], axis=2)  # in order
        return Buffer(
            jnp.take_along_axis(states, best[..., None], 2),
            jnp.take_along_axis(at, best, 2), jnp.take_along_axis(rho, best, 2))

    def relevance(self, states) -> jax.Array:
        """rho [...] in (0, 1) of states [...,E]."""
        # [...,E] [E]
        return jax.nn.sigmoid(normed(states) @ self.w_rho + self.b_rho)

    def reconstruction_loss(self, buffer: Buffer) -> jax.Array:
        """mean |norm(s) - decode(k)|^2 over entries: how much of a state its key tells.
        Its weight is 0.1."""
        own = jax.lax.stop_gradient(normed(buffer.states))
        # [B,m,M,E] x [m,E,d] -> [B,m,M,d], and by `decode` [d,E] back to [B,m,M,E]
        k = jnp.einsum("bmje,med->bmjd", own, self.w["Wk"])
        gap = ((own - k @ self.decode) ** 2).mean(-1)
        there = buffer.pos >= 0
        return jnp.where(there, gap, 0).sum() / jnp.maximum(there.sum(), 1)
