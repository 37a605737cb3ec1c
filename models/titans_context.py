"""Titans (Behrouz et al., 2024) arXiv:2501.00663: memory as a context, MAC.

Attention never looks behind its segment of the text but through the memory: what that
says to the segment's tokens stands in front of them, as a context. What attention makes
of both is then written. No code was published, and of the paper notes were read; where
this is not the paper the docstring of `MAC` says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.segments import locate
from attn.layers import Layer
from attn.masks import Full
from attn.positions import RoPE
from attn.softmax import Softmax
from models.feed import INIT
from models.stack import unbound
from models.titans import TitansLayer


class MACState(NamedTuple):
    """memory: that of the tokens before; begun: what it was when the present segment of
    C tokens began; told, own [B,2,C,H,D]: keys and values of what memory said to that
    segment's tokens and of these, as far as they are there; end, sequence [B] int32:
    the next token's position, and the last one's sequence, -1 before the first."""

    memory: Any
    begun: Any
    told: jax.Array
    own: jax.Array
    end: jax.Array
    sequence: jax.Array


class MAC(TitansLayer):
    """Memory as a context. Of each segment of `segment` tokens: h = M(q), what the
    memory of the segments before answers; y, attention of the segment to [P | h |
    segment]; M is written with y; o = norm(y) * sigmoid(norm(M(y))).

    The paper lets all of h be seen by all of the segment, and reads M when all of y is
    written: there a token sees later ones of its segment. Here (proposed) h_j is seen
    from token j on, and each y_t is answered by M as it is after t. Attention is
    rotated by the place within the segment.

    A text alone in its row is read a segment at a time. In a stream, and in rows of
    several sequences or with padding, whose segments begin anywhere, tokens come one
    after the other, which takes longer; every sequence has its own segments and memory.
    """

    segment: int = 32

    @nn.compact
    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]; with a state: the next tokens -> (state, [B,T,E]).
        segments [B,T]: the sequence of each token, 0 is padding."""
        self.refuse(context, pos)
        p = self.param("persistent_tokens", nn.initializers.normal(1.0),
                       (self.persistent, x.shape[2]), jnp.float32)
        if state is None and segments is None:
            return self._by_segment(x, p)
        clock = (None, None) if state is None else (state.end, state.sequence)
        now = locate(segments, *x.shape[:2], *clock)
        first = self.init_state(x.shape[1], x) if state is None else state
        if segments is None:  # the same sequence goes on
            segments = jnp.broadcast_to(now.last_segment[:, None], x.shape[:2])
        # [B,T,...] -> [T,B,1,...]
        one = jax.tree.map(
            lambda a: a.swapaxes(0, 1)[:, :, None],
            (x, segments.astype(jnp.int32), now.pos, now.segment > 0))
        after, o = self._over(self.segment)(first, (*one, self._each(p, x.shape[1])))
        o = o[:, :, 0].swapaxes(0, 1)
        if state is None:
            return o
        return after._replace(end=now.next_pos, sequence=now.last_segment), o

    def _by_segment(self, x, p):
        """A text alone in its row, a segment at a time."""
        (b, t, e), c = x.shape, min(self.segment, x.shape[1])
        real = jnp.broadcast_to(jnp.arange(t + -t % c)[None] < t, (b, t + -t % c))

        def cut(a):
            """[B,T,...] -> [N,B,C,...]"""
            a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % c)] + [(0, 0)] * (a.ndim - 2))
            return a.reshape(b, -1, c, *a.shape[2:]).swapaxes(0, 1)

        begin = self.memory.init_state(t, *self._arrays(b, c, e), x=x)
        p = self._each(p, real.shape[1] // c)
        _, o = self._over(0)(begin, (cut(x), cut(real.astype(jnp.int32)), p))
        return o.swapaxes(0, 1).reshape(b, -1, e)[:, :t]

    def _over(self, segment: int) -> Any:
        """The scan over segments or, with their length, over tokens."""
        over = nn.scan(
            _Segment, variable_broadcast="params", split_rngs={"params": False})
        return over(unbound(self.memory), self.heads, self.dtype, segment,
                    name="segments")

    def _each(self, p, n: int):
        """P [1,n,E] for each of n steps."""
        return jnp.broadcast_to(p[None, None], (n, 1, *p.shape))

    def _arrays(self, b: int, t: int, e: int) -> tuple:
        """Shapes of q, k and v."""
        shape = b, t, self.heads, e // self.heads
        return (jax.ShapeDtypeStruct(shape, self.dtype),) * 3

    def init_state(self, size: int, x: Any) -> Any:
        """A `MACState` for `size` tokens; x [B,T,E] gives shapes and dtype only."""
        (b, _, e), c, h = x.shape, self.segment, self.heads
        memory = self.memory.init_state(size, *self._arrays(b, c, e), x=x)
        room = jnp.zeros((b, 2, c, h, e // h), self.dtype)
        return MACState(memory, memory.memory, room, room, jnp.zeros((b,), jnp.int32),
                        jnp.full((b,), -1, jnp.int32))


class _Segment(Layer):
    """One segment of `MAC`: (the memory's state, (x [B,C,E], ids [B,C], P [1,n,E])) ->
    the next state, o [B,C,E]. With the length `segment` one token: (`MACState`,
    (x [B,1,E], ids, pos and whether it is none of padding [B,1], P)) -> the same."""

    attention: Any
    heads: int
    dtype: Any = jnp.float32
    segment: int = 0
    parameter_axes = {
        "ask/kernel": "EHD", "key/kernel": "EHD", "value/kernel": "EHD",
        "told/kernel": "HDE", "answer/kernel": "HDE",
    }

    @nn.compact
    def __call__(self, state, inputs):  # type: ignore[override]
        (x, ids, *where, p), e = inputs, inputs[0].shape[2]
        d = e // self.heads
        split = {n: nn.DenseGeneral(
            (self.heads, d), use_bias=False, dtype=self.dtype, kernel_init=INIT, name=n
        ) for n in ("q", "k", "v", "ask", "key", "value")}  # [B,.,E] [E,H,D]
        join = {n: nn.DenseGeneral(
            e, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=INIT, name=n
        ) for n in ("told", "out", "answer")}  # [B,.,H,D] [H,D,E]
        meet: Any = self._token if self.segment else self._whole
        state, memory, y = meet(state, x, *where, p, split, join)
        after, m = self.attention.step(
            memory, *(split[name](y) for name in ("ask", "key", "value")), x=y,
            segments=ids)
        m = nn.RMSNorm(dtype=self.dtype, name="long_norm")(join["answer"](m))
        y = nn.RMSNorm(dtype=self.dtype, name="short_norm")(y)
        after = state._replace(memory=after) if self.segment else after
        return after, y * nn.sigmoid(m)

    def _whole(self, state, x, p, split, join):
        """The state, the memory's, and y [B,C,E] of a segment."""
        b, c, e = x.shape
        told = join["told"](self.attention.recall(
            state, split["ask"](x), e // self.heads))  # h
        rows = jnp.concatenate([jnp.broadcast_to(p, (b, *p.shape[1:])), told, x], 1)
        at, n = 1 + jnp.arange(c, dtype=jnp.int32), p.shape[1]
        pos = jnp.concatenate([jnp.zeros((n,), jnp.int32), at, at])[None]
        q, k, v = split["q"](x), split["k"](rows), split["v"](rows)
        q, k = RoPE().rotate(q, at[None]), RoPE().rotate(k, pos)
        past = jnp.tril(jnp.ones((c, c), bool))
        seen = jnp.concatenate([jnp.ones((c, n), bool), past, past], 1)[None, None]
        return state, state, join["out"](Softmax(mask=Full())(q, k, v, mask=seen))

    def _token(self, state: MACState, x, pos, real, p, split, join):
        """The same of a token [B,1,E], at whose segment's beginning the memory is put
        aside."""
        (b, _, e), c = x.shape, self.segment
        place = pos % c  # [B,1]

        def choose(where, a, other):
            return jax.tree.map(lambda u, v: jnp.where(
                where.reshape(b, *(1,) * (v.ndim - 1)), u, v), a, other)

        begun = choose(real & (place == 0), state.memory.memory, state.begun)
        # differences from an empty memory are 0
        begun = choose(
            real & (pos == 0), jax.tree.map(jnp.zeros_like, begun), begun)
        told = join["told"](self.attention.recall(
            state.memory._replace(memory=begun), split["ask"](x), e // self.heads))
        here = (jnp.arange(c)[None] == place) & real  # [B,C]

        def kept(room, row):
            """room [B,2,C,H,D] with key and value of a row [B,1,E] at its place."""
            k, v = RoPE().rotate(split["k"](row), 1 + place), split["v"](row)
            return jnp.where(here[:, None, :, None, None],
                             jnp.stack([k, v], 1).astype(room.dtype), room)

        state = state._replace(
            begun=begun, told=kept(state.told, told), own=kept(state.own, x))
        first = jnp.stack([split["k"](p), split["v"](p)], 1)  # not rotated: place 0
        first = jnp.broadcast_to(first, (b, *first.shape[1:])).astype(state.own.dtype)
        rows = jnp.concatenate([first, state.told, state.own], 2)  # [B,2,n+2C,H,D]
        past = jnp.arange(c)[None] <= place
        seen = jnp.concatenate([jnp.ones((b, p.shape[1]), bool), past, past], 1)
        q = RoPE().rotate(split["q"](x), 1 + place)
        y = Softmax(mask=Full())(q, rows[:, 0], rows[:, 1], mask=seen[:, None, None])
        return state, state.memory, join["out"](y)
