"""SR3 (Saharia et al., 2021) arXiv:2104.07636: a sharp image out of noise, given a
small one.

A U-Net is told the small image, made large, the noisy one, and how noisy it is, and
says which noise was added; attention over all pixels stands where the image is a half
as large on each side. Sampling goes from noise to image, by the steps of DDPM (Ho et
al., 2020) arXiv:2006.11239, which are a loop, and so convolutions are those for loops
(`models/convolution.py`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.angles import sinusoids
from models.convolution import Conv
from models.feed import INIT
from models.places import Places
from models.seq2seq import mixer
from models.stack import check_sizes


def levels(steps: int) -> jax.Array:
    """alpha-bar [steps], the share of the image in what is left after each step of
    adding noise, by a cosine (Nichol and Dhariwal, 2021) arXiv:2102.09672."""
    at = (jnp.arange(steps + 1) / steps + 0.008) / 1.008
    f = jnp.cos(at * jnp.pi / 2) ** 2
    # no step takes more than 0.999 of what is left
    kept = jnp.clip(f[1:] / f[:-1], 0.001, 1.0)
    return jnp.cumprod(kept)


class Residual(nn.Module):
    """x + two convolutions of 3 x 3 behind norm and swish; the noise level moves the
    channels between."""

    width: int

    @nn.compact
    def __call__(self, x, level):
        """x [B,h,w,C], level [B,E] -> [B,h,w,width]."""
        y = nn.swish(nn.GroupNorm(4, name="norm_0")(x))
        y = Conv(self.width, (3, 3), name="conv_0")(y)
        shift = nn.Dense(self.width, kernel_init=INIT, name="level")(nn.swish(level))
        y = nn.swish(nn.GroupNorm(4, name="norm_1")(y + shift[:, None, None]))
        y = Conv(self.width, (3, 3), name="conv_1",
                 kernel_init=nn.initializers.zeros)(y)
        if x.shape[-1] != self.width:
            x = Conv(self.width, (1, 1), name="skip")(x)
        return x + y


class Pixels(nn.Module):
    """x + attention over all pixels of norm(x); pattern NS."""

    places: Places
    heads: int

    @nn.compact
    def __call__(self, x):
        """x [B,h,w,C] -> [B,h,w,C]."""
        b, h, w, c = x.shape
        y = nn.GroupNorm(4, name="norm")(x).reshape(b, h * w, c)
        own = mixer(self.places.at("NS"), self.heads).clone(parent=self, name="own")
        return x + own(y).reshape(x.shape)


class SR3(nn.Module):
    """SR3 (Saharia et al., 2021) arXiv:2104.07636, small: one halving, attention on the
    pixels of the halved image, pattern NS.

    width: channels at full size, twice as many at half, a multiple of 4; heads H.
    """

    width: int = 16
    heads: int = 4
    places: Places = Places()

    @nn.compact
    def __call__(self, noisy, given, level):
        """noisy, given [B,h,w,C], h and w even; level [B] in 0..1, alpha-bar -> the
        noise [B,h,w,C]."""
        check_sizes("SR3", self, "width heads")
        c, w = noisy.shape[-1], self.width
        at = jnp.round(1000 * jnp.sqrt(level)).astype(jnp.int32)
        level = nn.Dense(2 * w, kernel_init=INIT, name="level_0")(sinusoids(at, 2 * w))
        level = nn.Dense(2 * w, kernel_init=INIT, name="level_1")(nn.swish(level))
        x = Conv(w, (3, 3), name="first")(jnp.concatenate([noisy, given], -1))
        top = x = Residual(w, name="down_0")(x, level)
        x = Conv(2 * w, (3, 3), (2, 2), name="halve")(x)
        x = Residual(2 * w, name="middle_0")(x, level)
        x = Pixels(self.places, self.heads, name="pixels_0")(x)
        x = Residual(2 * w, name="middle_1")(x, level)
        x = Pixels(self.places, self.heads, name="pixels_1")(x)
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        x = Conv(w, (3, 3), name="double")(x)
        x = Residual(w, name="up_0")(jnp.concatenate([x, top], -1), level)
        x = nn.swish(nn.GroupNorm(4, name="norm")(x))
        return Conv(c, (3, 3), name="last", kernel_init=nn.initializers.zeros)(x)


def sample(model: SR3, params: Any, given: jax.Array, key: jax.Array,
           steps: int) -> jax.Array:
    """Images [B,h,w,C] in -1..1 for given ones, made large, by `steps` steps."""
    kept = levels(steps)
    before = jnp.concatenate([jnp.ones(1), kept[:-1]])

    def step(x, at):
        now, left, key = at
        many = jnp.full(x.shape[:1], now)
        noise: Any = model.apply(params, x, given, many)
        image = jnp.clip((x - jnp.sqrt(1 - now) * noise) / jnp.sqrt(now), -1, 1)
        # the mean of q(x_{t-1} | x_t, image), and its noise, none at the last step
        alpha = now / left
        mean = (jnp.sqrt(left) * (1 - alpha) * image
                + jnp.sqrt(alpha) * (1 - left) * x) / (1 - now)
        deviation = jnp.sqrt((1 - left) / (1 - now) * (1 - alpha))
        return mean + deviation * jax.random.normal(key, x.shape), None

    first, key = jax.random.split(key)
    keys = jax.random.split(key, steps)
    x = jax.random.normal(first, given.shape)
    back = jax.tree.map(lambda a: a[::-1], (kept, before, keys))
    return jax.lax.scan(step, x, back)[0]
