"""Mixers: layers whose tokens meet in a fixed pattern, learned or not.

They fill the rows of the template (`attn/template.py`) whose A does not look at the
tokens: Fourier, a dense matrix, convolutions, a mean. Each has the fast form and the
matrix; what has q, k and v is an attention, in a file of its own.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import (
    CONV, FOURIER, RECURRENT, STATIC, TemplateRow
)
from attn.layers import Layer
from attn.recurrent.shortconv import shortconv
from attn.template import row


class Mixer(Layer):
    """A layer whose A does not depend on the tokens: x [B,T,E] -> [B,T,E].

    `mix` is the fast form and `dense` the same by the matrix. Packed segments, streams
    and contexts are refused: A is of one whole sequence. On a mesh XLA places it, in
    the global view; there is no parameter that would have to know of a shard.
    """

    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]."""
        name = type(self).__name__
        for what, given in (("state", state), ("context", context), ("pos", pos),
                            ("segments", segments)):
            if given is not None:
                raise NotImplementedError(
                    f"{name}: {what}: it mixes one whole sequence by a fixed matrix"
                )
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(f"x has shape {x.shape}: expected [B,T,E], none of them 0")
        return self.mix(x).astype(x.dtype)

    @property
    def kind(self) -> str:
        """Where A comes from."""
        return row(self).kind

    @property
    def cost(self) -> str:
        """Of applying A."""
        return row(self).cost

    def mix(self, x: jax.Array) -> jax.Array:
        """x [B,T,E] -> [B,T,E] in float32 or better, A never written down."""
        raise NotImplementedError(f"{type(self).__name__} has no fast form")

    def matrix(self, x: jax.Array) -> jax.Array:
        """A [G,T,T] of each of G groups of channels, for x [B,T,E]."""
        raise NotImplementedError(f"{type(self).__name__} has no matrix")

    def values(self, x: jax.Array) -> jax.Array:
        """V(X) [B,T,G,E/G]: x itself, in one group or a group a channel."""
        groups = self.matrix(x).shape[0]
        return _wide(x).reshape(*x.shape[:2], groups, -1)  # [B,T,E] -> [B,T,G,E/G]

    def dense(self, x: jax.Array) -> jax.Array:
        """Re(A V) [B,T,E], by the matrix."""
        # A V: [G,T,T] x [B,T,G,E/G] -> [B,T,G,E/G]
        y = jnp.einsum("gts,bsgw->btgw", self.matrix(x), self.values(x))
        return y.real.reshape(x.shape)


class FNet(Mixer):
    """FNet (Lee-Thorp et al., 2021) arXiv:2105.03824: Re(F_T X F_E), nothing learned.

    The discrete Fourier transform over channels and then over tokens, not normalised,
    exp(-2 pi i m n / T); the real part is taken once, after both.
    """

    row = TemplateRow(FOURIER, "L D log(L D)", 1)

    def mix(self, x):
        return jnp.fft.fft2(_wide(x), axes=(1, 2)).real  # Re(F_T X F_E)

    def matrix(self, x):
        t = x.shape[1]
        # F_T, the transforms of unit vectors [1,T,T]
        return jnp.fft.fft(jnp.eye(t, dtype=_wide(x).dtype), axis=0)[None]

    def values(self, x):
        return jnp.fft.fft(_wide(x), axis=2)[:, :, None]  # X F_E [B,T,1,E]


class Static(Mixer):
    """MLP-Mixer (Tolstikhin et al., 2021) arXiv:2105.01601: y = W x, W [T,T] learned.

    One matrix over the tokens for all channels; their token mixing has two with a GELU
    between. length: T, the only one it takes.
    """

    length: int = 512
    row = TemplateRow(STATIC, "L^2 D", 2)
    parameter_axes = {"weight": "TT"}

    @nn.compact
    def weight(self, x) -> jax.Array:
        """W [T,T], of variance 1/T."""
        if x.shape[1] != self.length:
            raise ValueError(f"T={x.shape[1]} tokens: expected length={self.length}")
        init, shape = nn.initializers.lecun_normal(), (self.length, self.length)
        return self.param("weight", init, shape, jnp.float32)

    def mix(self, x):
        return jnp.einsum("ts,bse->bte", self.weight(x), _wide(x))  # [T,T] [T,E]

    def matrix(self, x):
        return self.weight(x)[None]


class LongConv(Mixer):
    """Long convolution (Fu et al., 2023) arXiv:2302.06646: y_t = sum_s h_(t-s) x_s.

    Causal, a learned filter of `length` taps for each channel, applied by FFT, padded
    so that the end does not wrap around. Their kernels are squashed and dropped out
    against overfitting; here they begin normal with deviation length^-0.5.
    """

    length: int = 512
    row = TemplateRow(CONV, "L D log L", 1)
    parameter_axes = {"taps": "WE"}

    @nn.compact
    def taps(self, x) -> jax.Array:
        """h [length,E]; h_0 meets the token itself."""
        init = nn.initializers.normal(self.length**-0.5)
        return self.param("taps", init, (self.length, x.shape[-1]), jnp.float32)

    def mix(self, x):
        t, h = x.shape[1], self.taps(x)[:x.shape[1]]
        n = t + h.shape[0]
        # a product of spectra over T + length places: nothing wraps around
        y = jnp.fft.rfft(_wide(x), n, axis=1) * jnp.fft.rfft(h, n, axis=0)[None]
        return jnp.fft.irfft(y, n, axis=1)[:, :t]

    def matrix(self, x):
        return _toeplitz(self.taps(x), x.shape[1], 0)  # h_(t-s) at (t, s) [E,T,T]


class Depthwise(Mixer):
    """Depthwise convolution (Wu et al., 2019) arXiv:1901.10430: y_t = sum_i w_i
    x_(t+i-(w-1)/2), a learned filter of `kernel` taps for each channel, zeros beside
    the sequence. Theirs has softmax-normalised taps that channels share."""

    kernel: int = 3
    row = TemplateRow(CONV, "L w D", 1)
    parameter_axes = {"taps": "WE"}

    @nn.compact
    def taps(self, x) -> jax.Array:
        """w [kernel,E]."""
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"Depthwise: kernel={self.kernel}: expected an odd number")
        init = nn.initializers.normal(self.kernel**-0.5)
        return self.param("taps", init, (self.kernel, x.shape[-1]), jnp.float32)

    def mix(self, x):
        half = self.kernel // 2
        # `half` zeros behind: a causal filter at t + half looks at both sides of t
        ahead = jnp.pad(_wide(x), ((0, 0), (0, half), (0, 0)))
        return shortconv(ahead, self.taps(x))[1][:, half:]

    def matrix(self, x):
        # w_(s-t+half) at (t, s), so w runs the other way [E,T,T]
        return _toeplitz(self.taps(x)[::-1], x.shape[1], self.kernel // 2)


class MeanPool(Mixer):
    """Pooling (Yu et al., 2021) arXiv:2111.11418: y_t is the mean of x_s, s <= t.

    causal=False: of all tokens. Theirs is over a window, and x is subtracted.
    """

    causal: bool = True
    row = TemplateRow(RECURRENT, "L D", 1)

    def mix(self, x):
        x = _wide(x)
        if not self.causal:
            return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
        # tokens so far [1,T,1]
        count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        # y_t = (x_1 + .. + x_t) / t
        return jnp.cumsum(x, 1) / count

    def matrix(self, x):
        t = x.shape[1]
        ones = jnp.ones((t, t), _wide(x).dtype)
        a = jnp.tril(ones) if self.causal else ones
        # every row sums to 1
        return (a / a.sum(1, keepdims=True))[None]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _toeplitz(taps: jax.Array, t: int, ahead: int) -> jax.Array:
    """[E,T,T] with taps_(t-s+ahead) at (t, s), of taps [w,E], 0 outside of them."""
    at = jnp.arange(t)[:, None] - jnp.arange(t)[None] + ahead  # t - s + ahead [T,T]
    inside = (at >= 0) & (at < taps.shape[0])
    found = taps[jnp.clip(at, 0, taps.shape[0] - 1)]  # [T,T,E]
    return jnp.moveaxis(jnp.where(inside[..., None], found, 0), 2, 0)
