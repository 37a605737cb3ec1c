"""LightNet (Qin et al., 2024) arXiv:2405.21022: one scan for any number of dimensions.

In every channel of the key, tokens share out one unit of weight by a softmax over time.
A new token takes its share from all before it alike, so what is held is always a mean.
Decays that multiply depend on the order, and a picture needs a scan from each side of
it; a share does not, and once the sum runs over all tokens, one scan in any order does.

    z_t = log sum_(s<=t) exp(k_s)
    S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t)^T v_t
    o_t = c silu(q_t) S_t,    c = D^-0.5
    without an order: o_t = c silu(q_t) sum_s exp(k_s - z_S)^T v_s, s = 1 .. S

The more tokens there are, the less a new one counts: decays tend to 1, shares to 1/t.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.attention import RECURRENT, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh, splits
from attn.recurrent.causal import linear_attention, linear_attention_step
from attn.recurrent.chunks import only
from attn.recurrent.linear import LinearState
from attn.recurrent.noncausal import noncausal, noncausal_attention
from attn.recurrent.time_softmax import largest, nothing, shares

ACTIVATIONS = ("silu", None)


class LightNetState(NamedTuple):
    """memory [B,H,D,V] float32 (2D rows under a rotation that doubles channels); top
    and total [B,H,D] float32: the largest key, and the sum of exp(key - top); end [B]
    int32 the next token's position; segment [B] int32 the last token's segment, -1
    before the first."""

    memory: jax.Array
    top: jax.Array
    total: jax.Array
    end: jax.Array
    segment: jax.Array

    @property
    def z(self) -> jax.Array:
        """log of the sum of exp(keys) [B,H,D], -inf before the first."""
        return self.top + jnp.log(self.total)


@dataclasses.dataclass(frozen=True)
class LightNet(Attention):
    """LightNet (Qin et al., 2024) arXiv:2405.21022: keys are a softmax over time.

    It learns nothing itself. The rest of the paper's layer is `MultiHead(out_norm=
    "all", out_gate="silu", gate_rank=128, head_dim=128, value_dim=E/H, position=None)`:
    a norm over all channels and a gate of low rank. causal=False is the one scan over
    all tokens, for self and cross attention. scale: of q.k, by default D^-0.5 (1 in the
    first author's later code). activation: of q. init_lse: z before the first token,
    -inf, or 0 as in that code, which adds 1 to every sum; without an order that is
    proposed here. rope: a position encoding, which turns silu(q) and the shares
    exp(k - z), not the keys; `MultiHead` hands its own over. chunk: tokens of a block;
    it changes the time, not the result. With K < H keys are repeated.
    """

    causal: bool = True
    scale: float | None = None
    activation: str | None = "silu"
    init_lse: float = -math.inf
    rope: Any = None
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(RECURRENT, "L m D", 1)

    def __post_init__(self):
        check_fields(
            self, choices={"activation": ACTIVATIONS}, infinite=("init_lse",)
        )
        if not self.init_lse < math.inf:
            raise ValueError(
                f"LightNet: init_lse={self.init_lse}: expected -inf or a finite number"
            )
        if self.chunk < 1:
            raise ValueError(f"LightNet: chunk={self.chunk}: expected 1 or more")

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        q, k, wide = self._ready(q, k, v)
        b, t, h, d = q.shape
        if not self.causal:
            return self._noncausal(q, k, wide, segments).astype(v.dtype)
        segment, _ = segment_indices(segments, q)
        pos = locate(segments, b, t).pos
        # exp(k_t - z_t) and z_{t-1} - z_t [B,T,H,D]
        share, log_decay, *_ = self._shares(
            k, segment, nothing((b, h, d)), self.axis, ends=False)
        o = linear_attention(
            *self._turned(q, share, pos, pos), wide, self._spread(log_decay),
            segments=segments, **self._how(q),
        )
        return o.astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> LightNetState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        self.check_stream()
        b, _, h, d = q.shape
        memory = jnp.zeros((b, h, self._rows(d), v.shape[-1]), jnp.float32)
        return LightNetState(
            memory, *nothing((b, h, d)), jnp.zeros((b,), jnp.int32),
            jnp.full((b,), -1, jnp.int32),
        )

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        b, t = q.shape[:2]
        q, k, wide = self._ready(q, k, v)
        now = locate(segments, b, t, state.end, state.segment)
        segment = None if segments is None else now.segment
        share, log_decay, top, total = self._shares(
            k, segment, (state.top, state.total), splits(self.axis, t))
        held = LinearState(state.memory, state.end, state.segment)
        held, o = linear_attention_step(
            held, *self._turned(q, share, now.pos, now.pos), wide,
            self._spread(log_decay), segments=segments, **self._how(q),
        )
        state = LightNetState(held.memory, top, total, held.end, held.segment)
        return state, o.astype(v.dtype)

    def _ready(self, q, k, v) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float32, k and v with H heads, q after its activation."""
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
        return (jax.nn.silu(q) if self.activation else q), k, v

    def _factor(self, d: int) -> float:
        # hidden in the default of fla's kernel; the first author's code has 1
        return d ** -0.5 if self.scale is None else self.scale

    def _rows(self, d: int) -> int:
        return 2 * d if getattr(self.rope, "doubles", False) else d

    def _turned(self, q, share, q_pos, kv_pos) -> tuple[jax.Array, jax.Array]:
        if self.rope is None:
            return q, share
        # exp(k - z), not k: behind the normalisation, as in the first author's code
        return self.rope.rotate(q, q_pos), self.rope.rotate(share, kv_pos)

    def _spread(self, log_decay) -> jax.Array:
        """One decay for each row of the memory."""
        d = log_decay.shape[-1]
        # both halves of a channel that a rotation doubles decay alike
        copies = [log_decay] * (self._rows(d) // d)
        return jnp.concatenate(copies, -1)  # [B,T,H,D] -> [B,T,H,rows]

    def _shares(self, k, segment, before: tuple, axis: Axis | None, ends: bool = True):
        """exp(k_t - z_t), z_{t-1} - z_t [B,T,H,D], and the sums after all tokens, or
        None and None."""
        found = shares(
            k, segment, before, chunk=self.chunk, axis=axis, init_lse=self.init_lse,
            ends=ends)
        return found.share, found.log_decay, found.top, found.total

    def _noncausal(self, q, k, v, segments) -> jax.Array:
        """Every query sees every key of its segment, or simply every key."""
        pair = segments if isinstance(segments, tuple) else (segments, segments)
        places = [locate(g, *a.shape[:2]) for g, a in zip(pair, (q, k))]
        share = self._softmax(k, None if segments is None else places[1].segment)
        turned = self._turned(q, share, *(p.pos for p in places))
        # c silu(q_t) sum_s exp(k_s - z)^T v_s
        return noncausal_attention(
            *turned, v, segments=segments, axis=self.axis,
            scale=self._factor(q.shape[-1]), implementation=self.implementation,
        )

    def _softmax(self, k, segment) -> jax.Array:
        """exp(k_s - z) [B,S,H,D], z over all keys of the segment."""
        top = jax.lax.stop_gradient(k)  # it cancels: no gradient
        top = top.max(1, keepdims=True) if segment is None else largest(top, segment)
        # log(exp(init_lse) + sum_s exp(k_s)) below one maximum
        top = jnp.maximum(top, self.init_lse)
        each = jnp.exp(k - top)  # [B,S,H,D]
        if segment is None:
            total = each.sum(1, keepdims=True)  # [B,1,H,D]
        else:
            each = only((segment > 0)[..., None, None], each)
            total = over_mesh(self._sums, "BSHD BS -> BSHD", self.axis)(each, segment)
        total = total + jnp.exp(self.init_lse - top)  # exp(init_lse) beside the sum
        return each / jnp.where(total > 0, total, 1)

    def _sums(self, each, segment) -> jax.Array:
        # with q = k = 1 linear attention is the sum of v over a segment
        one = jnp.ones_like(each[..., :1])
        return noncausal(
            one, one, each, q_segment=segment, kv_segment=segment, axis=self.axis
        )
