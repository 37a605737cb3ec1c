"""Norm: which normalisation a network has, as one small value.

    rms:    x / sqrt(mean(x^2) + eps) * (scale + offset)
    layer:  (x - mean(x)) / sqrt(var(x) + eps) * scale + bias

Sources: RMSNorm (Zhang & Sennrich, 2019) arXiv:1910.07467; LayerNorm (Ba et al., 2016)
arXiv:1607.06450. An offset of 1 is how Gemma stores its scales: as what they differ
from 1, which is 0 at the beginning.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

KINDS = ("rms", "layer")


@dataclasses.dataclass(frozen=True)
class Norm:
    """kind: "rms" or "layer", which has a bias too; eps: added to the mean square (or
    the variance); offset: added to the learned scale, of "rms"."""

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Norm: kind={self.kind!r}: expected one of {KINDS}")
        if not self.eps >= 0:
            raise ValueError(f"Norm: eps={self.eps}: expected 0 or more")
        if self.offset and self.kind != "rms":
            raise ValueError(f"Norm: offset={self.offset}: expected kind='rms'")

    def module(
        self, dtype: Any, name: str | None = None, axes: tuple[int, ...] = (-1,)
    ) -> nn.Module:
        """The linen module of this norm over `axes`, each with a scale of its own; what
        comes out is of `dtype`, what is summed float32."""
        options: dict[str, Any] = dict(
            epsilon=self.eps, dtype=dtype, reduction_axes=axes, feature_axes=axes,
            name=name,
        )
        if self.kind == "layer":
            # the variance as it is written: the mean of squares would round it away
            return nn.LayerNorm(use_fast_variance=False, **options)
        if self.offset:
            return OffsetRMSNorm(self.eps, self.offset, axes, dtype, name=name)
        return nn.RMSNorm(**options)


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose parameter `scale` is stored without `offset`, 0 at first."""

    eps: float
    offset: float
    axes: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """x [...,n] -> the same shape, of `dtype`."""
        shape = tuple(x.shape[axis] for axis in self.axes)
        scale = self.param("scale", nn.initializers.zeros_init(), shape, jnp.float32)
        y = x.astype(jnp.float32)
        # x / sqrt(mean(x^2) + eps) (offset + scale), in float32
        y = y * jax.lax.rsqrt((y * y).mean(self.axes, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32) + self.offset
        y = y * scale.reshape((1,) * (x.ndim - len(shape)) + shape)
        return y.astype(self.dtype)
