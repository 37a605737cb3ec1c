"""Titans (Behrouz et al., 2024) arXiv:2501.00663: a long memory beside a short one.

The short memory is attention to a window or a segment, the long one a network that
learns while it reads (`attn/titans.py`); persistent tokens, learned and the same for
every text, stand before both. Four ways of putting them together are layers:

- `LMM`: the memory alone.
- `MAL`, as a layer: the memory's output is what a sliding window attends to.
- `MAG`, as a gate: norm(window(x)) * sigmoid(norm(memory(x))).
- `MAC`, as a context, in `models/titans_context.py`.

    LM(attention=(MAG(Titans(), heads=4),) * 2)

No code was published, and of the paper notes were read. Proposed here: sigmoid as the
gate's non-linearity, and the residuals inside `MAL`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.eager import refuse
from attn.contract.fields import check_fields
from attn.contract.segments import locate
from attn.layers import Layer, MultiHead
from attn.masks import Causal, Sink, Window
from attn.recurrent.memory_layer import MemoryAttention
from attn.softmax import Softmax
from models.stack import unbound


class TitansState(NamedTuple):
    """inner: states of the parts; end, segment [B] int32: the next token's position,
    and the last one's segment, -1 before the first. Persistent tokens are not counted.
    """

    inner: tuple
    end: jax.Array
    segment: jax.Array


class TitansLayer(Layer):
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
                f"{type(self).__name__}: memory={self.memory!r}: expected a memory "
                "that learns, as Titans()"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]; with a state: the next tokens -> (state, [B,T,E]).

        segments [B,T]: 0 is padding. Persistent tokens stand before one sequence a row:
        with them a second one is refused, and is NaN where values are not known; with
        persistent=0 rows may be packed.
        """
        self.refuse(context, pos)
        clock = (None, None) if state is None else (state.end, state.segment)
        now = locate(segments, x.shape[0], x.shape[1], *clock)
        n = self.persistent
        rows, ids = x, segments
        if n and segments is not None:
            refuse((now.segment > 1).any(), None, self._packed)
        if n:
            rows, ids = self._prefixed(x, state, segments, now)
        inner, y = self.mix(rows, None if state is None else state.inner, ids)
        y = y[:, n:]
        if n and segments is not None:
            y = jnp.where((now.segment > 1)[..., None], jnp.nan, y)
        if state is None:
            return y
        return TitansState(inner, now.next_pos, now.last_segment), y

    def _packed(self, value: Any) -> Exception:
        return NotImplementedError(
            f"{type(self).__name__}: a second sequence in a row, but persistent tokens "
            "stand before the first: expected one sequence a row, or persistent=0"
        )

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

    def refuse(self, context: Any, pos: Any) -> None:
        """Raises NotImplementedError for what no layer here reads."""
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


class LMM(TitansLayer):
    """The memory alone. memory: an attention over a learned memory, as `Titans()`;
    heads H; persistent: how many tokens stand before every text."""

    def mix(self, x, states, segments):
        """The memory of [P | x]."""
        after, y = self._part("long", x, states, segments)
        return (after,), y


class _Windowed(TitansLayer):
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
