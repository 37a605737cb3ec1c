"""Lightning (Qin et al., 2024) arXiv:2401.04658: linear attention that fades with age.

A token's influence falls by a fixed factor with every step, faster in some heads than
in others, and there is no softmax, so a state of D x V numbers says all that a head
remembers. Tokens of a block meet directly, blocks meet through the state.

    S_t = exp(-s_h) S_{t-1} + k_t^T v_t,    o_t = scale q_t S_t

Source: Lightning Attention-2, and the model around it, "Various Lengths, Constant
Speed" (Qin et al., 2024, arXiv:2405.17381), which `models/transnormer.py` builds.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.attention import RECURRENT, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import segment_indices
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh, spread_heads
from attn.recurrent.causal import linear_attention, linear_attention_step
from attn.recurrent.linear import LinearState, empty, recurrence
from attn.recurrent.noncausal import noncausal_attention

RULES = ("code", "paper", "fla", "minimax", "none")


def slopes(
    heads: int, rule: str = "code", layer: int = 0, layers: int | None = None
) -> np.ndarray:
    """s_h >= 0 [H] of layer `layer` of `layers`, for the rules of `Lightning`, as
    float64 numbers; without `layers` there is no factor of the layer."""
    h = np.arange(1, heads + 1)
    if rule == "none":
        return np.zeros(heads)
    if rule == "code":
        base = _geometric(heads)  # 2^(-8h/H)
    elif rule == "minimax":
        base = 2.0 ** (-8 * h / heads)
    else:
        # equation 10, h = 1..H; or h = 0..H-1
        base = 8 * (h if rule == "paper" else h - 1) / heads
    if layers is None:
        return base
    if rule == "minimax":
        return base * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    # 1 - l/(L-1) + 1e-5; equation 10: 1 - l/L
    factor = 1 - layer / (layers - 1) + 1e-5 if rule == "code" else 1 - layer / layers
    return base * factor


def _geometric(heads: int) -> np.ndarray:
    """2^(-8h/H), h = 1..H, for H a power of two; else those of the power below and then
    every second one of the power above."""
    power = 2 ** int(math.log2(heads))
    own = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    if power == heads:
        return own
    return np.concatenate([own, _geometric(2 * power)[::2][: heads - power]])


@dataclasses.dataclass(frozen=True)
class Lightning(Attention):
    """Lightning (Qin et al., 2024) arXiv:2401.04658: decaying causal linear attention.

    slopes: the decay of head h, of H, in layer l = `layer` of L = `layers`:
    "code", what released models were trained with: the geometric slopes of ALiBi times
    1 - l/(L-1) + 1e-5; "paper", equation 10: 8h/H (1 - l/L), h = 1..H; "fla", of the
    library flash-linear-attention: the same with h = 0..H-1, so that head 0 does not
    decay (there q is also multiplied by D^-0.5: set `scale`); "minimax", of MiniMax-01:
    2^(-8h/H) for every H, times 1 - l/(L-1+1e-5) + 1e-5; "none". Without `layers`
    the factor of the layer is left out.

    causal=False drops the order of tokens: without decay o = q (K^T V), for self and
    cross attention. With a decay, exp(-s |t - j|) to both sides, self attention only:
    that form is proposed here, the papers have none.

    chunk: tokens of a block; it changes the time, not the result.
    """

    slopes: str = "code"
    layer: int = 0
    layers: int | None = None
    scale: float = 1.0
    causal: bool = True
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    # a decay is of distances in one sequence
    crosses = property(lambda self: self.slopes == "none")
    row = TemplateRow(RECURRENT, "L m D", 1)

    def __post_init__(self):
        check_fields(self, choices={"slopes": RULES})
        if self.layers is None and self.layer:
            raise ValueError(
                f"Lightning: layer={self.layer} without layers: expected their number"
            )
        if self.layers is None:
            return
        if not 0 <= self.layer < self.layers:
            raise ValueError(
                f"Lightning: layer={self.layer}: expected 0 to layers-1={self.layers-1}"
            )
        if self.slopes == "code" and self.layers == 1:
            raise ValueError(
                "Lightning: layers=1: the factor 1 - l/(L-1) of slopes='code' divides "
                "by zero, expected 2 or more, or None for no factor"
            )

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        ordered = self.causal or self.slopes != "none"
        check(q, k, v, segments=segments, aligned=ordered)
        log_decay = self._log_decay(q)
        if self.causal:
            return linear_attention(
                q, k, v, log_decay, segments=segments, **self._how(q)
            )
        if log_decay is None:  # o = q (K^T V)
            return noncausal_attention(
                q, k, v, segments=segments, axis=self.axis, scale=self.scale,
                implementation=self.implementation,
            ).astype(v.dtype)
        segment, _ = segment_indices(segments, q)
        k, v = (spread_heads(a, q.shape[2], self.axis) for a in (k, v))
        f = over_mesh(self._two_sided, "BTHD BSKD BSKV H BT -> BTHV", self.axis)
        return (f(q, k, v, log_decay, segment) * self.scale).astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> LinearState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        self.check_stream()
        b, _, h, d = q.shape
        return empty(b, h, d, v.shape[-1])  # S [B,H,D,V]

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        return linear_attention_step(
            state, q, k, v, self._log_decay(q), segments=segments, **self._how(q)
        )

    def _log_decay(self, q) -> jax.Array | None:
        if self.slopes == "none":
            return None
        s = slopes(q.shape[2], self.slopes, self.layer, self.layers)
        return jnp.asarray(-s, jnp.float32)  # log of exp(-s_h) [H]

    def _two_sided(self, q, k, v, log_decay, segment) -> jax.Array:
        forth, back = (  # j <= t, and j >= t
            recurrence(
                q, k, v, log_decay, segment=segment, chunk=self.chunk, axis=self.axis,
                reverse=reverse, implementation=self.implementation,
            )[1]
            for reverse in (False, True)
        )
        return forth + back - _own(q, k, v, segment)  # both hold j = t


def _own(q, k, v, segment) -> jax.Array:
    """(q_t.k_t) v_t [B,T,H,V] float32, which both directions contain."""
    q, k, v = (
        jnp.repeat(a.astype(jnp.float32), q.shape[2] // a.shape[2], 2)
        for a in (q, k, v)
    )
    o = (q * k).sum(-1, keepdims=True) * v  # [B,T,H,1] x [B,T,H,V]
    return o if segment is None else jnp.where(segment[..., None, None] > 0, o, 0)
