"""Layers: a tensor of tokens goes in, one of the same shape comes out.

`MultiHead` is the only place with parameters for q, k, v and out: it projects, rotates,
attends and projects back, whatever the attention between is. Other mixers of tokens
that have no q, k and v (a short convolution) are a `Layer` too, so that a model can
hold either.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import noisy, said, takes_rope
from attn.contract.layer_checks import (
    OVER, check_call, check_positions, check_stream,
)
from attn.contract.norm import Norm
from attn.contract.padding import guard, padding_unread
from attn.contract.segments import TokenPositions, align_last, locate
from attn.contract.view import opened, refuse_pattern, with_pattern
from attn.positions import RoPE


class Layer(nn.Module):
    """What models stack: `__call__(x, state=None, *, segments=None)` -> y, or (state,
    y) if a state is given; `init_state(size, x)`, the state of an empty stream.

    row: of the template (`attn/template.py`), if it has one. parameter_axes: the axes
    of its parameters, as `attn.contract.attention.Attention` has them. sites: what a
    view may read and replace in it, by name (`attn/contract/view.py`).
    """

    row: ClassVar[Any] = None
    sites: ClassVar[tuple[str, ...]] = ()
    parameter_axes: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        guard(cls, ("__call__",), padding_unread)  # before linen takes hold of it
        super().__init_subclass__(**options)

    def init_state(self, size: int, x: Any) -> Any:
        """An empty memory for `size` tokens; x [B,T,E] gives shapes and dtype only."""
        raise NotImplementedError(f"{type(self).__name__} cannot be streamed")


class MultiHead(Layer):
    """An attention with its projections (Vaswani et al., 2017) arXiv:1706.03762.

    attention: any attention of this library; if it learns something, its parameters are
    under `attention`. One that reads no q, or no k (`needs_query`, `needs_key`),
    gets its shape only, and there is no projection for it. heads H, kv_heads K (H
    is a multiple), head_dim D (by default what the attention asks for as `feature_dim`,
    else E/H), value_dim V (E/H).
    position: `RoPE()`, `MDLRPE(dims)` or None; an attention with a field `rope` keeps
    keys as they were before the rotation and gets the position handed over instead (a
    learned one keeps its own). qk_norm: q and k are normed, over D (True or "head") or
    over all channels of all heads ("all"). qkv_act: q, k and v go through this, "silu",
    after their projections. sinks: a learned logit without value a head, for `Softmax`.
    out_norm: RMSNorm of what is attended to, over the channels of each head ("head") or
    of all ("all"). out_gate: times silu or sigmoid of a projection of x ("silu",
    "sigmoid"), through gate_rank channels if that is given. An attention may ask for
    these three by fields of the same names. norm: what all these norms are. use_bias:
    True for all projections, a gate's among them, "qkv" for these three. dtype: of the
    computation; parameters are float32.

    Cross attention (`context=`): a context is seen whole, unless the attention has been
    given a mask of its own; one that reads queries and keys in step is refused. There
    is one rule of positions: the last query stands at the last key of its sequence, for
    the rotation as for masks and scores, so that the last tokens of a text, with all of
    it as their context, are what they are in self attention. `pos` says otherwise for
    the rotation.
    """

    attention: Any
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    position: Any = RoPE()
    qk_norm: bool | str = False
    qkv_act: str | None = None
    sinks: bool = False
    out_norm: str | None = None
    out_gate: str | None = None
    gate_rank: int | None = None
    norm: Norm = Norm()
    use_bias: bool | str = False
    dtype: Any = jnp.float32
    # as they go into the attention, its weights, and what the projection gets
    sites = ("q", "k", "v", "pattern", "z")
    parameter_axes = {
        "[qkv]/kernel": "EHD", "[qkv]/bias": "HD", "out/kernel": "HDE", "sink": "H",
        "gate/kernel": "EHD", "gate/bias": "HD", "gate_down/kernel": "ER",
        "out_norm/scale": "HD",
        "[qk]_norm/scale": "HD",  # over all channels
        "theta": "HD",  # of a learned rotation
    }

    @nn.compact
    def __call__(
        self, x, state=None, *, context=None, pos=None, segments=None
    ):
        """x [B,T,E] -> [B,T,E]; with a state: the next tokens -> (state, [B,T,E]).

        context [B,S,E']: the tokens that keys and values come from (cross attention).
        pos [B|1,T], or a pair for x and context: positions other than 0, 1, ..., for
        the rotation.
        segments [B,T], or a pair: packed sequences, 0 is padding.
        """
        check_call(self, x, state, context)
        attention, source = self._bound(), x if context is None else context
        if context is not None and hasattr(attention, "of_context"):
            attention = attention.of_context()
        q_pos, kv_pos = self._positions(x, source, state, pos, segments)
        q, k, v = self._project(x, source, q_pos, kv_pos)
        if said(attention, "needs_query"):
            q = opened(self, "q", q)
        if said(attention, "needs_key"):
            k = opened(self, "k", k)
        v = opened(self, "v", v)
        options: dict[str, Any] = {"x": x, "segments": segments}
        if self.sinks:
            zeros = nn.initializers.zeros_init()
            options["sink"] = self.param("sink", zeros, (self.heads,), jnp.float32)
        if state is not None:
            refuse_pattern(self)
            state, o = attention.step(state, q, k, v, **options)
        else:
            if noisy(attention) and self.has_rng("dropout"):
                options["key"] = self.make_rng("dropout")
            o = attention(q, k, v, **options)
            o = with_pattern(self, attention, q, k, v, o, options)
        o = opened(self, "z", self._gated(x, self._normed(o)))
        # [B,T,H,V] x [H,V,E] -> [B,T,E]
        y = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=self.use_bias is True,
            dtype=self.dtype,
            kernel_init=_INIT, name="out",
        )(o)
        return y if state is None else (state, y)

    def init_state(self, size: int, x: Any) -> Any:
        """An empty memory for `size` tokens; x [B,T,E] gives shapes and dtype only."""
        b, t, e = x.shape
        d, v = self._widths(e)
        keys = self.kv_heads or self.heads
        check_stream(self.attention)
        if hasattr(self.position, "check_stream"):
            self.position.check_stream(size)

        def like(heads, width):
            return jax.ShapeDtypeStruct((b, t, heads, width), self.dtype)

        return self._bound().init_state(
            size, like(self.heads, d), like(keys, d), like(keys, v), x=x
        )

    def _bound(self):
        """The attention as this layer uses it; a learned one is its child."""
        attention = self.attention
        if self._takes_rope() and not isinstance(attention, nn.Module):
            # keys are cached unrotated, so the attention turns them itself
            attention = dataclasses.replace(attention, rope=self.position)
        return attention

    def _takes_rope(self) -> bool:
        return takes_rope(self.attention) and self.position is not None

    def _widths(self, e: int) -> tuple[int, int]:
        asked = self.head_dim or said(self.attention, "feature_dim")
        if e % self.heads and not (asked and (self.value_dim or self.head_dim)):
            raise ValueError(f"E={e}: expected a multiple of heads={self.heads}")
        return asked or e // self.heads, self.value_dim or (
            self.head_dim or e // self.heads
        )

    def _asked(self, name: str) -> Any:
        """An option of this layer, or what the attention asks for."""
        own = getattr(self, name)
        return said(self.attention, name) if own is None else own

    def _normed(self, o):
        over = self._asked("out_norm")
        if over is None:
            return o
        if over not in OVER:
            raise ValueError(f"out_norm={over!r}: expected one of {tuple(OVER)}")
        return self.norm.module(self.dtype, "out_norm", OVER[over])(o)

    def _gated(self, x, o):
        name, rank = self._asked("out_gate"), self._asked("gate_rank")
        if name is None:
            return o
        if name not in ("silu", "sigmoid"):
            raise ValueError(f"out_gate={name!r}: expected 'silu' or 'sigmoid'")
        dense = functools.partial(
            nn.DenseGeneral, use_bias=self.use_bias is True, dtype=self.dtype,
            kernel_init=_INIT,
        )
        if rank is not None:
            x = dense(rank, name="gate_down")(x)  # [B,T,E] [E,R]
        # o times act(x W): [B,T,E|R] x [E|R,H,V] -> [B,T,H,V]
        return o * getattr(nn, name)(dense(o.shape[2:], name="gate")(x))

    def _positions(self, x, source, state, pos, segments):
        if pos is not None:
            pair = pos if isinstance(pos, tuple) else (pos, pos)
            for name, a, of in zip(("x", "context"), pair, (x, source)):
                check_positions(name, a, of)
            return pair
        pair = segments if isinstance(segments, tuple) else (segments, segments)
        if state is None:
            q_at, kv_at = (_count(s, a) for s, a in zip(pair, (x, source)))
            if source is not x:
                # aligned at the last token, of each sequence
                ahead = source.shape[1] - x.shape[1]
                if pair[0] is not None:
                    ahead = align_last(*(a.astype(jnp.int32) for a in pair))
                return q_at.pos + ahead, kv_at.pos
        else:
            q_at = kv_at = locate(
                pair[0], x.shape[0], x.shape[1], state.end, state.segment
            )
        return q_at.pos, kv_at.pos

    def _project(self, x, source, q_pos, kv_pos):
        d, v_dim = self._widths(x.shape[-1])
        keys = self.kv_heads or self.heads
        dense = functools.partial(
            nn.DenseGeneral, use_bias=bool(self.use_bias), dtype=self.dtype,
            kernel_init=_INIT,
        )
        needs_query = said(self.attention, "needs_query")
        if needs_query:
            q = dense((self.heads, d), name="q")(x)  # [B,T,E] [E,H,D]
        else:
            # of a query that nobody reads, the shape alone
            q = jax.ShapeDtypeStruct((*x.shape[:2], self.heads, d), self.dtype)
        needs_key = said(self.attention, "needs_key")
        if needs_key:
            k = dense((keys, d), name="k")(source)  # [B,S,K,D]
        else:
            k = jax.ShapeDtypeStruct((*source.shape[:2], keys, d), self.dtype)
        v = dense((keys, v_dim), name="v")(source)  # [B,S,K,V]
        if self.qkv_act:
            q = nn.silu(q) if needs_query else q
            k, v = nn.silu(k) if needs_key else k, nn.silu(v)
        if self.qk_norm:
            axes = OVER["all" if self.qk_norm == "all" else "head"]
            q = self.norm.module(self.dtype, "q_norm", axes)(q) if needs_query else q
            k = self.norm.module(self.dtype, "k_norm", axes)(k) if needs_key else k
        if self.position is not None and not self._takes_rope():
            q = self.position.rotate(q, q_pos) if needs_query else q
            k = self.position.rotate(k, kv_pos) if needs_key else k
        return q, k, v


# unit variance in, unit variance out, whatever the width
_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def _count(segments, x) -> TokenPositions:
    return locate(segments, x.shape[0], x.shape[1])
