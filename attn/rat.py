"""RAT (Wei et al., 2025) arXiv:2507.04416: recurrence in chunks, softmax across them.

Neighbours are summed up, distant tokens are looked up. Inside a chunk of L tokens a
gate mixes every new key and value into running ones, channel by channel; a query then
looks at the running state of its own chunk and at what every earlier chunk ended with,
by one softmax. There are L times fewer keys to look at and remember than tokens.

    k'_t = g_t k'_(t-1) + (1 - g_t) k_t,  v' alike,  each chunk begins with 0
    o_t = softmax(D^-0.5 q_t.[k' at ends of earlier chunks, k'_t]) [v' likewise]
    g = sigmoid(x W + b)

q and k' are rotated by the number of their chunk, so a token's own state is at distance
0. L = 1 is attention (of gated keys and values), L >= T a gated recurrence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.contract.attention import LOW, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.exact.attend import attend
from attn.exact.online import OnlineSoftmax, join, output, state_of
from attn.masks import Causal
from attn.parallel.sharding import Axis, over_mesh
from attn.positions import RoPE
from attn.recurrent.lasp import exclusive_prefix
from pallas_kernels.logits import LogitSpec, Where

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class RATState(NamedTuple):
    """What chunks ended with, k [B,C,H,D] rotated and v [B,C,H,V], and their numbers
    pos [B,C,1], -1 if there is none; own_k [B,H,D], own_v [B,H,V] float32: the running
    state of the present chunk; end [B] int32 the next token's position; segment [B]
    int32 the last token's segment, -1 before the first."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    own_k: jax.Array
    own_v: jax.Array
    end: jax.Array
    segment: jax.Array


class RAT(nn.Module, Attention):
    """RAT (Wei et al., 2025) arXiv:2507.04416: recurrence within, attention across.

    chunk: L, tokens of a chunk. rope: turns q and k' by chunk numbers. scale: of q.k',
    by default D^-0.5. out_gate: what it asks of `MultiHead`. Channel n of k and of v
    have one gate (if V is not D, the wider has more). With K < H keys are repeated
    before the recurrence; the authors share q and k between every H/K-th head. Gates
    need the tokens x. Packed segments and padding are proposed here: chunks are counted
    from the beginning of a segment.
    """

    chunk: int = 16
    scale: float | None = None
    rope: RoPE | None = RoPE()
    out_gate: str | None = "sigmoid"
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(LOW, "L^2 D / b", 2)
    weightless = "its gates give each channel weights of its own"
    parameter_axes = {"gate/kernel": "EHD", "gate_bias": "HD"}

    def __post_init__(self):
        check_fields(self)
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V], x [B,T,E] ->
        [B,T,H,V]."""
        k, v = self._checked(q, k, v, segments)
        b, t, h, d = q.shape
        now = locate(segments, b, t)
        segment = None if segments is None else now.segment
        letters = "BTHD BTHD BTHV BTHD BT BT -> BTHV"
        return over_mesh(self._local, letters, self.axis)(
            q, k, v, self.gates(q, v, x), now.pos, segment
        )

    def init_state(self, size, q, k, v, *, x=None) -> RATState:
        """An empty memory for `size` tokens, up to a whole chunk; q, k, v give shapes.
        """
        b, _, h, _ = q.shape

        def like(a):
            return jax.ShapeDtypeStruct((b, 1, h, a.shape[-1]), v.dtype)

        slots = -(-size // self.chunk) if size > 0 else size  # an end for each chunk
        ends = caches.empty(like(k), like(v), slots)
        own = (jnp.zeros((b, h, a.shape[-1]), jnp.float32) for a in (k, v))
        return _state(ends, *own)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        k, v = self._checked(q, k, v, segments)
        b, t = q.shape[:2]
        now = locate(segments, b, t, state.end, state.segment)
        size = state.k.shape[1] * self.chunk
        caches.check_room(now.next_pos, size)
        own = state.own_k, state.own_v
        gates = self.gates(q, v, x)
        own_k, own_v = self._running(k, v, gates, now.pos, now.segment, own)
        last = own_k[:, -1], own_v[:, -1]  # padding hands on what was before it
        ends = self._ends(own_k, own_v, now.pos, now.segment, v.dtype)
        held = Cache(state.k, state.v, state.pos, state.end, state.segment)
        if t == 1:
            # a chunk that ends now is not seen by its own last token
            both, slot_segments = held, jnp.ones(held.k.shape[:2], jnp.int32)
        else:
            places = now._replace(pos=ends.number, segment=ends.segment)
            both, slot_segments = caches.concat(held, ends.k, ends.v, places)
        o = self._read(
            q, own_k, own_v, now.pos, now.segment, both.k, both.v, both.pos[..., 0],
            slot_segments,
        )
        newest = now.segment.max(1, keepdims=True)
        stays = (ends.segment == newest) & (ends.segment > 0)
        # where a sequence began, what is held is of another one
        began = (now.segment > 1).any(1)[:, None, None]
        held = held._replace(pos=jnp.where(began, -1, held.pos))
        after = caches.append(
            held, ends.k, ends.v, now._replace(pos=ends.number, segment=ends.segment),
            jnp.where(stays, ends.number, -1),
        )
        after = after._replace(end=now.next_pos, segment=now.last_segment)
        return _state(after, *last), caches.poison(o, now.next_pos, size)

    def _checked(self, q, k, v, segments):
        """k and v with H heads."""
        check(q, k, v, segments=segments, aligned=True)
        # [B,S,K,.] -> [B,S,H,.]
        return (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))

    @nn.compact
    def gates(self, q, v, x) -> jax.Array:
        """The logits of g [B,T,H,max(D,V)] float32, of tokens x [B,T,E]."""
        if x is None:
            raise ValueError("x is None: RAT makes its gates from the tokens [B,T,E]")

        def slow(key, shape, dtype=jnp.float32):
            # gates that forget within 1 to L-1 tokens (Tallec & Ollivier, 2018)
            least = jax.random.uniform(key, shape, dtype, 1, max(self.chunk - 1, 1))
            return jnp.log(least)

        shape = q.shape[2], max(q.shape[3], v.shape[3])
        dense = nn.DenseGeneral(shape, use_bias=False, kernel_init=_INIT, name="gate")
        bias = self.param("gate_bias", slow, shape, jnp.float32)
        # x W + b: [B,T,E] [E,H,max(D,V)]
        return (dense(x.astype(jnp.float32)) + bias[None, None]).astype(jnp.float32)

    def _local(self, q, k, v, logit, pos, segment) -> jax.Array:
        own_k, own_v = self._running(k, v, logit, pos, segment)
        ends = self._ends(own_k, own_v, pos, segment, v.dtype)
        if self.axis is not None:
            # what is read of all tokens: one in L, keys and values side by side
            where = jnp.stack([ends.number, ends.segment], -1)
            sent = jnp.concatenate([ends.k, ends.v], -1), where
            both, at = (
                jax.lax.all_gather(a, self.axis, axis=1, tiled=True) for a in sent)
            k, v = jnp.split(both, [k.shape[3]], -1)
            ends = Ends(k, v, at[..., 0], at[..., 1])
        segments = None if segment is None else ends.segment
        return self._read(
            q, own_k, own_v, pos, segment, ends.k, ends.v, ends.number, segments)

    def _running(self, k, v, logit, pos, segment, held=None):
        """k' [B,T,H,D], v' [B,T,H,V] float32; held: those of the token in front."""
        # 1 - sigmoid(a) = sigmoid(-a), exact near 1
        keep, add = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
        starts = (pos % self.chunk == 0)[..., None, None]
        keep = jnp.where(starts, 0, keep)  # each chunk begins with 0
        if segment is not None:
            real = (segment > 0)[..., None, None]
            keep, add = jnp.where(real, keep, 1), jnp.where(real, add, 0)
        own = [slice(None, a.shape[-1]) for a in (k, v)]
        # (1 - g_t) k_t, and v_t
        new = [add[..., n] * a.astype(jnp.float32) for n, a in zip(own, (k, v))]

        def follow(a, b):
            # b behind a: g_b (g_a h + x) + y, channel by channel
            after = [b[0][..., n] * x + y for n, x, y in zip(own, a[1:], b[1:])]
            return b[0] * a[0], *after

        # [B,T,H,.]
        decay, *states = jax.lax.associative_scan(follow, (keep, *new), axis=1)
        decays = [decay[..., n] for n in own]
        if self.axis is not None and held is None:
            last = tuple(a[:, -1] for a in (decay, *states))
            held = self._shards_before(follow, last, self.axis)
        if held is not None:
            states = [
                s + d * b[:, None] for s, d, b in zip(states, decays, held)
            ]
        return states

    def _shards_before(self, follow, last, axis: Axis) -> Any:
        """What the shards in front of this one leave, of what each ends with."""
        one = jnp.ones(last[0].shape[:1], jnp.int32)
        decay, *states = last
        # the stretch without tokens
        nothing = jnp.ones_like(decay), *map(jnp.zeros_like, states)
        (_, found), _ = exclusive_prefix(follow, one, last, axis, (one, nothing))
        return found[1:]

    def _ends(self, own_k, own_v, pos, segment, dtype) -> Ends:
        """What the chunks that end among these tokens leave, at most one in L."""
        t = pos.shape[1]
        last = pos % self.chunk == self.chunk - 1
        if segment is not None:
            last = last & (segment > 0)
        # ends first, in order: at most n = ceil(T/L) of them
        order = jnp.argsort(~last, axis=1, stable=True)[:, : -(-t // self.chunk)]

        def take(a):
            at = order.reshape(order.shape + (1,) * (a.ndim - 2))
            return jnp.take_along_axis(a, at, 1)

        there, number = take(last), take(pos) // self.chunk  # [B,n]
        ones = jnp.ones_like(pos) if segment is None else segment
        # rotated by the number of its chunk
        k = self._turned(take(own_k), number).astype(dtype)
        v = take(own_v).astype(dtype)
        segments = jnp.where(there, take(ones), 0)
        return Ends(k, v, jnp.where(there, number, -1), segments)

    def _turned(self, a, number) -> jax.Array:
        return a if self.rope is None else self.rope.rotate(a, number)

    def _read(
        self, q, own_k, own_v, pos, segment, k, v, kv_pos, kv_segment
    ) -> jax.Array:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        number = pos // self.chunk
        far = state_of(*attend(
            self._turned(q, number), k, v, LogitSpec(Causal(), scale),
            # number - 1: the own chunk's end holds later tokens
            Where(number - 1, kv_pos, segment, kv_segment),
            implementation=self.implementation,
        ))
        # the own chunk's running state is one key more: m its logit, l = 1, acc = v'
        logit = scale * (q.astype(jnp.float32) * own_k).sum(-1)  # [B,T,H]
        own = OnlineSoftmax(logit, jnp.ones_like(logit), own_v)
        o = output(join(far, own))
        if segment is not None:
            o = jnp.where((segment > 0)[..., None, None], o, 0)
        return o.astype(q.dtype)


class Ends(NamedTuple):
    """Keys and values [B,n,H,.] at the ends of chunks, and their numbers and segments
    [B,n], -1 and 0 where there are fewer."""

    k: jax.Array
    v: jax.Array
    number: jax.Array
    segment: jax.Array


def _state(cache: Cache, own_k, own_v) -> RATState:
    return RATState(
        cache.k, cache.v, cache.pos, own_k, own_v, cache.end, cache.segment
    )
