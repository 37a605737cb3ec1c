"""LinearTransformer (Katharopoulos et al., 2020) arXiv:2006.16236: a kernel in factors.

Softmax weighs a key by exp(q.k); any positive function of q and k makes an attention,
and one that is a product of features of each lets the sum over keys come first. What is
left of the past is one matrix and one vector a head: transformers are RNNs.

    o_t = sum_j (phi(q_t).phi(k_j)) v_j / sum_j phi(q_t).phi(k_j),    phi = elu + 1

over j <= t in causal order, else over all. A column of ones beside v makes both sums.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.shapes import check
from attn.parallel.sharding import Axis
from attn.recurrent.factors import factor_sums, factor_sums_step, normalized
from attn.recurrent.linear import LinearState, empty


@dataclasses.dataclass(frozen=True)
class LinearTransformer(Attention):
    """LinearTransformer (Katharopoulos et al., 2020) arXiv:2006.16236: phi = elu + 1.

    causal=False drops the order of tokens, for self and cross attention. eps: beside
    the sum of weights, as in the authors' code. chunk: tokens of a block; it changes
    the time, not the result.
    """

    causal: bool = True
    eps: float = 1e-6
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(FACTORS, "L m D", 1)

    def __post_init__(self):
        check_fields(self, least={"eps": 0})

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        # sum_s phi(q_t).phi(k_s) (v_s, 1): [B,T,H,V+1]
        o = factor_sums(
            _phi(q), _phi(k), v, causal=self.causal, segments=segments, **self._how(q)
        )
        return normalized(o, self.eps).astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> LinearState:
        """An empty memory for `size` tokens [B,H,D,V+1]: sums of phi(k) v, and in the
        last column of phi(k). q, k, v give shapes."""
        self.check_stream()
        b, _, h, d = q.shape
        return empty(b, h, d, v.shape[-1] + 1)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        state, o = factor_sums_step(
            state, _phi(q), _phi(k), v, segments=segments, **self._how(q)
        )
        return state, normalized(o, self.eps).astype(v.dtype)


def _phi(x: jax.Array) -> jax.Array:
    return jax.nn.elu(x.astype(jnp.float32)) + 1  # exp(x) below 0, x + 1 above
