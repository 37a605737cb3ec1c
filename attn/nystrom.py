"""Nystrom (Xiong et al., 2021) arXiv:2102.03902: the matrix from a few of its rows.

Means of c spans of the sequence stand for all queries and all keys. The softmax of all
against those, of those against those and of those against all make the whole matrix, as
Nystrom's method has it, in time and memory linear in T:

    o = F pinv(A) B v,
    F = softmax(q k~^T),    A = softmax(q~ k~^T),    B = softmax(q~ k^T)

The inverse is a few steps of an iteration, float32, in products of matrices alone:

    Z <- Z/4 (13 I - A Z (15 I - A Z (7 I - A Z))),    Z_0 = A^T / max_j sum_i A_ij
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import LOW, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.one_sequence import one_sequence
from attn.contract.shapes import check
from attn.exact.dense import weights
from attn.parallel.sharding import Axis, mesh_of
from attn.sparse.landmark_means import spans


class Nystrom(nn.Module, Attention):
    """Nystrom (Xiong et al., 2021) arXiv:2102.03902: landmarks and a pseudo-inverse.

    landmarks: c. A sequence of at most c tokens is attended to exactly. iterations: of
    the inverse. scale: of q.k, by default D^-0.5; the code of the benchmark CAB has
    1/D. conv: taps, an odd number, of a learned convolution of each head over v, `conv`
    [H,taps], which is added to the output; 0 for none. shared_start: Z_0 is divided by
    the greatest sum of all matrices of the batch, as in the authors' code, not of its
    own, so that a result depends on its batch a little. It has no causal order, and no
    cross attention: every landmark holds all tokens. With K < H keys are repeated.
    Means are over real tokens; several sequences in a row are refused. Over an `axis`
    its sums over tokens are left to XLA.
    """

    landmarks: int = 64
    iterations: int = 6
    scale: float | None = None
    conv: int = 0
    shared_start: bool = False
    axis: Axis | None = None
    implementation: str | None = None
    causal = False
    crosses = False
    row = TemplateRow(LOW, "L c D + c^3", 1)
    parameter_axes = {"conv": "HW"}

    def __post_init__(self):
        check_fields(self, least={"landmarks": 1, "iterations": 1, "conv": 0})
        if self.conv and self.conv % 2 == 0:
            raise ValueError(f"Nystrom: conv={self.conv}: expected an odd number, or 0")
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V].
        segments: 0 for padding, of rows of one sequence."""
        check(q, k, v, segments=segments, aligned=True)
        if self.axis is not None:
            mesh_of(self.axis)  # raises without a mesh
        real, mixed = one_sequence(segments, q)
        xla = functools.partial(self._attend, q, k, v, real, real)
        o = pick(self.implementation, xla=xla)
        return jnp.where(mixed, jnp.nan, o).astype(v.dtype)

    @nn.compact
    def _attend(self, q, k, v, real, counted) -> jax.Array:
        """o [B,T,H,V] float32 of keys that are `real` [B,T]; landmarks are means over
        the tokens that are `counted`."""
        h, scale = q.shape[2], q.shape[3] ** -0.5 if self.scale is None else self.scale
        k, v = (jnp.repeat(a, h // a.shape[2], 2) for a in (k, v))
        q, k, v = (a.astype(jnp.float32) for a in (q * scale, k, v))
        cut = spans(counted, min(self.landmarks, q.shape[1]))
        few_q, few_k = cut.means(q), cut.means(k)  # [B,c,H,D]
        there = cut.there[:, None, None]
        # F: [B,T,H,D] x [B,c,H,D] -> [B,H,T,c]
        f = weights(jnp.einsum("bthd,bchd->bhtc", q, few_k), there)
        # where tokens are their own landmarks F v is exact attention
        # [B,H,T,c] x [B,c,H,V] -> [B,T,H,V]
        o = jnp.einsum("bhtc,bchv->bthv", f, cut.means(v))
        if q.shape[1] > self.landmarks:
            # A: [B,c,H,D] x [B,c,H,D] -> [B,H,c,c]
            a = weights(jnp.einsum("bchd,bjhd->bhcj", few_q, few_k), there)
            a = jnp.where(cut.there[:, None, :, None], a, 0)
            # B: [B,c,H,D] x [B,S,H,D] -> [B,H,c,S]
            b = weights(
                jnp.einsum("bchd,bshd->bhcs", few_q, k), real[:, None, None])
            bv = jnp.einsum("bhcs,bshv->bhcv", b, v)  # [c,S] [S,V]
            # F A^+ B v: [T,c] [c,c] [c,V] of each head
            mixed = jnp.einsum("bhtc,bhcj,bhjv->bthv", f, self._inverse(a), bv)
            o = jnp.where(cut.whole[:, None, None, None], o, mixed)
        if self.conv:
            o = o + self._convolved(v)
        return o

    def _inverse(self, a: jax.Array) -> jax.Array:
        """pinv of a [B,H,c,c], about."""
        greatest = a.sum(-2).max(None if self.shared_start else -1, keepdims=True)
        greatest = greatest if self.shared_start else greatest[..., None]
        greatest = greatest.reshape(greatest.shape[:1] + (-1, 1, 1))
        z = a.swapaxes(-1, -2) / jnp.where(greatest > 0, greatest, 1)
        one = jnp.eye(a.shape[-1], dtype=a.dtype)[None, None]
        # Z <- Z/4 (13 I - AZ (15 I - AZ (7 I - AZ))), all [B,H,c,c]
        for _ in range(self.iterations):
            az = a @ z
            z = z / 4 @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
        return z

    def _convolved(self, v: jax.Array) -> jax.Array:
        """sum_i w_hi v_(t+i-(taps-1)/2), zeros beside the row [B,T,H,V]."""
        taps, t = self.conv, v.shape[1]
        init = nn.initializers.normal(taps**-0.5)
        w = self.param("conv", init, (v.shape[2], taps), jnp.float32)
        wide = jnp.pad(v, ((0, 0), (taps // 2, taps // 2), (0, 0), (0, 0)))
        # [1,1,H,1] x [B,T,H,V], tap by tap
        taken = [w[None, None, :, i, None] * wide[:, i:i + t] for i in range(taps)]
        return functools.reduce(jnp.add, taken)
