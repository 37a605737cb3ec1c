"""GLA (Yang et al., 2023) arXiv:2312.06635: linear attention that learns to forget.

Every channel of the key has a gate of its own, made from the token: a number in (0,1)
that the channel's row of the state is multiplied with before the token is written. The
gates are held near to 1 by a root, so that a state lives for hundreds of tokens.

    S_t = diag(a_t) S_{t-1} + k_t^T v_t,    o_t = D^-0.5 q_t S_t
    a_t = sigmoid(x_t A B + b)^(1/16),      A [E,16], B [16,H D]
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import RECURRENT, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.shapes import check
from attn.parallel.sharding import Axis
from attn.recurrent.causal import linear_attention, linear_attention_step
from attn.recurrent.linear import LinearState, empty

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class GLA(nn.Module, Attention):
    """GLA (Yang et al., 2023) arXiv:2312.06635: a learned decay for each key channel.

    rank: width between the two matrices of the gate. temperature: the root that gates
    are taken to. scale: of q.k, by default D^-0.5. out_norm, out_gate: what it asks of
    `MultiHead`; the paper has no position encoding, so give it `position=None`. chunk:
    tokens of a block; it changes the time, not the result. Gates need the tokens x.
    """

    rank: int = 16
    temperature: float = 16.0
    scale: float | None = None
    out_norm: str | None = "head"
    out_gate: str | None = "silu"
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(RECURRENT, "L m D", 1)
    parameter_axes = {
        "gate_down/kernel": "ER", "gate_up/kernel": "RHD", "gate_up/bias": "HD",
    }

    def __post_init__(self):
        check_fields(self, least={"rank": 1}, above={"temperature": 0})
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V], x [B,T,E] ->
        [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        return linear_attention(
            q, k, v, self.log_decay(q, x), segments=segments, **self._how(q),
        )

    def init_state(self, size, q, k, v, *, x=None) -> LinearState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        b, _, h, d = q.shape
        return empty(b, h, d, v.shape[-1])  # S [B,H,D,V]

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        check(q, k, v, segments=segments, aligned=True)
        return linear_attention_step(
            state, q, k, v, self.log_decay(q, x), segments=segments, **self._how(q)
        )

    @nn.compact
    def log_decay(self, q, x) -> jax.Array:
        """log a [B,T,H,D] <= 0, float32, of tokens x [B,T,E]."""
        if x is None:
            raise ValueError("x is None: GLA makes its gates from the tokens [B,T,E]")
        # A
        low = nn.Dense(self.rank, use_bias=False, kernel_init=_INIT, name="gate_down")
        up = nn.DenseGeneral(q.shape[2:], kernel_init=_INIT, name="gate_up")  # B, b
        # log sigmoid(x A B + b) / 16: [B,T,E] [E,rank] [rank,H,D]
        return jax.nn.log_sigmoid(up(low(x.astype(jnp.float32)))) / self.temperature
