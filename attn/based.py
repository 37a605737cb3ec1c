"""Based (Arora et al., 2024) arXiv:2402.18668: softmax's exponential to second order.

Linear attention recalls badly when its weights are too blunt. Here the weight of a key
is the Taylor expansion of exp to the second order, which a state of fixed size can
still hold: every product of two channels of k becomes a feature of its own.

    w_tj = 1 + s + s^2/2 = phi(q_t).phi(k_j),    s = q_t.k_j / sqrt(D)
    o_t = sum_j w_tj v_j / (sum_j w_tj + eps),    j <= t

w is at least 1/2 whatever s is, so the sum below is never near zero. A column of ones
beside v makes both sums at once. Models mix it with windows of softmax attention,
`Softmax(mask=Causal() & Window(64))`, and with short convolutions, `BaseConv()`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.contract.varying import varying
from attn.parallel.sharding import Axis, gather, over_mesh, splits, spread_heads
from attn.recurrent.chunks import (
    ChunkSegments, filled, from_chunks, only, segments_of, to_chunks
)
from attn.recurrent.factors import beside_one, normalized
from attn.recurrent.lasp import carry_in
from attn.recurrent.linear import LinearState, empty, naive
from attn.recurrent.noncausal import by_segment


def features(x: jax.Array, compact: bool = False) -> jax.Array:
    """phi(x) of x [...,D]: 1, x / D^(1/4), x_a x_b / sqrt(2D) for all a, b in row-major
    order: [..., 1+D+D^2]. `compact` has each pair once, 1+D+D(D+1)/2, and the same
    inner products."""
    d = x.shape[-1]
    if compact:
        a, b = np.triu_indices(d)  # pairs a <= b, row by row
        # (x_a x_b)^2 / 2 stands twice in s^2/2 unless a = b
        weight = jnp.asarray(np.where(a == b, (2 * d) ** -0.5, d**-0.5), x.dtype)
        second = x[..., a] * x[..., b] * weight.reshape((1,) * (x.ndim - 1) + (-1,))
    else:
        second = (x[..., :, None] * x[..., None, :]) * (2 * d) ** -0.5  # [...,D,D]
        second = second.reshape(*x.shape[:-1], d * d)
    # phi(q).phi(k) = 1 + s + s^2/2: D^(-1/4) of each factor makes s
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x * d**-0.25, second], -1)


@dataclasses.dataclass(frozen=True)
class Based(Attention):
    """Based (Arora et al., 2024) arXiv:2402.18668: a Taylor expansion of softmax.

    sum_j w_tj v_j / (sum_j w_tj + eps), w = 1 + s + s^2/2, s = q.k / sqrt(D). It is
    made for narrow q and k, as the D^2/2 features of a wide head are a large memory:
    `feature_dim` names the width D that `MultiHead` projects them to, 16 in the paper;
    None leaves the projections as they are for any other attention. A call takes any D.
    compact: the state holds each product of two channels once. normalize=False leaves
    the division out. causal=False drops the order of tokens, for self and cross
    attention.

    chunk: tokens of a block; it changes the time, not the result.
    """

    feature_dim: int | None = None
    eps: float = 1e-12
    compact: bool = False
    normalize: bool = True
    causal: bool = True
    chunk: int = 128
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(FACTORS, "L m D", 1)

    def __post_init__(self):
        check_fields(self, least={"feature_dim": 1, "eps": 0})

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        q_segment, kv_segment = segment_indices(segments, q, self.causal)
        k, v = (spread_heads(a, q.shape[2], self.axis) for a in (k, v))
        letters = "BTHD BSKD BSKV BT BS -> BTHV"
        o = over_mesh(self._local, letters, self.axis)(q, k, v, q_segment, kv_segment)
        return o.astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> LinearState:
        """An empty memory for `size` tokens [B,H,P,V+1]: sums of phi(k) v, and in the
        last column of phi(k), for P features. q, k, v give shapes."""
        self.check_stream()
        # one column more if sums of weights are held
        return empty(*self._memory(q, v.shape[-1] + self.normalize))

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        segment = None if segments is None else now.segment
        here = dataclasses.replace(self, axis=splits(self.axis, q.shape[1]))
        k, v = (spread_heads(a, q.shape[2], here.axis) for a in (k, v))

        def local(q, k, v, segment, memory):
            return here._recurrence(q, k, here._summed(v), segment, memory)

        letters = "BTHD BTKD BTKV BT BHDV -> BHDV BTHV"
        f = over_mesh(local, letters, here.axis)
        xla = functools.partial(f, q, k, v, segment, state.memory)
        memory, o = pick(self.implementation, xla=xla)
        after = LinearState(memory, now.next_pos, now.last_segment)
        return after, self._divided(o).astype(v.dtype)

    def _memory(self, q, width: int) -> tuple[int, int, int, int]:
        b, _, h, d = q.shape
        # P features: 1, D, and each pair of channels once or twice
        return b, h, 1 + d + (d * (d + 1) // 2 if self.compact else d * d), width

    def _summed(self, v: jax.Array) -> jax.Array:
        """v as float32, with a column of ones behind it for the sum of weights."""
        return beside_one(v) if self.normalize else v.astype(jnp.float32)

    def _divided(self, o: jax.Array) -> jax.Array:
        # each w is at least 1/2: the sum is 0 only where no key is seen
        return normalized(o, self.eps) if self.normalize else o

    def _local(self, q, k, v, q_segment, kv_segment) -> jax.Array:
        def xla():
            summed = self._summed(v)
            if self.causal:
                return self._recurrence(q, k, summed, q_segment)[1]
            if kv_segment is None:
                return self._whole(q, k, summed)
            # keys of all shards: sorting by segment needs the whole row
            keys, values, segments = (gather(
                a, self.axis
            ) for a in (k, summed, kv_segment))
            here = dataclasses.replace(self, axis=None)

            def sums(*arrays):
                return here._recurrence(*arrays)[1]

            return by_segment(sums, q, keys, values, q_segment, segments)

        return self._divided(pick(self.implementation, xla=xla))

    def _map(self, x: jax.Array) -> jax.Array:
        return features(x.astype(jnp.float32), self.compact)

    def _recurrence(self, q, k, v, segment, state=None) -> tuple[Any, jax.Array]:
        """The sums over j <= t -> state [B,H,P,V], o [B,T,H,V]; features are made for a
        chunk at a time. With an axis the state before this shard comes from the mesh,
        and the last one is that after all shards, None if none came in."""
        b, t, h, _ = q.shape
        zeros = jnp.zeros(self._memory(q, v.shape[-1]), jnp.float32)  # [B,H,P,V]
        before = zeros if state is None else state
        if t == 1 and self.axis is None:
            return naive(self._map(q), self._map(k), v, state=before, segment=segment)
        c, copies = min(self.chunk, t), h // k.shape[2]
        row = filled(segment, t, c)
        # [N,B,H,c,D] and [N,B,H,c,V]
        q, k, v = to_chunks(q, c), to_chunks(k, c, h), to_chunks(v, c, h)
        carried: jax.Array | int = 1
        if self.axis is not None:
            # one state serves its query heads
            few_k, few_v = (a[:, :, ::copies] for a in (k, v))
            final, _ = self._scan(
                zeros[:, ::copies], None, few_k, few_v, segments_of(row, c, 0))
            last = None if segment is None else segment.max(1)
            begun = carry_in(final, None, last, self.axis, state=state)
            carried, before = begun.segment, begun.state
            # a state that came in has its query heads already
            before = jnp.repeat(before, h // before.shape[1], 1)
        after, o = self._scan(before, q, k, v, segments_of(row, c, carried))
        return begun.after if self.axis is not None else after, from_chunks(o, t)

    def _scan(self, state, q, k, v, segments: ChunkSegments):
        """The state after all chunks, and o [N,B,H,c,V] unless q is None."""
        alike = segments.keeps is None  # one mask serves all chunks
        shared = jax.tree.map(lambda a: a[0], segments)

        def pass_on(state, chunk):
            q, k, v, own = chunk
            here = shared if alike else own
            o = None if q is None else self._seen(state, q, k, v, here)
            k = only(here.stays, self._map(k))  # [B,H,c,P]
            added = jnp.einsum("bhjp,bhjv->bhpv", k, v)  # [P,c] [c,V]
            return only(here.keeps, state) + added, o

        scanned = None if alike else segments
        # features are made again going back: P channels a token are not to be kept
        chunks = q, k, v, scanned
        state = varying(state, chunks, segments)
        return jax.lax.scan(jax.checkpoint(pass_on), state, chunks)

    def _seen(self, state, q, k, v, here: ChunkSegments) -> jax.Array:
        # inside the chunk the weights are written out, 1 + s + s^2/2 [B,H,c,c]
        s = jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5  # [c,D] [D,c]
        # [c,c] [c,V]
        o = jnp.einsum("bhij,bhjv->bhiv", only(here.seen, 1 + s + s * s / 2), v)
        q = only(here.enters, self._map(q))  # [B,H,c,P]
        return o + jnp.einsum("bhip,bhpv->bhiv", q, state)  # [c,P] [P,V]

    def _whole(self, q, k, v) -> jax.Array:
        """The sums over all keys, for all queries [B,T,H,V]."""
        t, h = q.shape[1:3]
        state = jnp.zeros(self._memory(q, v.shape[-1]), jnp.float32)
        c, full = min(self.chunk, k.shape[1]), ChunkSegments(None, None, None, None)
        state, _ = self._scan(state, None, to_chunks(k, c, h), to_chunks(v, c, h), full)
        # one state of all shards [B,H,P,V], by an all-reduce
        state = state if self.axis is None else jax.lax.psum(state, self.axis)

        def read(q):
            return jnp.einsum("bhip,bhpv->bhiv", self._map(q), state)  # [c,P] [P,V]

        o = jax.lax.map(jax.checkpoint(read), to_chunks(q, min(self.chunk, t)))
        return from_chunks(o, t)
