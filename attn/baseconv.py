"""BaseConv (Arora et al., 2024) arXiv:2402.18668: a short convolution with a gate.

Most tokens depend on their neighbours in fixed patterns, for which attention is too
dear: a filter over the last few tokens of each channel, multiplied by a projection of
the token itself, does that work in the layers between the attentions of a Based model.

    y_t = sum_w weight_w x_(t-kernel+1+w),    w = 0..kernel-1, channel by channel
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import CONV, TemplateRow
from attn.contract.segments import locate
from attn.layers import Layer
from attn.parallel.sharding import Axis, home, over_mesh, splits
from attn.recurrent.shortconv import shortconvs

VARIANTS = ("lm", "zoology")


class ConvState(NamedTuple):
    """last [B,kernel-1,C]: what the filter last saw of the present sequence, zeros
    before its beginning; end [B] int32 the next token's position; segment [B] int32 the
    last token's segment, -1 before the first."""

    last: jax.Array
    end: jax.Array
    segment: jax.Array


class BaseConv(Layer):
    """BaseConv (Arora et al., 2024) arXiv:2402.18668: a gated short convolution.

    variant "lm", of the trained models: (silu(conv(x A)) * x B) C, where A and B map E
    to expand E / 2 channels, all with bias but the filter. "zoology", of the paper's
    experiments on recall: conv(x) * (x P) + x, all with bias, no activation, and the
    sum with x beside that of the model. kernel: tokens that the filter sees. dtype: of
    the computation; parameters are float32. Order is all it knows: `pos` has no effect.
    axis: the mesh axis that T is split over; neighbours then hand on kernel-1 tokens.
    """

    variant: str = "lm"
    kernel: int = 3
    expand: int = 4
    dtype: Any = jnp.float32
    axis: Axis | None = None
    row = TemplateRow(CONV, "L w D", 1)
    # the halves of "in" are the filter's input and the gate: split, they would be apart
    parameter_axes = {
        "in/kernel": "EE", "gate/kernel": "EF", "out/kernel": "FE", "conv": "WE",
    }

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(
                f"BaseConv: variant={self.variant!r}: expected one of {VARIANTS}"
            )
        for name, least in (("kernel", 1), ("expand", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"BaseConv: {name}={getattr(self, name)}: expected {least} or more"
                )
        super().__post_init__()

    @nn.compact
    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]; with a state: the next tokens -> (state, [B,T,E]).

        segments [B,T]: packed sequences, 0 is padding, whose output is 0.
        """
        if context is not None:
            raise NotImplementedError("BaseConv reads its own tokens, not a context")
        width = self._width(x)
        end, segment = (None, None) if state is None else (state.end, state.segment)
        now = locate(segments, x.shape[0], x.shape[1], end, segment)
        segment = None if segments is None else now.segment
        x = x.astype(self.dtype)
        gate, mixed = self._project(x)  # [B,T,C] each
        # uniform within 1/sqrt(kernel): the filter of a channel sees `kernel` numbers
        fans = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        weight = self.param("conv", fans, (self.kernel, width), jnp.float32)
        bias = None
        if self.variant == "zoology":
            bias = self.param("conv_bias", nn.initializers.zeros, (width,), jnp.float32)
        last = None if state is None else state.last
        # new tokens that the axis cannot split are filtered in the global view
        axis = self.axis if state is None else splits(self.axis, x.shape[1])
        last, mixed = _convolved(axis, mixed, weight, last, segment)
        if bias is not None:
            mixed = mixed + bias.astype(mixed.dtype).reshape(1, 1, width)
        y = self._combine(x, gate, mixed, segment)
        if state is None:
            return y
        return ConvState(last, now.next_pos, now.last_segment), y

    def init_state(self, size: int, x: Any) -> ConvState:
        """An empty memory for `size` tokens, which does not grow; x [B,T,E] gives its
        shape."""
        if size < 1:
            raise ValueError(f"size: a memory for {size} tokens, expected 1 or more")
        b = x.shape[0]
        return ConvState(
            jnp.zeros((b, self.kernel - 1, self._width(x)), self.dtype),
            jnp.zeros((b,), jnp.int32),
            jnp.full((b,), -1, jnp.int32),
        )

    def _width(self, x) -> int:
        e = x.shape[-1]
        if self.variant == "zoology":
            return e
        if e * self.expand % 2:
            raise ValueError(f"E={e}, expand={self.expand}: expected an even product")
        return e * self.expand // 2

    def _dense(self, width: int, name: str) -> nn.Dense:
        make = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_INIT)
        return make(width, name=name)

    def _project(self, x) -> tuple[jax.Array, jax.Array]:
        """The gate, and what the filter sees."""
        if self.variant == "zoology":
            return self._dense(x.shape[-1], "gate")(x), x  # x P: [B,T,E] [E,E]
        # x [A | B]: [B,T,E] [E,2C]
        mixed, gate = jnp.split(self._dense(2 * self._width(x), "in")(x), 2, -1)
        return gate, mixed

    def _combine(self, x, gate, mixed, segment) -> jax.Array:
        if self.variant == "zoology":
            y = mixed * gate + x  # conv(x) * (x P) + x
        else:
            # (silu(conv(x A)) * x B) C: [B,T,C] [C,E]
            y = self._dense(x.shape[-1], "out")(nn.silu(mixed) * gate)
        return y if segment is None else jnp.where((segment > 0)[..., None], y, 0)


def _convolved(axis: Axis | None, x, weight, state, segment):
    """The next state and y [B,T,C]; without an axis, `shortconv`."""
    def local(x, weight, state, segment):
        states = None if state is None else [state]
        after, (y,) = shortconvs(
            [x], [weight], states=states, segment=segment, axis=axis
        )
        return None if after is None else after[0], y

    c = home("H", x.shape[2], axis)  # channels lie where heads do
    letters = f"BT{c} .{c} B.{c} BT -> B.{c} BT{c}"
    return over_mesh(local, letters, axis)(x, weight, state, segment)


# unit variance in, unit variance out, whatever the width
_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
