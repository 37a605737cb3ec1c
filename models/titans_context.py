"""Titans (Behrouz et al., 2024) arXiv:2501.00663: memory as a context, MAC.

Attention never looks behind its segment of the text but through the memory: what that
says to the segment's tokens stands in front of them, as a context. What attention makes
of both is then written. No code was published, and of the paper notes were read; where
this is not the paper the docstring of `MAC` says so.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.layers import Layer
from attn.masks import Full
from attn.positions import RoPE
from attn.softmax import Softmax
from models.stack import INIT, unbound
from models.titans import TitansLayer


class MAC(TitansLayer):
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
        self.refuse(context, pos)
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
