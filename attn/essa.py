"""Essa (Zhang et al., 2023) arXiv:2307.14010: pixels compare spectra by correlation.

Two pixels of a hyperspectral image belong together if their spectra have one shape,
however bright they are. The correlation coefficient of two spectra measures just that,
and attention whose weight is the exponential of its square is approximated to the
second order: the zeroth gives v itself, the second the squares of the centred channels,
of which only those of one channel with itself are kept. The sum over keys comes first,
so the cost grows with the number of pixels, not with its square.

    q' = (q - mean(q))^2 / (|q - mean(q)|^2 + 1e-7), k' in the same way
    o_t = v_t + S^-0.5 sum_d q'_td / |q'_t| sum_s k'_sd / |k'_.d| v_s

Means are over the channels of a token. q' is normed over channels, k' over tokens,
channel by channel.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import segment_indices
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh, spread_heads
from attn.recurrent.noncausal import noncausal


@dataclasses.dataclass(frozen=True)
class Essa(Attention):
    """Essa (Zhang et al., 2023) arXiv:2307.14010: attention by spectral correlation.

    It has no causal order: a key's norm is over all tokens. residual: v_t is added,
    the zeroth order of the expansion; without it queries may come from elsewhere, which
    is proposed here, as are several heads, packed segments and padding (norms and S
    count the tokens of a segment). eps: beside the sum of squares of a token.
    """

    residual: bool = True
    eps: float = 1e-7
    axis: Axis | None = None
    implementation: str | None = None
    causal = False
    crosses = property(lambda self: not self.residual)
    row = TemplateRow(FACTORS, "L m D", 1)

    def __post_init__(self):
        check_fields(self, above={"eps": 0})

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.residual)
        where = segment_indices(segments, q, ordered=False)
        k, v = (spread_heads(a, q.shape[2], self.axis) for a in (k, v))
        f = over_mesh(self._local, "BTHD BSKD BSKV BT BS -> BTHV", self.axis)
        o = pick(self.implementation, xla=functools.partial(f, q, k, v, *where))
        return o.astype(v.dtype)

    def _local(self, q, k, v, q_segment, kv_segment) -> jax.Array:
        def sums(a, b, w):
            return noncausal(
                a, b, w, q_segment=q_segment, kv_segment=kv_segment, axis=self.axis
            )

        q, k = self._squares(q), self._squares(k)  # q', k' [B,.,.,D]
        one, ones = jnp.ones_like(q[..., :1]), jnp.ones_like(k[..., :1])
        count = sums(one, ones, ones)  # S: keys of the query's segment [B,T,H,1]
        total = sums(one, ones, k * k)  # of each channel, over the query's segment
        # 1/|k'_.d| goes with q': it is one number a channel and segment, not one a key
        q = q * _inverse_root((q * q).sum(-1, keepdims=True)) * _inverse_root(total)
        o = sums(q, k, v) * _inverse_root(count)  # S^-0.5 sum_d q'_td sum_s k'_sd v_s
        if not self.residual:
            return o
        # v_t, of K heads, for each of H
        own = jnp.repeat(v.astype(jnp.float32), o.shape[2] // v.shape[2], 2)
        return o + (own if kv_segment is None else _real(own, kv_segment))

    def _squares(self, x: jax.Array) -> jax.Array:
        """Squares of the centred channels over their sum, float32."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)  # q - mean(q)
        return x * x / ((x * x).sum(-1, keepdims=True) + self.eps)


def _real(a: jax.Array, segment: jax.Array) -> jax.Array:
    return jnp.where(segment[..., None, None] > 0, a, 0)


def _inverse_root(a: jax.Array) -> jax.Array:
    """1 / max(sqrt(a), 1e-12), and 0 for a = 0, where what is divided is 0 too."""
    # a NaN is none of the zeros, and stays one
    root = jnp.sqrt(jnp.where(a == 0, 1, a))
    return jnp.where(a == 0, 0, 1 / jnp.maximum(root, 1e-12))
