"""RetNet (Sun et al., 2023) arXiv:2307.08621: one fixed decay a head, near to 1.

Retention is what is left of attention when the softmax goes and a token's weight halves
after a fixed number of steps: about 22 in the first head and twice as many in every
next one. The same sums are a matrix of all pairs, chunks that pass on a state, or a
recurrence of one state a head.

    S_t = gamma_h S_{t-1} + k_t^T v_t,    o_t = D^-0.5 q_t S_t
    gamma_h = 1 - 2^(-5-h),  h = 0 .. H-1

The layer of the paper rotates q and k (`MultiHead(position=RoPE())`), norms each head
and gates with silu: `MultiHead(RetNet(), out_norm="head", out_gate="silu")`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.attention import RECURRENT, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.shapes import check
from attn.parallel.sharding import Axis
from attn.recurrent.causal import linear_attention, linear_attention_step
from attn.recurrent.linear import LinearState, empty


@dataclasses.dataclass(frozen=True)
class RetNet(Attention):
    """RetNet (Sun et al., 2023) arXiv:2307.08621: linear attention with fixed decay.

    first: the decay of head h is gamma = 1 - 2^(-first-h). scale: of q.k, by default
    D^-0.5. chunk: tokens of a block; it changes the time, not the result.
    """

    first: float = 5.0
    scale: float | None = None
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(RECURRENT, "L m D", 1)

    def __post_init__(self):
        check_fields(self, above={"first": 0})

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        return linear_attention(
            q, k, v, self._log_decay(q), segments=segments, **self._how(q),
        )

    def init_state(self, size, q, k, v, *, x=None) -> LinearState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        b, _, h, d = q.shape
        return empty(b, h, d, v.shape[-1])  # S [B,H,D,V]

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        check(q, k, v, segments=segments, aligned=True)
        return linear_attention_step(
            state, q, k, v, self._log_decay(q), segments=segments, **self._how(q)
        )

    def _log_decay(self, q) -> jax.Array:
        gap = 2.0 ** -(self.first + np.arange(q.shape[2]))  # 2^(-5-h) [H]
        # log(1 - gap), exact for a small gap
        return jnp.asarray(np.log1p(-gap), jnp.float32)
