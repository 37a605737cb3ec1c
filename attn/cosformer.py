"""CosFormer (Qin et al., 2022) arXiv:2202.08791: near tokens weigh more, by a cosine.

What a softmax does to a matrix of weights, keep it positive and gather it, is done to
the factors instead: both are relu(x), and a cosine of the distance, which is a product
of factors itself, lets far tokens fade.

    o_t = sum_s w_ts v_s / max(sum_s w_ts, eps),
    w_ts = relu(q_t).relu(k_s) cos(pi/2 (t - s)/M)
         = q'_t.k'_s,    x'_t = [relu(x_t) sin(pi t/2M), relu(x_t) cos(pi t/2M)]

with positions from 1 and M the longer of the two lengths, so that no weight is
negative. In causal order the sums end at t, one state of 2D x (V + 1) numbers a head.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.eager import refuse
from attn.contract.fields import check_fields
from attn.contract.segments import count, locate
from attn.contract.shapes import check
from attn.parallel.sharding import Axis
from attn.recurrent.factors import factor_sums, factor_sums_step
from attn.recurrent.linear import LinearState, empty


@dataclasses.dataclass(frozen=True)
class CosFormer(Attention):
    """CosFormer (Qin et al., 2022) arXiv:2202.08791: relu features, cosine distance.

    length: M. In causal order it has to be known in advance, as every weight depends on
    it: tokens at positions of `length` and beyond are refused (ValueError, and NaN
    inside a trace); the paper has the length of the row, which a prefix does not know.
    causal=False drops the order, for self and cross attention; length=None, for this
    form alone, is the longer of the two lengths of each sequence, as in the paper. eps:
    the least sum of weights. chunk: tokens of a block; it changes the time, not the
    result. The causal form as prefix sums, and segments, are proposed here.
    """

    causal: bool = True
    length: int | None = 4096
    eps: float = 1e-6
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(FACTORS, "L m D", 1)

    def __post_init__(self):
        check_fields(self, least={"length": 1}, above={"eps": 0})
        if self.causal and self.length is None:
            raise ValueError(
                "CosFormer: length=None: expected a number of tokens, a causal order "
                "has to know it in advance, or causal=False"
            )

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        pair = segments if isinstance(segments, tuple) else (segments, segments)
        at, of = (locate(g, *a.shape[:2]).pos for g, a in zip(pair, (q, k)))
        # M of each token's sequence, and who stands beyond it, where a cosine turns
        # negative
        lengths = self._lengths(q, k, pair)
        lost = [self._refused(a) for a in (at, of)]
        q, k = (_turned(a, pos, m) for a, pos, m in zip((q, k), (at, of), lengths))
        o = factor_sums(  # [B,T,H,V+1]
            q, k, v, causal=self.causal, segments=segments, **self._how(q))
        o = self._divided(o)
        return jnp.where(lost[0] | lost[1], jnp.nan, o).astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> LinearState:
        """An empty memory for `size` tokens, of positions below `length`, [B,H,2D,V+1]:
        sums of k' v, and in the last column of k'. q, k, v give shapes. A `size` beyond
        `length` is that of several sequences: `step` refuses one that is longer."""
        self.check_stream()
        b, _, h, d = q.shape
        return empty(b, h, 2 * d, v.shape[-1] + 1)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        lost = self._refused(now.pos)
        q, k = (_turned(a, now.pos, self.length) for a in (q, k))
        state, o = factor_sums_step(state, q, k, v, segments=segments, **self._how(q))
        return state, jnp.where(lost, jnp.nan, self._divided(o)).astype(v.dtype)

    def _lengths(self, q, k, pair) -> tuple:
        """M of each query [B,T] and of each key [B,S], or one number for all."""
        if self.length is not None:
            return self.length, self.length
        if pair[0] is None:
            return (max(q.shape[1], k.shape[1]),) * 2
        ids = [a.astype(jnp.int32) for a in pair]
        # the longer of the two lengths of a token's sequence, at least 1 at padding
        return tuple(
            jnp.maximum(jnp.maximum(count(ids[0], a), count(ids[1], a)), 1)
            for a in ids)

    def _refused(self, pos: jax.Array) -> jax.Array:
        """Whether tokens at `pos` [B,T] stand where weights may be negative [B,1,1,1];
        ValueError outside of a trace."""
        if self.length is None:
            return jnp.zeros((1, 1, 1, 1), bool)
        lost = (pos >= self.length).any(1)
        refuse(lost.any(), pos.max() + 1, self._too_long)
        return lost[:, None, None, None]

    def _too_long(self, value) -> Exception:
        return ValueError(
            f"{int(value)} tokens of a sequence: expected at most length={self.length}"
        )

    def _divided(self, o: jax.Array) -> jax.Array:
        # sum_s w_ts [B,T,H,1]; where all features are 0 so is what is divided
        return o[..., :-1] / jnp.maximum(o[..., -1:], self.eps)


def _turned(x: jax.Array, pos: jax.Array, length) -> jax.Array:
    """x' [B,T,.,2D] float32 of x [B,T,.,D] at positions pos [B,T] from 0."""
    x = jax.nn.relu(x.astype(jnp.float32))
    # t counts from 1, pos from 0
    angle = math.pi / 2 * (pos + 1).astype(jnp.float32) / jnp.float32(length)
    angle = angle[..., None, None]  # pi t/2M
    # q'.k' = relu(q).relu(k) cos(pi (t - s)/2M), as cos(a - b) = sin sin + cos cos
    return jnp.concatenate([x * jnp.sin(angle), x * jnp.cos(angle)], -1)
