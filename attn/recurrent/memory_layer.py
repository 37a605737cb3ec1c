"""What attentions over a learned memory share: convolutions, gates, parameters, stream.

Such an attention says what its memory is (`network`, `rule`) and makes the gates of its
tokens (`gates`); queries, keys and values go through short convolutions and silu, the
first two then get length 1, and are written to and read from a memory of each head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import RECURRENT, Attention, TemplateRow
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh, splits, spread_heads
from attn.recurrent.memory import Gates, Memory, Where, answers, empty, learn
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.short_qkv import short_qkv, tail, unit


class MemoryState(NamedTuple):
    """memory: weights, momentum and what the chunk began with, float32, as differences
    from an empty memory's; q, k, v: what the convolutions last saw; gates {name:
    [B,H]}: those of the chunk that has begun, None if each token has its own; end,
    segment [B] int32: the next token's position, the last one's segment (-1: none)."""

    memory: Memory
    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: Any
    end: jax.Array
    segment: jax.Array


class MemoryAttention(nn.Module, Attention):
    """An attention over a learned memory. A class of its own defines `network`, `rule`
    and `gates`, and may have fields `lag_token`, `by_chunk` and `scale`."""

    conv: int = 4
    chunk: int = 16
    out_norm: str | None = "head"
    out_gate: str | None = "sigmoid"
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(RECURRENT, "L m D", 1)
    weightless = "what its memory learns is not linear in v"
    parameter_axes = {
        "[qkv]_conv": "WF", "*_gate/kernel": "EH", "*_gate/bias": "H", "W?": "HDR",
        "gamma": "HD", "beta": "HD", "w": "HD",
    }

    @property
    def sums_updates(self) -> bool:
        """Whether there is momentum."""
        return False

    def network(self, d: int, v: int) -> Any:
        """The memory for keys of width d and values of width v."""
        raise NotImplementedError

    def rule(self, d: int, v: int) -> Rule:
        """How it answers and learns."""
        raise NotImplementedError

    def gates(self, x: jax.Array, k: jax.Array, h: int) -> Gates:
        """Of H heads, of tokens x [B,T,E] float32 and their keys k [B,T,K,D]."""
        raise NotImplementedError

    def learned_vectors(self, v: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the network's vectors that are learned while reading."""
        return {}

    def begin(self, name: str) -> Any:
        """What initialises a matrix (Xavier, of each head) or a vector; None: zeros."""
        if name == "beta":
            return nn.initializers.zeros_init()
        if name in ("gamma", "w"):
            return nn.initializers.ones_init()
        return nn.initializers.variance_scaling(
            1.0, "fan_avg", "uniform", in_axis=-2, out_axis=-1, batch_axis=0)

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], and x [B,T,E] the
        tokens that they were made from -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1])
        return self._apply(None, now, q, k, v, x, segments is not None, self.axis)[1]

    def init_state(self, size, q, k, v, *, x=None) -> MemoryState:
        """An empty memory for `size` tokens, which does not grow; q, k, v give shapes.
        """
        b, _, h, d = q.shape
        learned, _ = self._shapes(h, d, v.shape[3])
        memory = empty(learned, b, self.sums_updates, self.chunk)
        gates = None
        if getattr(self, "by_chunk", False):
            zero = jnp.zeros((b, h), jnp.float32)
            gates = {name: zero for name in self.shared}
        return MemoryState(
            memory, tail(q, self.conv), tail(k, self.conv), tail(v, self.conv), gates,
            jnp.zeros((b,), jnp.int32), jnp.full((b,), -1, jnp.int32),
        )

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        axis = splits(self.axis, q.shape[1])
        return self._apply(state, now, q, k, v, x, segments is not None, axis)

    def recall(self, state, q, width: int) -> jax.Array:
        """What the memory as it is answers to q [B,T,H,D], without convolution, in
        values of `width` channels; nothing is written."""
        return self._apply(state, None, q, None, None, None, False, None, width)[1]

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the gates that tokens of a chunk share, if they do."""
        return ()

    def _shapes(self, h: int, d: int, v: int) -> tuple[dict, dict]:
        """Shapes [H,...] of what is learned while reading, and of what is not."""
        net = self.network(d, v)
        own = self.learned_vectors(v)
        learned = {n: (h, *shape) for n, shape in (net.matrices(d, v) | own).items()}
        rest = {n: (h, *s) for n, s in net.vectors(v).items() if n not in own}
        return learned, rest

    def _parameters(self, h: int, d: int, v: int) -> tuple[dict, dict]:
        """The memory before the first token, {name: [H,...]}, and what is not learned.
        """
        def make(name, shape):
            if (kind := self.begin(name)) is None:
                return jnp.zeros(shape, jnp.float32)
            return self.param(name, kind, shape, jnp.float32)

        learned, rest = self._shapes(h, d, v)
        return ({n: make(n, s) for n, s in learned.items()},
                {n: make(n, s) for n, s in rest.items()})

    def short_arrays(self, arrays, tails, segment, axis):
        """The next tails, and q, k, v float32."""
        tails, (q, k, v) = short_qkv(self, arrays, tails, segment, axis)
        return tails, (unit(q), unit(k), v)

    @nn.compact
    def _apply(
        self, state, now: Any, q, k, v, x, packed: bool, axis: Axis | None,
        recalled: int | None = None,
    ):
        """The state after the tokens, and o [B,T,H,V]."""
        if recalled is not None:
            # reading alone, y = M(W; q) without an update
            rule, like = self.rule(q.shape[3], recalled), q.dtype
            initial, fixed = self._parameters(
                q.shape[2], q.shape[3], recalled)
            o = answers(rule, state.memory, initial, fixed, unit(nn.silu(
                q.astype(jnp.float32))))
            return state, o.astype(like)
        if x is None or x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"x {None if x is None else x.shape}: expected the tokens "
                f"{q.shape[:2]} that q, k and v were made from, [B,T,E]"
            )
        segment, low = now.segment if packed else None, v.dtype
        memory, tails = None, None
        if state is not None:
            memory, tails = state.memory, state[1:4]  # of q, k, v
        (h, d), width = q.shape[2:], v.shape[3]
        rule = self.rule(d, width)
        tails, (q, k, v) = self.short_arrays((q, k, v), tails, segment, axis)
        # of keys after their convolution, K heads of them
        gates, begun = self.gates(x.astype(jnp.float32), k, h), None
        if getattr(self, "by_chunk", False):
            gates, begun = self._of_chunks(gates, now, state)
        initial, fixed = self._parameters(h, d, width)
        k, v = (spread_heads(a, h, axis) for a in (k, v))

        def local(state, q, k, v, gates, initial, fixed, where):
            # [B,T,K,.] -> [B,T,H,.]: each query head has a memory of its own
            k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
            return learn(
                rule, q, k, v, gates, initial, where, state=state, fixed=fixed,
                chunk=self.chunk, lag=getattr(self, "lag_token", False), axis=axis,
                dtype=low, implementation=self.implementation,
            )

        letters = "BH BTH BTK BTK BTH H H BT -> BH BTH"
        memory, o = over_mesh(local, letters, axis)(
            memory, q, k, v, gates, initial, fixed, Where(now.pos, segment))
        after = MemoryState(
            memory, tails[0], tails[1], tails[2], begun, now.next_pos, now.last_segment)
        return after, (o * getattr(self, "scale", 1.0)).astype(low)

    def _of_chunks(self, gates: Gates, now: Any, state):
        """Gates of each chunk's first token for all of it, and those of the chunk that
        has begun. (The mean of a chunk would tell its first tokens of later ones.)"""
        t = now.pos.shape[1]
        begins = (now.segment > 0) & (now.pos % self.chunk == 0)  # [B,T]
        # where the token's chunk begins in the row; -1: it began before
        at = jnp.where(begins, jnp.arange(t, dtype=jnp.int32)[None], -1)
        at = jax.lax.cummax(at, axis=1)[..., None]  # [B,T,1]
        begun = {}

        def of(name):
            a = getattr(gates, name)
            if name not in self.shared:
                return a
            # [B,T,H] at [B,T,1]
            own = jnp.take_along_axis(a, jnp.maximum(at, 0), 1)
            before = 0.0 if state is None else state.gates[name][:, None]
            found = jnp.where(at < 0, before, own)  # [B,T,H]
            begun[name] = found[:, -1]
            return found

        return Gates(*map(of, Gates._fields)), begun
