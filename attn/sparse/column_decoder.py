"""Column decoder: from a vector a token to its row of scores, by small convolutions.

Tokens and columns are an image, and the heads, which the convolutions mix, its
channels. In causal order a row of the image sees the rows t, t - 2 and t - 4 alone.
Source: Lee et al., 2023, arXiv:2310.01777, and the code that its authors published.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

BACK = 4  # rows that a convolution looks back


def layer_norm(name: str) -> nn.LayerNorm:
    """A layer norm over the last axis, with torch's epsilon."""
    return nn.LayerNorm(epsilon=1e-5, name=name)


def past_rows(tail, image):
    """The image [B,T,K,C] with the 4 rows before it, and the last 4 of both."""
    both = jnp.concatenate([tail, image], 1)
    return both, both[:, both.shape[1] - BACK:]


def area(n: int, columns: int) -> np.ndarray:
    """The matrix [n,K] that resizes n columns to K by the mean of what each covers."""
    weights = np.zeros((n, columns), np.float32)
    for c in range(columns):
        first, last = c * n // columns, -(-(c + 1) * n // columns)
        weights[first:last, c] = 1 / (last - first)
    return weights


class Decoder(nn.Module):
    """z [B,T,H,2D] -> scores [B,T,H,K], and the tails [B,2H,4,K/4] of two convolutions
    in causal order, which those of the tokens before may come with."""

    columns: int
    causal: bool

    @nn.compact
    def __call__(self, z, tails=None):
        return self._causal(z, tails) if self.causal else (self._around(z), None)

    def _image(self, z, parts: int, width: int) -> jax.Array:
        """[B,T,width,parts H]: channel h * parts + part."""
        b, t, h, _ = z.shape
        # [B,T,H,2D] [2D,parts width]
        a = nn.Dense(parts * width, name="columns")(z)
        a = a.reshape(b, t, h, parts, width)
        return a.transpose(0, 1, 4, 2, 3).reshape(b, t, width, h * parts)

    def _causal(self, z, tails):
        b, t, h, _ = z.shape
        width = self.columns // 4
        a = self._image(z, 2, width)
        # the norm is over the columns of each channel
        a = layer_norm("norm_in")(a.swapaxes(2, 3)).swapaxes(2, 3)
        after = []
        for n in (1, 2):
            tail = jnp.zeros((b, BACK, width, 2 * h), a.dtype)
            if tails is not None:
                tail = tails[n - 1].transpose(0, 2, 3, 1)  # [B,2H,4,K/4]
            both, last = past_rows(tail, a)
            after.append(last.transpose(0, 3, 1, 2))
            # taps t - 4, t - 2, t and columns c - 2, c, c + 2
            a = nn.relu(nn.Conv(
                2 * h, (3, 3), kernel_dilation=2, padding=((0, 0), (2, 2)),
                name=f"conv{n}")(both))
        a = jnp.repeat(a, 4, 2)  # [B,T,K,2H]
        # a column of nothing on both sides, as the authors have it
        a = jnp.pad(a, ((0, 0), (0, 0), (1, 1), (0, 0)))
        a = nn.Conv(h, (1, 1), name="conv3")(a)  # [B,T,K+2,H]
        # [B,T,K+2,H] x [K+2,K] -> [B,T,H,K]
        a = jnp.einsum("btnh,nk->bthk", a, jnp.asarray(
            area(self.columns + 2, self.columns)))
        return layer_norm("norm_out")(a), tuple(after)

    def _around(self, z) -> jax.Array:
        b, t, h, _ = z.shape
        a = self._image(z, 4, self.columns // 2)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)))
        # every second row: [B,ceil(T/2),K/2,4H]
        a = nn.relu(conv(4 * h, strides=(2, 1), name="conv1")(a))
        a = nn.relu(conv(4 * h, name="conv2")(a))
        # rows again twice: [B,T or T+1,K/2,H]
        a = conv(h, name="conv3")(jnp.repeat(a, 2, 1))
        shape = b, t, self.columns, h
        a = jax.image.resize(a, shape, "linear", antialias=False)
        return a.swapaxes(2, 3)  # [B,T,H,K]
