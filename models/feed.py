"""Feed: what follows the mixer of tokens in a block, as one small value.

    gated:   (act(x W) * x U) O        (Shazeer, 2020) arXiv:2002.05202
    plain:   act(x U) O                (Vaswani et al., 2017) arXiv:1706.03762
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import flax.linen as nn
import jax.numpy as jnp

INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
ACTIVATIONS: dict[str, Callable] = {
    "silu": nn.silu, "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Feed:
    """hidden F: its width, 0 for no such layer. activation: "silu", "relu", "gelu" or
    "gelu_tanh". gated: with a second projection that is multiplied with; bias: of all
    of its projections."""

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self):
        if self.hidden < 0:
            raise ValueError(f"Feed: hidden={self.hidden}: expected 0 or more")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"Feed: activation={self.activation!r}: expected one of "
                f"{tuple(ACTIVATIONS)}"
            )

    def module(self, dtype: Any, name: str | None = None) -> nn.Module:
        """The layer, a linen module of [B,T,E] -> [B,T,E]."""
        return FeedForward(
            self.hidden, dtype, self.activation, self.gated, self.bias, name=name
        )


class FeedForward(nn.Module):
    """(act(x W) * x U) O, or act(x U) O: the module of `Feed`."""

    hidden: int
    dtype: Any = jnp.float32
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        """x [B,T,E] -> [B,T,E]."""
        dense = functools.partial(
            nn.Dense, use_bias=self.bias, dtype=self.dtype, kernel_init=INIT
        )
        act = ACTIVATIONS[self.activation]
        if self.gated:
            y = act(dense(self.hidden, name="gate")(x))  # [B,T,E] [E,F]
            y = y * dense(self.hidden, name="up")(x)
        else:
            y = act(dense(self.hidden, name="up")(x))
        return dense(x.shape[-1], name="out")(y)  # [B,T,F] [F,E]
