"""Delta (Yang et al., 2024) arXiv:2406.06484: linear attention that corrects itself.

A linear attention adds every value to what its key already stands for, until the state
is a blur. Here the state is first asked what it holds for the key, and only a share
beta of the difference is written: what is new replaces what is old. `gated` lets the
state decay as well, so that it can be cleared at once (Gated DeltaNet, Yang et al.,
2024, arXiv:2412.06464), and `channels` lets each channel of the key decay by itself
(Kimi Delta Attention, Kimi team, 2025, arXiv:2510.26692).

    S' = exp(g_t) S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),
    o_t = q_t S_t / sqrt(D)
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import RECURRENT, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh, splits, spread_heads
from attn.recurrent.decay_gate import log_rates, small_steps
from attn.recurrent.delta_rule import recurrence
from attn.recurrent.short_qkv import short_qkv, tail, unit


class DeltaState(NamedTuple):
    """memory [B,H,D,V] float32, the state after the last token; q [B,conv-1,H D],
    k [B,conv-1,K D] and v [B,conv-1,K V], what the convolutions last saw; end [B] int32
    the next token's position; segment [B] int32 the last token's segment, -1 before
    the first."""

    memory: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    end: jax.Array
    segment: jax.Array


class Delta(nn.Module, Attention):
    """Delta (Yang et al., 2024) arXiv:2406.06484: DeltaNet, and Gated DeltaNet.

    beta = sigmoid(x W), a number a token and head, twice that if `negative`: past 1 the
    state's answer to a key changes its sign (negative eigenvalues, Grazzi et al., 2024,
    arXiv:2411.12537). gated: g = -exp(A) softplus(x W' + b), with A and b as Mamba2
    begins with them. channels: of each channel of the key, from x W_1 W_2 with `rank`
    channels between (None: D), and A is one a head; `MultiHead` then takes
    out_gate="sigmoid" and a gate_rank, as Kimi Linear has them. Queries, keys and
    values pass through a causal convolution of each channel over `conv` tokens (0 for
    none) and silu; queries and keys then get length 1. Positions are not needed:
    `MultiHead(Delta(), position=None)`.

    values: heads of values that a head of queries and keys serves, as Gated DeltaNet's
    successors have them: v [B,T,K,values V] is then values K heads of V side by side,
    and so many heads come out, each with a gate and a beta of its own.

    out_norm, out_gate: what `MultiHead` does to the output. chunk: tokens that XLA's
    form computes at once; it changes the time, not the result.
    """

    gated: bool = False
    negative: bool = False
    channels: bool = False
    rank: int | None = None
    conv: int = 4
    values: int = 1
    out_norm: str | None = "head"
    out_gate: str | None = "silu"
    chunk: int = 32
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(RECURRENT, "L m D", 1)
    weightless = "its values are silu(conv(v)) and not v"
    parameter_axes = {
        "[qkv]_conv": "WF", "beta/kernel": "EH", "decay/kernel": "EH", "A_log": "H",
        "dt_bias": "H", "decay_down/kernel": "ER", "decay_up/kernel": "RHD",
    }

    def __post_init__(self):
        check_fields(self, least={"conv": 0, "values": 1, "rank": 1})
        if self.channels and not self.gated:
            raise ValueError("Delta: channels=True without gated: expected gated=True")
        if self.channels and self.values > 1:
            raise NotImplementedError(
                f"Delta: channels=True with values={self.values}: expected 1"
            )
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], and x [B,T,E] the
        tokens that they were made from -> [B,T,H,V], of `values` > 1
        [B,T,values H,V / values]."""
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1])
        return self._apply(None, now, q, k, v, x, segments is not None, self.axis)[1]

    def init_state(self, size, q, k, v, *, x=None) -> DeltaState:
        """An empty memory for `size` tokens, which does not grow; q, k, v give shapes.
        """
        b, _, h, d = q.shape
        self._check_values(v)
        return DeltaState(
            jnp.zeros((b, h * self.values, d, v.shape[3] // self.values), jnp.float32),
            tail(q, self.conv), tail(k, self.conv), tail(v, self.conv),
            jnp.zeros((b,), jnp.int32), jnp.full((b,), -1, jnp.int32),
        )

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        check(q, k, v, segments=segments, aligned=True)
        now = locate(
            segments, q.shape[0], q.shape[1], state.end, state.segment
        )
        axis = splits(self.axis, q.shape[1])
        return self._apply(state, now, q, k, v, x, segments is not None, axis)

    @nn.compact
    def _apply(
        self, state, now: TokenPositions, q, k, v, x, packed: bool, axis: Axis | None
    ):
        """The state after the tokens, and o [B,T,H,V]."""
        if x is None or x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"x {None if x is None else x.shape}: expected the tokens "
                f"{q.shape[:2]} that q, k and v were made from, [B,T,E]"
            )
        self._check_values(v)
        segment, low = now.segment if packed else None, v.dtype
        memory, before = (None, None) if state is None else (state[0], state[1:4])
        tails, (q, k, v) = short_qkv(self, (q, k, v), before, segment, axis)
        heads = q.shape[2] * self.values
        # [B,T,K,values V] -> [B,T,values K,V]
        v = v.reshape(*v.shape[:2], v.shape[2] * self.values, -1)
        beta, log_decay = self._gates(
            x.astype(jnp.float32), heads, q.shape[3])
        k, v = spread_heads(k, q.shape[2], axis), spread_heads(v, heads, axis)
        # unit keys: states grow if |k|^2 beta is above 2
        q, k, v = (a.astype(low) for a in (unit(q), unit(k), v))

        def local(state, q, k, v, beta, log_decay, segment):
            return recurrence(  # o_t = q_t S_t / sqrt(D)
                q, k, v, beta, log_decay, state=state, segment=segment,
                chunk=self.chunk, axis=axis, scale=q.shape[3] ** -0.5, dtype=low,
                implementation=self.implementation,
            )

        g = "BTHD" if self.channels else "BTH"
        letters = f"BHDV BTHD BTKD BTKV BTH {g} BT -> BHDV BTHV"
        memory, o = over_mesh(local, letters, axis)(
            memory, q, k, v, beta, log_decay, segment)
        clock = now.next_pos, now.last_segment
        return DeltaState(memory, tails[0], tails[1], tails[2], *clock), o

    def _check_values(self, v) -> None:
        if v.shape[3] % self.values:
            raise ValueError(
                f"v has width {v.shape[3]}: expected a multiple of values={self.values}"
            )

    def _gates(self, x, h: int, d: int) -> tuple[jax.Array, jax.Array | None]:
        """beta [B,T,H] and the log decay [B,T,H|H,D], float32."""
        def dense(name, *width, of=x):
            # x W: [B,T,E] [E,H]
            return nn.DenseGeneral(
                width, use_bias=False, dtype=jnp.float32, name=name)(of)

        # in (0, 1), or (0, 2): I - beta k k^T has the eigenvalue 1 - beta along k
        beta = nn.sigmoid(dense("beta", h)) * (2.0 if self.negative else 1.0)
        if not self.gated:
            return beta, None
        steps = h * d if self.channels else h
        log_rate, bias = (  # in float32, whatever a checkpoint has
            self.param(name, begin, (n,)).astype(jnp.float32)
            for name, begin, n in (
                ("A_log", log_rates, h), ("dt_bias", small_steps, steps))
        )
        rate = jnp.exp(log_rate).reshape(1, 1, h)  # exp(A)
        if self.channels:
            low = dense("decay_down", self.rank or d)
            # by channel, through a low rank: [B,T,E] [E,R], then [B,T,R] [R,H,D]
            step = dense("decay_up", h, d, of=low) + bias.reshape(1, 1, h, d)
            return beta, -rate[..., None] * nn.softplus(step)
        # g = -exp(A) softplus(x W' + b)
        return beta, -rate * nn.softplus(dense("decay", h) + bias.reshape(1, 1, h))
