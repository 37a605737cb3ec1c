"""Networks that a learned memory can be (`attn/recurrent/memory.py`), as functions.

A network is called with `dot(name, x)`, which stands for x times a matrix, and
`vec(name)`, which stands for a vector: what they are is up to who asks, so that one
definition gives answers, gradients, and answers of weights that no one has written out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.varying import gelu

EPS = 1e-5  # of the layer norm
ACTIVATIONS: dict[str, Callable] = {"gelu": gelu, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class MLP:
    """depth layers without bias, of `hidden` channels between; 1: a matrix.

    residual: the input is added, [x, 0] or its first channels where widths differ
    (proposed). norm: a layer norm with gain gamma and bias beta before that; `unit`:
    its gain is 1 + gamma, without a bias. Matrices are W0, W1, ... [in,out].
    """

    depth: int = 2
    hidden: int = 0
    activation: str = "gelu"
    residual: bool = False
    norm: bool = False
    unit: bool = False

    def matrices(self, d: int, v: int) -> dict[str, tuple[int, ...]]:
        """Shapes for keys of width d and values of width v."""
        widths = [d, *[self.hidden] * (self.depth - 1), v]
        pairs = zip(widths, widths[1:])
        return {f"W{n}": pair for n, pair in enumerate(pairs)}

    def vectors(self, v: int) -> dict[str, tuple[int, ...]]:
        """Shapes of gamma and beta."""
        names = ("gamma",) if self.unit else ("gamma", "beta")
        return {name: (v,) for name in names} if self.norm else {}

    def __call__(self, dot: Callable, vec: Callable, x: jax.Array) -> jax.Array:
        """x [...,D] -> [...,V]."""
        y = x
        for n in range(self.depth):
            y = dot(f"W{n}", y)  # [...,in] [in,out]
            if n < self.depth - 1:
                y = ACTIVATIONS[self.activation](y)
        if self.norm:
            y = _normed(y)
            gain = vec("gamma")
            # gain and bias [...,1,V], or of each token [...,c,V] where they are learned
            y = y * (1 + gain) if self.unit else y * gain + vec("beta")
        return y + _fitted(x, y.shape[-1]) if self.residual else y


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """One number a channel: x times the vector `w`, for values as wide as keys."""

    def matrices(self, d: int, v: int) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def vectors(self, v: int) -> dict[str, tuple[int, ...]]:
        """The shape of w."""
        return {"w": (v,)}

    def __call__(self, dot: Callable, vec: Callable, x: jax.Array) -> jax.Array:
        """x [...,D] -> [...,D]."""
        return x * vec("w")


def _normed(y: jax.Array) -> jax.Array:
    y = y - y.mean(-1, keepdims=True)
    # y - mean, over its deviation
    return y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + EPS)


def _fitted(x: jax.Array, width: int) -> jax.Array:
    """The first `width` channels of x, zeros behind them if it has fewer."""
    if x.shape[-1] >= width:
        return x[..., :width]
    pad: Any = [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]
    return jnp.pad(x, pad)
