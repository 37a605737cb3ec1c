"""ESSAformer (Zhang et al., 2023) arXiv:2307.14010: sharper hyperspectral images.

A small image of many bands goes up to full size and back down three and two times over,
through the same two blocks, so that what is drawn in at full size is held against what
is known at low size again and again.

    x1 = A(U(x));  x2 = E(D(x1) + x);  x3 = A(U(x2) + x1);  x4 = E(D(x3) + x2)
    x5 = A(U(x4) + x3)

U and D change the size by convolutions whose channels become pixels and back, A and E
are attention beside convolutions, each with one set of weights. Images are [B,h,w,C].
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.essa import Essa
from attn.layers import MultiHead

# uniform within 1/sqrt(fan in), weights and biases, as the authors' framework does
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
SLOPE = 0.2  # of leaky ReLU, below zero


def shuffle(x: jax.Array, r: int) -> jax.Array:
    """Channels to pixels: [B,h,w,C r^2] -> [B,h r,w r,C]; channel c r^2 + i r + j is
    channel c of the pixel (i, j) of the r x r that a pixel becomes."""
    b, h, w, c = x.shape
    # [B,h,w,C,i,j] -> [B,h,i,w,j,C]
    x = x.reshape(b, h, w, c // r**2, r, r).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * r, w * r, c // r**2)


def unshuffle(x: jax.Array, r: int) -> jax.Array:
    """The inverse of `shuffle`: [B,h,w,C] -> [B,h/r,w/r,C r^2]."""
    b, h, w, c = x.shape
    # [B,h,i,w,j,C] -> [B,h,w,C,i,j]
    x = x.reshape(b, h // r, r, w // r, r, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // r, w // r, c * r**2)


class Conv(nn.Module):
    """A convolution with bias, `size` x `size` pixels, zeros around the image."""

    width: int
    size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x [B,h,w,C] -> [B,h,w,width]."""
        fan = self.size**2 * x.shape[-1]

        def bias(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)

        return nn.Conv(
            self.width, (self.size, self.size), padding="SAME", dtype=self.dtype,
            kernel_init=_INIT, bias_init=bias, name="conv",
        )(x)


class Refine(nn.Module):
    """The block of ESSAformer (Zhang et al., 2023) arXiv:2307.14010: attention over all
    pixels, laid beside the image, through three convolutions, and the image added."""

    attention: Any = Essa()
    dropout: float = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x [B,h,w,C] -> [B,h,w,C]; with `train`, channels are dropped at three places.
        """
        b, h, w, c = x.shape
        conv = functools.partial(Conv, dtype=self.dtype)

        def drop(a):
            return nn.Dropout(
                # a dropped channel is dropped in all pixels
                self.dropout, broadcast_dims=(1, 2), deterministic=not train
            )(a)

        tokens = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(
            x.reshape(b, h * w, c)  # [B,h w,C]
        )
        mixed = MultiHead(
            self.attention, heads=1, position=None, use_bias=True, dtype=self.dtype,
            name="attention",
        )(tokens)
        y = jnp.concatenate([drop(mixed.reshape(x.shape)), x], -1)  # [B,h,w,2C]
        y = drop(nn.leaky_relu(conv(2 * c, 1, name="first")(y), SLOPE))
        y = drop(nn.leaky_relu(conv(2 * c, 3, name="second")(y), SLOPE))
        return conv(c, 1, name="third")(y) + x


class Resize(nn.Module):
    """Times `scale` in height and width, or 1 over it with `down`: convolutions and
    `shuffle`, factor 2 by factor 2, or 3 at once."""

    scale: int
    down: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x [B,h,w,C] -> [B,h s,w s,C] or [B,h/s,w/s,C]."""
        c, factors = x.shape[-1], _factors(self.scale)
        for n, r in enumerate(factors):
            # r x r pixels become channels, or channels become pixels
            width = c // r**2 if self.down else c * r**2
            x = Conv(width, 3, self.dtype, name=f"conv_{n}")(x)
            x = unshuffle(x, r) if self.down else shuffle(x, r)
        return x


class ESSAformer(nn.Module):
    """ESSAformer (Zhang et al., 2023) arXiv:2307.14010: a cube in, a larger one out.

    scale: 3 or a power of 2. width: channels inside, a multiple of 4, or 9 for scale 3
    (256 in the authors' example, for 128 bands). attention: what `Refine` uses, any
    without a causal order. dropout: share of channels that `train` drops. dtype: of the
    computation; parameters are float32.
    """

    scale: int = 4
    width: int = 256
    attention: Any = Essa()
    dropout: float = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x [B,h,w,bands] -> [B,s h,s w,bands]; `train` drops and needs that rng."""
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"x has shape {x.shape}: expected [B,h,w,bands]")
        least = _factors(self.scale)[0] ** 2
        if self.width % least:
            raise ValueError(
                f"ESSAformer: width={self.width}: expected a multiple of {least} for "
                f"scale={self.scale}"
            )
        conv = functools.partial(Conv, size=3, dtype=self.dtype)
        bands = x.shape[-1]
        up = Resize(self.scale, dtype=self.dtype, name="up")
        down = Resize(self.scale, True, self.dtype, name="down")
        high, low = (
            functools.partial(
                Refine(self.attention, self.dropout, self.dtype, name=name), train=train
            )
            for name in ("high", "low")
        )
        x = conv(self.width, name="first")(x)
        fine = high(up(x))  # x1 = A(U(x))
        for _ in range(2):
            x = low(down(fine) + x)  # x2 = E(D(x1) + x), then x4
            fine = high(up(x) + fine)  # x3 = A(U(x2) + x1), then x5
        return conv(bands, name="last")(fine)


def _factors(scale: int) -> list[int]:
    """The factors that an image grows by, one after the other."""
    if scale == 3:
        return [3]
    if scale < 2 or scale & (scale - 1):
        raise ValueError(f"scale={scale}: expected 3 or a power of 2")
    return [2] * (scale.bit_length() - 1)
