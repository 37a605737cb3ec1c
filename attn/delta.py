"""Delta (Yang et al., 2024) arXiv:2406.06484: linear attention that corrects itself.

A linear attention adds every value to what its key already stands for, until the state
is a blur. Here the state is first asked what it holds for the key, and only a share
beta of the difference is written: what is new replaces what is old. `gated` lets the
state fade as well, so that it can be cleared at once (Gated DeltaNet, Yang et al.,
2024, arXiv:2412.06464).

    S' = exp(g_t) S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),
    o_t = q_t S_t / sqrt(D)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.baseconv import shortconv
from attn.segments import Place, place
from attn.shapes import check
from attn.sharding import Axis
from attn.wy import delta_rule


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


class Delta(nn.Module):
    """Delta (Yang et al., 2024) arXiv:2406.06484: DeltaNet, and Gated DeltaNet.

    beta = sigmoid(x W), a number a token and head, twice that if `negative`: past 1 the
    state's answer to a key changes its sign (negative eigenvalues, Grazzi et al., 2024,
    arXiv:2411.12537). gated: g = -exp(A) softplus(x W' + b), with A and b as Mamba2
    begins with them. Queries, keys and values pass through a causal convolution of each
    channel over `conv` tokens (0 for none) and silu; queries and keys then get length
    1. Positions are not needed: `MultiHead(Delta(), position=None)`.

    out_norm, out_gate: what `MultiHead` does to the output. chunk: tokens that XLA's
    form computes at once; it changes the time, not the result.
    """

    gated: bool = False
    negative: bool = False
    conv: int = 4
    out_norm: str | None = "head"
    out_gate: str | None = "silu"
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None

    def __post_init__(self):
        for name, least in (("conv", 0), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"Delta: {name}={getattr(self, name)}: expected {least} or more"
                )
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], and x [B,T,E] the
        tokens that they were made from -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        if self.axis is not None:
            raise NotImplementedError(
                f"axis={self.axis!r}: what a shard does to the state of the delta rule "
                "is a matrix [D,D], which is not passed on yet; expected None"
            )
        now = place(segments, q.shape[0], q.shape[1])
        return self._apply(None, now, q, k, v, x, segments is not None)[1]

    def init_state(self, size, q, k, v, *, x=None) -> DeltaState:
        """An empty memory for `size` tokens, which does not grow; q, k, v give shapes.
        """
        if size < 1:
            raise ValueError(f"size: a memory for {size} tokens, expected 1 or more")
        b, _, h, d = q.shape
        tail = lambda a: jnp.zeros(
            (b, max(self.conv - 1, 0), a.shape[2] * a.shape[3]), a.dtype)
        return DeltaState(
            jnp.zeros((b, h, d, v.shape[3]), jnp.float32), tail(q), tail(k), tail(v),
            jnp.zeros((b,), jnp.int32), jnp.full((b,), -1, jnp.int32),
        )

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        check(q, k, v, segments=segments, aligned=True)
        if not isinstance(state, DeltaState):
            raise ValueError(f"state is a {type(state).__name__}: expected DeltaState")
        now = place(
            segments, q.shape[0], q.shape[1], state.end, state.segment
        )
        return self._apply(state, now, q, k, v, x, segments is not None)

    @nn.compact
    def _apply(self, state, now: Place, q, k, v, x, packed: bool):
        """The state after the tokens, and o [B,T,H,V]."""
        if x is None or x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"x {None if x is None else x.shape}: expected the tokens "
                f"{q.shape[:2]} that q, k and v were made from, [B,T,E]"
            )
        run, memory, q_tail, k_tail, v_tail = now.run if packed else None, *[None] * 4
        if state is not None:
            memory, q_tail, k_tail, v_tail = state[:4]
        low = v.dtype
        q_tail, q = self._short("q", q, q_tail, run)
        k_tail, k = self._short("k", k, k_tail, run)
        v_tail, v = self._short("v", v, v_tail, run)
        beta, log_decay = self._gates(x.astype(jnp.float32), q.shape[2])
        q, k, v = (a.astype(low) for a in (_unit(q), _unit(k), v))
        memory, o = delta_rule(
            q, k, v, beta, log_decay, state=memory, run=run,
            chunk=self.chunk, scale=q.shape[3] ** -0.5, dtype=low,
            implementation=self.implementation,
        )
        return DeltaState(memory, q_tail, k_tail, v_tail, now.end, now.last), o

    def _short(self, name: str, a, tail, run) -> tuple[Any, jax.Array]:
        """The next tail; and q, k or v after its convolution and silu, float32."""
        wide = a.astype(jnp.float32)  # what follows is rounded once, at its end
        if not self.conv:
            return tail, nn.silu(wide)
        flat = wide.reshape(*a.shape[:2], a.shape[2] * a.shape[3])
        fans = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        shape = self.conv, flat.shape[2]
        weight = self.param(f"{name}_conv", fans, shape, jnp.float32)
        tail = None if tail is None else tail.astype(jnp.float32)
        tail, flat = shortconv(flat, weight, state=tail, run=run)
        return tail.astype(a.dtype), nn.silu(flat).reshape(a.shape)

    def _gates(self, x, h: int) -> tuple[jax.Array, jax.Array | None]:
        """beta and the log decay [B,T,H], float32."""
        dense = lambda name: nn.Dense(
            h, use_bias=False, dtype=jnp.float32, name=name)(x)
        beta = nn.sigmoid(dense("beta")) * (2.0 if self.negative else 1.0)
        if not self.gated:
            return beta, None
        fade = jnp.exp(self.param("A_log", _fades, (h,))).reshape(1, 1, h)
        bias = self.param("dt_bias", _steps, (h,)).reshape(1, 1, h)
        return beta, -fade * nn.softplus(dense("decay") + bias)


def _unit(a):
    """Vectors of length 1; one that is 0 stays 0."""
    return a * jax.lax.rsqrt((a * a).sum(-1, keepdims=True) + 1e-6)


def _fades(key, shape):
    """log A, A uniform in (0,16)."""
    return jnp.log(jax.random.uniform(key, shape, minval=1e-4, maxval=16.0))


def _steps(key, shape):
    """The inverse softplus of steps that are log uniform between 0.001 and 0.1."""
    low, high = jnp.log(0.001), jnp.log(0.1)
    step = jnp.exp(jax.random.uniform(key, shape) * (high - low) + low)
    return step + jnp.log(-jnp.expm1(-step))
