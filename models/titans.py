"""Titans (Behrouz et al., 2024) arXiv:2501.00663: a long memory beside a short one.

The short memory is attention to a window or a segment, the long one a network that
learns while it reads (`attn/titans.py`); persistent tokens, learned and the same for
every text, stand before both. Four ways of putting them together are layers here:

- `LMM`: the memory alone.
- `MAL`, as a layer: the memory's output is what a sliding window attends to.
- `MAG`, as a gate: norm(window(x)) * sigmoid(norm(memory(x))).
- `MAC`, as a context: each segment attends to what the memory of all segments before
  it says to its tokens, and to itself; what it makes of that is written.

    LM(attention=(MAG(Titans(), heads=4),) * 2)

No code was published, and of the paper notes were read. Proposed here: sigmoid as the
gate's non-linearity, residuals inside `MAL`, and how `MAC` keeps to the order of tokens
(its docstring).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.fields import check_fields
from attn.contract.segments import locate
from attn.layers import Layer, MultiHead
from attn.masks import Causal, Full, Sink, Window
from attn.positions import RoPE
from attn.recurrent.memory_layer import MemoryAttention
from attn.softmax import Softmax
from models.stack import INIT, unbound


class TitansState(NamedTuple):
    """inner: states of the parts; end, segment [B] int32: the next token's position,
    and the last one's segment, -1 before the first. Persistent tokens are not counted.
    """

    inner: tuple
    end: jax.Array
    segment: jax.Array


class _Layer(Layer):
    """Persistent tokens in front of `mix`, and a stream in which they come once."""

    memory: Any
    heads: int
    persistent: int = 4
    dtype: Any = jnp.float32
    parameter_axes = {"persistent_tokens": "RE"}

    def __post_init__(self):
        sizes = {"heads": 1, "persistent": 0, "window": 0, "segment": 1}
        check_fields(self, least={n: a for n, a in sizes.items() if hasattr(self, n)})
        if not isinstance(self.memory, MemoryAttention):
            raise ValueError(
                f"{type(self).__name__}: memory={self.memory!r}: expected a memory that "
                "learns, as Titans()"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]; with a state: the next tokens -> (state, [B,T,E]).

        segments [B,T]: 0 is padding. Persistent tokens stand before one sequence a row:
        with them, what belongs to a second one is NaN; with persistent=0 rows may be
        packed.
        """
        self._refuse(context, pos)
        clock = (None, None) if state is None else (state.end, state.segment)
        now = locate(segments, x.shape[0], x.shape[1], *clock)
        n = self.persistent
        rows, ids = x, segments
        if n:
            rows, ids = self._prefixed(x, state, segments, now)
        inner, y = self.mix(rows, None if state is None else state.inner, ids)
        y = y[:, n:]
        if n and segments is not None:
            y = jnp.where((now.segment > 1)[..., None], jnp.nan, y)
        if state is None:
            return y
        return TitansState(inner, now.next_pos, now.last_segment), y

    def init_state(self, size: int, x: Any) -> TitansState:
        """An empty memory for `size` tokens; x [B,T,E] gives shapes and dtype only."""
        b = x.shape[0]
        inner = tuple(
            part.init_state(size + self.persistent, x) for part in self.parts().values()
        )
        return TitansState(
            inner, jnp.zeros((b,), jnp.int32), jnp.full((b,), -1, jnp.int32))

    def mix(self, x: Any, states: Any, segments: Any) -> tuple[Any, jax.Array]:
        """The states of the parts, None if there were none, and y [B,n+T,E]."""
        raise NotImplementedError

    def parts(self) -> dict[str, MultiHead]:
        """The layers inside, unbound, by name."""
        memory = MultiHead(
            unbound(self.memory), self.heads, position=None, dtype=self.dtype,
            parent=None,
        )
        return {"long": memory}

    def _refuse(self, context, pos) -> None:
        name = type(self).__name__
        if context is not None or pos is not None:
            raise NotImplementedError(
                f"{name}: a context or positions: it reads its own tokens, in order"
            )

    def _prefixed(self, x, state, segments, now):
        """[P | x] [B,n+T,E], and their ids, 0 for a P that was read before."""
        (b, _, e), n = x.shape, self.persistent
        start = nn.initializers.normal(1.0)
        p = self.param("persistent_tokens", start, (n, e), jnp.float32)
        p = jnp.broadcast_to(p[None].astype(x.dtype), (b, n, e))
        rows = jnp.concatenate([p, x], 1)
        if state is None and segments is None:
            return rows, None
        real = now.segment > 0
        begins = real.any(1, keepdims=True)
        if state is not None:
            begins = begins & (state.end == 0)[:, None]
        ids = jnp.concatenate([jnp.broadcast_to(begins, (b, n)), real], 1)
        return rows, ids.astype(jnp.int32)

    def _part(self, name: str, x, states, segments):
        """One of the parts -> its state and output."""
        parts = self.parts()
        part = parts[name].clone(name=name, parent=self)
        if states is None:
            return None, part(x, segments=segments)
        return part(x, states[list(parts).index(name)], segments=segments)


class LMM(_Layer):
    """The memory alone. memory: an attention over a learned memory, as `Titans()`;
    heads H; persistent: how many tokens stand before every text."""

    def mix(self, x, states, segments):
        """The memory of [P | x]."""
        after, y = self._part("long", x, states, segments)
        return (after,), y


class _Windowed(_Layer):
    """With attention to the `window` tokens before each, and to persistent ones."""

    window: int = 64

    def parts(self) -> dict[str, MultiHead]:
        """The layers inside, unbound, by name."""
        seen: Any = Window(self.window)
        if self.persistent:
            seen = seen | Sink(self.persistent)
        short = MultiHead(
            Softmax(mask=Causal() & seen), self.heads, dtype=self.dtype, parent=None)
        return super().parts() | {"short": short}


class MAG(_Windowed):
    """Memory as a gate: norm(window(x)) * sigmoid(norm(memory(x))), both of [P | x]."""

    def mix(self, x, states, segments):
        """Attention, gated by the memory."""
        first, m = self._part("long", x, states, segments)
        second, y = self._part("short", x, states, segments)
        m = nn.RMSNorm(dtype=self.dtype, name="long_norm")(m)
        y = nn.RMSNorm(dtype=self.dtype, name="short_norm")(y)
        return (first, second), y * nn.sigmoid(m)


class MAL(_Windowed):
    """Memory as a layer: y = memory(x), then y + window(norm(x + y))."""

    def mix(self, x, states, segments):
        """The window over what the memory says."""
        first, m = self._part("long", x, states, segments)
        inner = nn.RMSNorm(dtype=self.dtype, name="short_norm")(x + m)
        second, y = self._part("short", inner, states, segments)
        return (first, second), m + y


class MAC(_Layer):
    """Memory as a context. Of each segment of `segment` tokens: h = M(q), what the
    memory of the segments before answers; y, attention of the segment to [P | h |
    segment]; M is written with y; o = norm(y) * sigmoid(norm(M(y))).

    The paper lets all of h be seen by all of the segment, and reads M when all of y is
    written: there a token sees later ones of its segment. Here (proposed) h_j is seen
    from token j on, and each y_t is answered by M as it is after t. Attention is
    rotated by the place within the segment. It reads whole texts of one sequence: a
    stream would need the keys of a segment that has begun, which is not there yet.
    """

    segment: int = 32

    @nn.compact
    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]."""
        self._refuse(context, pos)
        if state is not None or segments is not None:
            raise NotImplementedError(
                "MAC: a state or segments: it reads whole texts, one a row, without "
                "padding"
            )
        (b, t, e), c = x.shape, min(self.segment, x.shape[1])
        real = jnp.broadcast_to(jnp.arange(t + -t % c)[None] < t, (b, t + -t % c))

        def cut(a):
            """[B,T,...] -> [N,B,C,...]"""
            a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % c)] + [(0, 0)] * (a.ndim - 2))
            return a.reshape(b, -1, c, *a.shape[2:]).swapaxes(0, 1)

        p = self.param("persistent_tokens", nn.initializers.normal(1.0),
                       (self.persistent, e), jnp.float32)
        over = nn.scan(
            _Segment, variable_broadcast="params", split_rngs={"params": False})
        step = over(unbound(self.memory), self.heads, self.dtype, name="segments")
        width = jax.ShapeDtypeStruct((b, c, self.heads, e // self.heads), self.dtype)
        begin = self.memory.init_state(t, width, width, width, x=x)
        p = jnp.broadcast_to(p[None, None], (real.shape[1] // c, 1, *p.shape))
        _, o = step(begin, (cut(x), cut(real.astype(jnp.int32)), p))
        return o.swapaxes(0, 1).reshape(b, -1, e)[:, :t]

    def init_state(self, size: int, x: Any) -> Any:
        """Refused."""
        raise NotImplementedError(
            "MAC cannot be streamed: keys of a segment that has begun are not kept"
        )


class _Segment(Layer):
    """One segment of `MAC`: (the memory's state, (x [B,C,E], ids [B,C], P [1,n,E])) ->
    the next state, o [B,C,E]."""

    attention: Any
    heads: int
    dtype: Any = jnp.float32
    parameter_axes = {
        "ask/kernel": "EHD", "key/kernel": "EHD", "value/kernel": "EHD",
        "told/kernel": "HDE", "answer/kernel": "HDE",
    }

    @nn.compact
    def __call__(self, state, inputs):  # type: ignore[override]
        x, ids, p = inputs
        (b, c, e), d = x.shape, x.shape[2] // self.heads
        split = {n: nn.DenseGeneral(
            (self.heads, d), use_bias=False, dtype=self.dtype, kernel_init=INIT, name=n
        ) for n in ("q", "k", "v", "ask", "key", "value")}  # [B,.,E] [E,H,D]
        join = {n: nn.DenseGeneral(
            e, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=INIT, name=n
        ) for n in ("told", "out", "answer")}  # [B,.,H,D] [H,D,E]
        told = join["told"](self.attention.recall(state, split["ask"](x), d))  # h
        rows = jnp.concatenate([jnp.broadcast_to(p, (b, *p.shape[1:])), told, x], 1)
        at, n = 1 + jnp.arange(c, dtype=jnp.int32), p.shape[1]
        pos = jnp.concatenate([jnp.zeros((n,), jnp.int32), at, at])[None]
        q, k, v = split["q"](x), split["k"](rows), split["v"](rows)
        q, k = RoPE().rotate(q, at[None]), RoPE().rotate(k, pos)
        past = jnp.tril(jnp.ones((c, c), bool))
        seen = jnp.concatenate([jnp.ones((c, n), bool), past, past], 1)[None, None]
        y = join["out"](Softmax(mask=Full())(q, k, v, mask=seen))
        state, m = self.attention.step(
            state, *(split[name](y) for name in ("ask", "key", "value")), x=y,
            segments=ids)
        m = nn.RMSNorm(dtype=self.dtype, name="long_norm")(join["answer"](m))
        y = nn.RMSNorm(dtype=self.dtype, name="short_norm")(y)
        return state, y * nn.sigmoid(m)
