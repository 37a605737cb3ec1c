"""Flow (Wu et al., 2022) arXiv:2202.06258: attention as a flow that is conserved.

Keys are sources and queries are sinks of a flow of information through the capacities
phi(q).phi(k). If every sink may only take in one unit, sources have to compete for it;
if every source may only give out one, sinks have to share it. Both are sums of a linear
attention with numbers instead of values, so the softmax over sources and the gate of
sinks that they give cost no more than the attention itself.

    I_t = phi(q_t).sum_s phi(k_s)              O_s = phi(k_s).sum_t phi(q_t)
    I'_t = phi(q_t).sum_s phi(k_s) / O_s       O'_s = phi(k_s).sum_t phi(q_t) / I_t
    o_t = sigmoid(I'_t T/S) phi(q_t)/I_t sum_s phi(k_s)^T v_s c_s,
    c = S softmax(O')

with phi = sigmoid and a small number added to both factors of the first four. In causal
order every sum ends at the token's own time and is a mean over the n tokens until then;
c_s is fixed when s comes and is not shared out anew later.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh, splits
from attn.recurrent.linear import recurrence
from attn.recurrent.noncausal import noncausal

FEATURES = ("sigmoid", "relu")


class FlowState(NamedTuple):
    """Sums over the tokens so far, float32: keys, queries, sources, sinks [B,H,D,1] of
    phi(k), phi(q), phi(k)/O and phi(q)/I; total [B,H,1,1] of exp(O'); memory
    [B,H,D,V]. end [B] int32 the next token's position; segment [B] int32 the last
    token's segment, -1 before the first."""

    keys: jax.Array
    queries: jax.Array
    sources: jax.Array
    sinks: jax.Array
    total: jax.Array
    memory: jax.Array
    end: jax.Array
    segment: jax.Array


Sums = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Flow(Attention):
    """Flow (Wu et al., 2022) arXiv:2202.06258: linear attention with competition.

    causal=False is the paper's normal form, for self and cross attention. clamp: O' is
    held within it before the exponential; the authors' code has 1, and 5 and 10 for
    language and reinforcement learning (at most 80). compete=False sets c to 1 and
    allocate=False the gate of sinks: without both it is plain linear attention.
    feature: "sigmoid", or "relu" as in their code for the Long Range Arena. chunk:
    tokens of a block; it changes the time, not the result. Padding and packed segments
    are proposed here: sums, T, S and n count the real tokens of a segment. With K < H
    keys are repeated, so that every query head has flows of its own.
    """

    causal: bool = True
    compete: bool = True
    allocate: bool = True
    clamp: float = 1.0
    feature: str = "sigmoid"
    eps: float = 1e-6
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    mixes = True  # in both forms sums over queries are what keys compete by
    row = TemplateRow(FACTORS, "L m D", 1)

    def __post_init__(self):
        check_fields(self, above={"eps": 0}, choices={"feature": FEATURES})
        if not 0 < self.clamp <= 80:
            raise ValueError(f"Flow: clamp={self.clamp}: expected 0 < clamp <= 80")

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        b, t, h, _ = q.shape
        # query heads have flows of their own, and so do their keys
        k, v = (jnp.repeat(a, h // a.shape[2], 2) for a in (k, v))
        if self.causal:
            more = locate(segments, b, t).pos, segment_indices(segments, q)[0]

            def causal(*arrays):
                return self._causal(self.axis, *arrays)[1]

            f = over_mesh(causal, "BTHD BTHD BTHV BT BT -> BTHV", self.axis)
            return f(q, k, v, *more).astype(v.dtype)
        f = over_mesh(self._normal, "BTHD BSHD BSHV BT BS -> BTHV", self.axis)
        indices = segment_indices(segments, q, ordered=False)
        xla = functools.partial(f, q, k, v, *indices)
        return pick(self.implementation, xla=xla).astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> FlowState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        self.check_stream()
        named = zip(FlowState._fields, self._shapes(q, v))
        zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in named}
        b = q.shape[0]
        return FlowState(
            **zeros, end=jnp.zeros((b,), jnp.int32),
            segment=jnp.full((b,), -1, jnp.int32),
        )

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        b, t, h, _ = q.shape
        k, v = (jnp.repeat(a, h // a.shape[2], 2) for a in (k, v))
        now = locate(segments, b, t, state.end, state.segment)
        segment = None if segments is None else now.segment
        axis = splits(self.axis, t)
        f = over_mesh(
            functools.partial(self._causal, axis),
            "BTHD BTHD BTHV BT BT BHDV -> BHDV BTHV", axis)
        after, o = f(q, k, v, now.pos, segment, state[:6])
        named = dict(zip(FlowState._fields, after))
        after = FlowState(**named, end=now.next_pos, segment=now.last_segment)
        return after, o.astype(v.dtype)

    def _shapes(self, q, v) -> tuple:
        b, _, h, d = q.shape
        vectors = ((b, h, d, 1),) * 4  # keys, queries, sources, sinks
        return (*vectors, (b, h, 1, 1), (b, h, d, v.shape[-1]))

    def _phi(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.feature == "sigmoid":
            return jax.nn.sigmoid(x)
        return jax.nn.relu(x) + 1e-6  # above 0: flows are divided by

    def _causal(self, axis, q, k, v, pos, segment, state=None) -> tuple:
        """The sums after all tokens, if there were some before, and o [B,T,H,V]."""
        held = dict(zip(FlowState._fields, state)) if state else {}
        after: dict[str, jax.Array] = {}

        def sums(names, a, b, w):
            # sums that do not need each other are heads of one
            before = [held[name] for name in names if state]
            now, o = recurrence(
                a, b, w, state=jnp.concatenate(before, 1) if state else None,
                segment=segment, chunk=self.chunk, axis=axis,
                implementation=self.implementation,
            )
            if now is not None:
                # [B,n H,.,.] -> n of [B,H,.,.]
                after.update(zip(names, jnp.split(now, len(names), 1)))
            return o

        o = self._ordered(sums, q, k, v, pos)
        return tuple(after[name] for name in held), o

    def gains(self, q, k) -> tuple[jax.Array, jax.Array]:
        """Of the causal form: what the sum of a sink is multiplied with [B,T,H,1], and
        c [B,T,H,1], so that o_t = gain_t phi(q_t) sum_(s<=t) phi(k_s)^T v_s c_s. q and
        k [B,T,H,D]."""
        def sums(_, a, b, w):
            return recurrence(a, b, w, chunk=self.chunk)[1]

        pos = jnp.arange(q.shape[1])[None]
        return self._gains(sums, self._phi(q), self._phi(k), pos)

    def _ordered(self, sums: Sums, q, k, v, pos) -> jax.Array:
        """o [B,T,H,V] float32; sums(names, a, b, w) is sum_(s<=t) (a_t.b_s) w_s, for
        the heads of each name."""
        sink, source = self._phi(q), self._phi(k)
        gain, share = self._gains(sums, sink, source, pos)
        # o_t = gain_t phi(q_t) sum_(s<=t) phi(k_s)^T v_s c_s: [D] [D,V]
        return gain * sums(("memory",), sink, source, v.astype(jnp.float32) * share)

    def _gains(self, sums: Sums, sink, source, pos) -> tuple[jax.Array, jax.Array]:
        n = (pos + 1).astype(jnp.float32)[..., None, None]  # tokens so far [B|1,T,1,1]
        ones = jnp.ones_like(sink[..., :1])

        def both(a, b):
            return jnp.concatenate([a, b], 2)  # sums of two kinds are heads of one

        def flow(names, w):
            # [B,T,2H,D]: queries meet the sums of keys, and keys those of queries
            found = self._flow(sums)(names, both(sink, source), both(source, sink), w)
            return jnp.split(found / n, 2, 2)

        # I and O, then I' and O' [B,T,H,1]
        incoming, outgoing = flow(("keys", "queries"), both(ones, ones))
        taken, given = flow(("sources", "sinks"), both(1 / outgoing, 1 / incoming))
        weight = jnp.exp(self._clamped(given))  # exp(O')
        # c_s = n exp(O'_s) / sum_(i<=s) exp(O'_i)
        share = weight * n / _nonzero(sums(("total",), ones, ones, weight))
        # sigmoid(I') / (n I), where n I is the sum and not the mean
        gain = self._allocated(1 / (incoming * n), taken)
        return gain, share if self.compete else jnp.ones_like(share)

    def shares(self, q, k) -> jax.Array:
        """c [B,S,H] of the normal form, for q [B,T,H,D] and k [B,S,H,D]: 1 for a source
        that has its equal share."""
        return self._flows(self._phi(q), self._phi(k), None, None)[2][..., 0]

    def _normal(self, q, k, v, q_segment, kv_segment) -> jax.Array:
        """o [B,T,H,V] float32, every sum over all tokens of the segment."""
        sink, source = self._phi(q), self._phi(k)
        incoming, taken, share = self._flows(sink, source, q_segment, kv_segment)
        v = v.astype(jnp.float32)
        o = noncausal(
            sink, source, v * share if self.compete else v, q_segment=q_segment,
            kv_segment=kv_segment, axis=self.axis,
        )
        return self._allocated(o, taken) / incoming

    def _flows(self, sink, source, q_segment, kv_segment) -> tuple[jax.Array, ...]:
        """Of the normal form: I [B,T,H,1], I' T/S [B,T,H,1] and c [B,S,H,1]."""
        def sums(to, of):
            def found(_, a, b, w):
                return noncausal(a, b, w, q_segment=to, kv_segment=of, axis=self.axis)

            return found

        # sums over keys; over queries
        into, out_of = sums(q_segment, kv_segment), sums(kv_segment, q_segment)
        at_q, at_k = jnp.ones_like(sink[..., :1]), jnp.ones_like(source[..., :1])
        incoming = self._flow(into)("keys", sink, source, at_k)  # I_t
        outgoing = self._flow(out_of)("queries", source, sink, at_q)  # O_s
        taken = self._flow(into)("sources", sink, source, 1 / outgoing)  # I'_t
        given = self._flow(out_of)("sinks", source, sink, 1 / incoming)  # O'_s
        weight = jnp.exp(self._clamped(given))
        # over the keys of each key's segment
        among = functools.partial(sums(kv_segment, kv_segment), "", at_k, at_k)
        share = weight * among(at_k) / _nonzero(among(weight))  # c = S softmax(O')
        # T and S of the segment, as many queries and keys as there are
        queries = sums(q_segment, q_segment)("", at_q, at_q, at_q)
        ratio = queries / _nonzero(into("", at_q, at_k, at_k))
        return incoming, taken * ratio, share

    def _allocated(self, o, flow) -> jax.Array:
        return o * jax.nn.sigmoid(flow) if self.allocate else o

    def _flow(self, sums: Sums) -> Sums:
        """(a + eps).(sum_s b_s w_s + eps), of nonnegative a and b."""
        def flow(name, a, b, w):
            a = a + self.eps
            # (a + eps).eps: what eps beside the sum adds
            return sums(name, a, b, w) + self.eps * a.sum(-1, keepdims=True)

        return flow

    def _clamped(self, flow: jax.Array) -> jax.Array:
        return jnp.clip(flow, -self.clamp, self.clamp)


def _nonzero(a: jax.Array) -> jax.Array:
    return jnp.where(a > 0, a, 1)
