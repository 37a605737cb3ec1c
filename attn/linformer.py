"""Linformer (Wang et al., 2020) arXiv:2006.04768: attention of low rank.

The matrix of softmax attention is nearly of low rank, so the S keys and values are
first mixed into r of each by two learned matrices over the tokens, and a query looks at
those: the cost grows with S, not with its square.

    o = softmax(D^-0.5 q (E k)^T) (F v),    E, F [r,S]

Computed as two sums over keys, so that nothing of size T x S exists:

    logits_t = D^-0.5 sum_s (q_t.k_s) E_s,    o_t = sum_s (p_t.F_s) v_s
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import LOW, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.exact.dense import weights
from attn.parallel.sharding import Axis, over_mesh, spread_heads
from attn.recurrent.noncausal import noncausal


class Linformer(nn.Module, Attention):
    """Linformer (Wang et al., 2020) arXiv:2006.04768: keys and values mixed to a few.

    length: the most tokens that E and F, the parameters `keys` and `values` [r,length],
    are made for; a shorter sequence uses their first columns. rank: r, 128 or 256 for
    512 tokens in the paper. E and F serve all heads of a layer. It has no causal order:
    every mixture holds all tokens. Packed segments are proposed here: a token's column
    is its position in its segment, and every segment has mixtures of its own. E and F
    begin normal, of variance 1/length.
    """

    length: int = 512
    rank: int = 128
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    causal = False
    row = TemplateRow(LOW, "L r D", 1)
    parameter_axes = {"keys": "RT", "values": "RT"}

    def __post_init__(self):
        check_fields(self, least={"length": 1, "rank": 1})
        super().__post_init__()

    @nn.compact
    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments)
        b, s = k.shape[:2]
        if s > self.length:
            raise ValueError(f"S={s} keys: expected at most length={self.length}")
        shape = (self.rank, self.length)
        init = nn.initializers.normal(self.length**-0.5)
        # E and F [r,length]
        mixes = [self.param(n, init, shape, jnp.float32) for n in ("keys", "values")]
        kv_segments = segments[1] if isinstance(segments, tuple) else segments
        indices = segment_indices(segments, q, ordered=False)
        where = locate(kv_segments, b, s).pos, *indices
        k, v = (spread_heads(a, q.shape[2], self.axis) for a in (k, v))
        f = over_mesh(self._local, "BTHD BSKD BSKV .. .. BS BT BS -> BTHV", self.axis)
        o = pick(self.implementation, xla=functools.partial(f, q, k, v, *mixes, *where))
        return o.astype(v.dtype)

    def _local(self, q, k, v, keys, values, pos, q_segment, kv_segment) -> jax.Array:
        def sums(a, b, w):
            return noncausal(
                a, b, w, q_segment=q_segment, kv_segment=kv_segment, axis=self.axis
            )

        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        # E_s and F_s of each key [B,S,K,r]
        keys, values = (_columns(mix, pos, k.shape[2]) for mix in (keys, values))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        # logits_t = D^-0.5 sum_s (q_t.k_s) E_s
        p = weights(scale * sums(q, k, keys))  # over r: [B,T,H,r]
        return sums(p, values, v)  # o_t = sum_s (p_t.F_s) v_s


def _columns(mix: jax.Array, pos: Any, heads: int) -> jax.Array:
    """The column of each key's position, [B,S,K,r], of mix [r,length]."""
    found = mix.T[pos]  # [length,r] at [B,S] -> [B,S,r]
    return jnp.broadcast_to(found[:, :, None], (*pos.shape, heads, mix.shape[0]))
