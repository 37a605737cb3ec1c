"""LinearTransformer (Katharopoulos et al., 2020) arXiv:2006.16236: a kernel in factors.

Softmax weighs a key by exp(q.k); any positive function of q and k makes an attention,
and one that is a product of features of each lets the sum over keys come first. What is
left of the past is one matrix and one vector a head: transformers are RNNs.

    o_t = sum_j (phi(q_t).phi(k_j)) v_j / sum_j phi(q_t).phi(k_j),    phi = elu + 1

over j <= t in causal order, else over all. A column of ones beside v makes both sums.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attn.contract.attention import FACTORS, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh, splits, spread_heads
from attn.recurrent.linear import LinearState, empty, recurrence
from attn.recurrent.noncausal import noncausal


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
        where = segment_indices(segments, q, self.causal)
        k, v = (spread_heads(a, q.shape[2], self.axis) for a in (k, v))
        letters = "BTHD BSKD BSKV BT BS -> BTHV"
        return over_mesh(self._local, letters, self.axis)(q, k, v, *where)

    def init_state(self, size, q, k, v, *, x=None) -> LinearState:
        """An empty memory for `size` tokens [B,H,D,V+1]: sums of phi(k) v, and in the
        last column of phi(k). q, k, v give shapes."""
        self.check_stream()
        return empty(size, *self._memory(q, v))

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        axis = splits(self.axis, q.shape[1])
        k, v = (spread_heads(a, q.shape[2], axis) for a in (k, v))
        f = over_mesh(
            functools.partial(self._sums, axis), "BHDV BTHD BTKD BTKV BT -> BHDV BTHV",
            axis,
        )
        segment = None if segments is None else now.segment
        memory, o = f(state.memory, q, k, v, segment)
        after = LinearState(memory, now.next_pos, now.last_segment)
        return after, self._divided(o).astype(v.dtype)

    def _memory(self, q, v) -> tuple[int, int, int, int]:
        b, _, h, d = q.shape
        return b, h, d, v.shape[-1] + 1

    def _sums(self, axis, state, q, k, v, segment) -> tuple:
        # sum_j (phi(q_t).phi(k_j)) [v_j | 1], j <= t: [B,T,H,V+1]
        return recurrence(
            _phi(q), _phi(k), _beside_one(v), state=state, segment=segment,
            chunk=self.chunk, axis=axis, implementation=self.implementation,
        )

    def _local(self, q, k, v, q_segment, kv_segment) -> jax.Array:
        if self.causal:
            _, o = self._sums(self.axis, None, q, k, v, kv_segment)
        else:
            # the same over all j
            xla = functools.partial(
                noncausal, _phi(q), _phi(k), _beside_one(v), q_segment=q_segment,
                kv_segment=kv_segment, axis=self.axis,
            )
            o = pick(self.implementation, xla=xla)
        return self._divided(o).astype(v.dtype)

    def _divided(self, o: jax.Array) -> jax.Array:
        total = o[..., -1:]  # sum_j phi(q_t).phi(k_j)
        # phi is positive: the sum is 0 only where no key is seen
        return o[..., :-1] / jnp.where(total > 0, total + self.eps, 1)


def _phi(x: jax.Array) -> jax.Array:
    return jax.nn.elu(x.astype(jnp.float32)) + 1  # exp(x) below 0, x + 1 above


def _beside_one(v: jax.Array) -> jax.Array:
    v = v.astype(jnp.float32)
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)  # [B,S,K,V+1]
