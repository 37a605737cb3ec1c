"""Performer (Choromanski et al., 2020) arXiv:2009.14794: softmax by random features.

exp(q.k D^-1/2) is the mean, over normal w, of exp(w.q' - |q'|^2/2) exp(w.k' - |k'|^2/2)
with x' = x D^-1/4. A few w make positive features whose sums over keys come first:

    phi_j(x) = m^-1/2 exp(w_j.x' - |x'|^2/2),    o_t = phi(q_t).(sum_s phi(k_s)^T v_s)
                                                       / phi(q_t).sum_s phi(k_s)

Exponentials of any size are safe here, in causal order too, as every feature is
measured from its own sum over the keys so far. With z_tj = log sum_(s<=t) phi_j(k_s),

    o_t = sum_j p_tj sum_(s<=t) exp(log phi_j(k_s) - z_tj) v_s,
    p_t = softmax_j(w_j.q'_t + z_tj)

which is the same quotient: a state of m means and their masses a head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.exact.dense import logsumexp, weights
from attn.parallel.sharding import Axis, gather, mesh_of, over_mesh, splits
from attn.recurrent.causal import linear_attention, linear_attention_step
from attn.recurrent.factors import beside_one
from attn.recurrent.linear import LinearState, recurrence
from attn.recurrent.noncausal import by_segment, noncausal_attention
from attn.recurrent.time_softmax import LOW, largest, nothing, running, shares
from attn.sparse import favor


class PerformerState(NamedTuple):
    """memory [B,H,m,V] float32, of each feature the mean of the values; top and total
    [B,H,m] float32: the largest log phi(k), and the sum of exp(log phi(k) - top); end
    [B] int32 the next token's position; segment [B] int32 the last token's segment, -1
    before the first."""

    memory: jax.Array
    top: jax.Array
    total: jax.Array
    end: jax.Array
    segment: jax.Array


class Performer(favor.Directions, nn.Module, Attention):
    """Performer (Choromanski et al., 2020) arXiv:2009.14794: positive random features.

    features: m. The directions w [K,m,D], of each key head its own, orthogonal in
    groups of D, are a variable of the layer, `fixed/directions`, made of `seed`;
    `redrawn` gives those of a later time. A call with a `key` draws independent normal
    ones instead, as the benchmark CAB does in training. causal=False drops the order,
    for self and cross attention. Two fields are of the form of that benchmark's code
    without an order, whose result depends on the length of the row: eps (1e-4) is added
    to features after these were divided by the greatest of all keys, and least (0.1)
    bounds the denominator from below; with 0 the quotient is exact. In causal order
    such a form would depend on later tokens, and is refused. chunk: tokens of a block;
    it changes the time, not the result.
    """

    features: int = 16
    causal: bool = True
    eps: float = 0.0
    least: float = 0.0
    seed: int = 0
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    noise = ("features",)
    row = TemplateRow(FACTORS, "L m D", 1)
    parameter_axes = {"directions": "HRD"}

    def __post_init__(self):
        check_fields(self, least={"features": 1, "eps": 0, "least": 0})
        if self.causal and (self.eps or self.least):
            raise ValueError(
                f"Performer: eps={self.eps}, least={self.least}: expected 0 in causal "
                "order, where no token knows the greatest feature of all"
            )
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None, key=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]; key:
        a PRNG key for directions of this call alone."""
        check(q, k, v, segments=segments, aligned=self.causal)
        w, heads = self._drawn(k, key), q.shape[2]
        if not self.causal:
            return self._noncausal(q, k, v, w, segments).astype(v.dtype)
        asked, stored, values = _logs(q, k, v, w)
        segment, _ = segment_indices(segments, q)
        begun = nothing((q.shape[0], heads, self.features))
        found = shares(
            stored, segment, begun, chunk=self.chunk, axis=self.axis, ends=False)
        o = linear_attention(
            # p_t = softmax_j(w_j.q'_t + z_tj), exp(log phi_j(k_t) - z_tj): [B,T,H,m]
            nn.softmax(asked + found.z), found.share, values, found.log_decay,
            segments=segments, **self._how(q))
        return o.astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> PerformerState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        self.check_stream()
        b, _, h, _ = q.shape
        clock = jnp.zeros((b,), jnp.int32)
        memory = jnp.zeros((b, h, self.features, v.shape[-1]), jnp.float32)
        return PerformerState(
            memory, *nothing((b, h, self.features)), clock, clock - 1)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        b, t = q.shape[:2]
        asked, stored, values = _logs(q, k, v, self._drawn(k, None))
        now = locate(segments, b, t, state.end, state.segment)
        found = shares(
            stored, None if segments is None else now.segment,
            (state.top, state.total), chunk=self.chunk, axis=splits(self.axis, t))
        held = LinearState(state.memory, state.end, state.segment)
        held, o = linear_attention_step(
            held, nn.softmax(asked + found.z), found.share, values, found.log_decay,
            segments=segments, **self._how(q))
        state = PerformerState(
            held.memory, found.top, found.total, held.end, held.segment)
        return state, o.astype(v.dtype)

    def _features(self, d: int) -> int:
        return self.features

    @nn.compact
    def _drawn(self, k, key) -> jax.Array:
        """The directions [K,m,D]."""
        heads, d = k.shape[2:]
        if key is None or self.is_initializing():
            return self._directions(d, heads)
        return jax.random.normal(key, (heads, self.features, d), jnp.float32)

    def _noncausal(self, q, k, v, w, segments) -> jax.Array:
        if self.eps or self.least:
            xla = functools.partial(self._as_code, q, k, v, w, segments)
        elif segments is None:
            xla = functools.partial(self._whole, *_logs(q, k, v, w))
        else:
            where = segment_indices(segments, q, ordered=False)
            letters = "BTHD BSHD BSHV BT BS -> BTHV"
            f = over_mesh(self._by_segment, letters, self.axis)
            xla = functools.partial(f, *_logs(q, k, v, w), *where)
        return pick(self.implementation, xla=xla)

    def _whole(self, asked, stored, v) -> jax.Array:
        """Every query sees every key: one sum of each feature a row [B,1,H,m]."""
        if self.axis is not None:
            mesh_of(self.axis)  # raises without a mesh
        stored = jnp.moveaxis(stored, 1, -1)  # [B,H,m,S]: a softmax over keys
        z = logsumexp(stored)[:, None]  # [B,1,H,m]
        share = jnp.moveaxis(weights(stored), -1, 1)  # [B,S,H,m]
        return noncausal_attention(nn.softmax(asked + z), share, v, axis=self.axis)

    def _by_segment(self, asked, stored, v, q_segment, kv_segment) -> jax.Array:
        """The sums of each query's own segment: keys stand in front of the queries of
        their segment, in causal order. A query is a key that weighs nothing."""
        stored, v, kv_segment = (gather(a, self.axis) for a in (stored, v, kv_segment))
        # a last channel of 1 tells keys from queries, where `by_segment` fills in 0
        stored = jnp.concatenate([stored, jnp.ones_like(stored[..., :1])], -1)

        def read(asked, stored, v, segment):
            keys = jnp.where(stored[..., -1:] > 0, stored[..., :-1], LOW)
            begun = nothing((keys.shape[0], *keys.shape[2:]))
            share, log_decay, z, _, _ = running(
                None, self.chunk, -jnp.inf, False, keys, segment, *begun)
            return recurrence(
                nn.softmax(asked + z), share, v, log_decay, segment=segment,
                chunk=self.chunk)[1]

        return by_segment(read, asked, stored, v, q_segment, kv_segment)

    def _as_code(self, q, k, v, w, segments) -> jax.Array:
        """The quotient of the authors' code, whose denominator is at least `least`."""
        q, k = self._code_features(q, k, w, segments)
        return self._code_quotient(q, k, v, segments)

    def _code_features(self, q, k, w, segments) -> tuple[jax.Array, jax.Array]:
        """m^-1/2 (exp(w.x' - |x'|^2/2 - top) + eps): top is the greatest w.x' of the
        query, or of all keys of the segment."""
        copies = q.shape[2] // k.shape[2]
        (s_q, half_q), (s_k, half_k) = (
            favor.projected(a, n) for a, n in ((q, jnp.repeat(w, copies, 0)), (k, w)))
        # beside eps it does not cancel, and so has a gradient
        top = s_k.max(-1, keepdims=True)
        if segments is None:
            top = top.max(1, keepdims=True)
        else:
            of = segments[1] if isinstance(segments, tuple) else segments
            top = largest(top, locate(of, *k.shape[:2]).segment)
        top_q = s_q.max(-1, keepdims=True)
        # m^-1/2 is a factor of eps too, as in the benchmark's code
        factor = self.features**-0.5
        return (factor * (jnp.exp(s_q - half_q - top_q) + self.eps),
                factor * (jnp.exp(s_k - half_k - top) + self.eps))

    def _code_quotient(self, q, k, v, segments) -> jax.Array:
        """Sums of values over sums of weights, of features."""
        # [B,T,H,V+1], in the last channel the sum of weights
        o = noncausal_attention(
            q, k, beside_one(v), segments=segments, axis=self.axis)
        total = jnp.maximum(o[..., -1:], self.least)
        return o[..., :-1] / jnp.where(total > 0, total, 1)


def _logs(q, k, v, w) -> tuple[jax.Array, jax.Array, jax.Array]:
    """w.q' [B,T,H,m], which is log phi(q) but for what a query's features share, log
    phi(k) [B,S,H,m] without m^-1/2, which cancels, and v [B,S,H,V], float32."""
    copies = q.shape[2] // k.shape[2]
    # directions are of key heads: [K,m,D] -> [H,m,D]
    asked, _ = favor.projected(q, jnp.repeat(w, copies, 0))
    s, half = favor.projected(k, w)
    stored, v = (jnp.repeat(a, copies, 2) for a in (s - half, v.astype(jnp.float32)))
    return asked, stored, v
