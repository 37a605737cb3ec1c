"""LARA (Zheng et al., 2022) arXiv:2204.04667: linear randomized attention.

Softmax attention is an expectation over w, each query with a distribution of its own.
Here c distributions, about means of spans of the sequence, serve all queries, which
weigh what was drawn from each by how likely it would have been drawn for them:

    mu_c = q~_c + k~_c,    w_c = mu_c + noise,    n = D^-0.5,
    kv_c = sum_s softmax_s(n w_c.k_s - n |k_s|^2/2) v_s,
    o_t = softmax_c(n mu_c.q_t + n w_c.q_t + lse_c - n w_c.mu_c + n |mu_c|^2/2) kv_c

with lse_c the log of what softmax_s divides by; q~ and k~ are the means of c spans.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.one_sequence import one_sequence
from attn.contract.shapes import check
from attn.exact.dense import logsumexp, weights
from attn.parallel.sharding import Axis, mesh_of
from attn.sparse.landmark_means import spans

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class LARA(Attention):
    """LARA (Zheng et al., 2022) arXiv:2204.04667: few proposals for all queries.

    landmarks: c, of fewer tokens one each. deviation: of the noise of w, drawn where a
    call has a `key`; without one w is mu. scale: n, by default D^-0.5. It has no causal
    order and no cross attention: proposals are made of all queries and keys. With K < H
    keys are repeated. Means and lse are over real tokens (in the benchmark's code lse
    is over padding too); several sequences in a row are refused. Over an `axis` its
    sums over tokens are left to XLA.
    """

    landmarks: int = 16
    deviation: float = 1.0
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    causal = False
    crosses = False
    noise = ("deviation",)
    row = TemplateRow(FACTORS, "L c D", 1)

    def __post_init__(self):
        check_fields(self, least={"landmarks": 1, "deviation": 0})

    def __call__(self, q, k, v, *, x=None, segments=None, key=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V].
        segments: 0 for padding, of rows of one sequence; key: a PRNG key, for noise."""
        check(q, k, v, segments=segments, aligned=True)
        if self.axis is not None:
            mesh_of(self.axis)  # raises without a mesh
        real, mixed = one_sequence(segments, q)
        xla = functools.partial(self._attend, q, k, v, real, real, key)
        o = pick(self.implementation, xla=xla)
        return jnp.where(mixed, jnp.nan, o).astype(v.dtype)

    def _attend(self, q, k, v, real, counted, key=None) -> jax.Array:
        """o [B,T,H,V] float32 of keys that are `real` [B,T]; means and lse are over the
        tokens that are `counted`."""
        h, n = q.shape[2], q.shape[3] ** -0.5 if self.scale is None else self.scale
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        k, v = (jnp.repeat(a, h // a.shape[2], 2) for a in (k, v))
        cut = spans(counted, min(self.landmarks, q.shape[1]))
        mu = cut.means(q) + cut.means(k)  # [B,c,H,D]
        w = mu
        if key is not None:
            w = mu + self.deviation * jax.random.normal(key, mu.shape, jnp.float32)
        # exponentiated: their absolute error counts
        dots = functools.partial(jnp.einsum, "bchd,bshd->bhcs", precision=HIGHEST)
        half = (k * k).sum(-1).swapaxes(1, 2)[:, :, None] / 2  # |k_s|^2/2 [B,H,1,S]
        lk = n * (dots(w, k) - half)
        kv = jnp.einsum("bhcs,bshv->bhcv", weights(lk, real[:, None, None]), v)
        lse = logsumexp(lk, counted[:, None, None])[..., None]
        own = n * ((mu * w).sum(-1) - (mu * mu).sum(-1) / 2)  # [B,c,H]
        # what all landmarks share, n |q_t|^2/2, the softmax over them removes
        ratio = n * (dots(mu, q) + dots(w, q)) + lse - own.swapaxes(1, 2)[..., None]
        p = weights(ratio.swapaxes(2, 3), cut.there[:, None, None])  # [B,H,T,c]
        return jnp.einsum("bhtc,bhcv->bthv", p, kv)
