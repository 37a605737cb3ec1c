"""Aaren (Feng et al., 2024) arXiv:2405.13956: attention of one query is an RNN.

If every token asks the same question, the answer over tokens 1..t follows from the
answer over 1..t-1 and the token t alone: softmax attention is a recurrent network whose
state is a maximum and two sums a head. All prefixes are computed at once by a scan, and
a stream needs the same memory however long it is.

    s_i = scale q.k_i,    o_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i)

in the stable form of `attn/recurrent/scan.py`. The query asks for no position, so order
has to come with the tokens: by embeddings, by rotated keys, or by the layers below.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.attention import RECURRENT, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.exact.online import OnlineSoftmax, output
from attn.parallel.sharding import Axis, over_mesh, splits, spread_heads, stacked
from attn.recurrent.pooled_softmax import pooled_softmax
from attn.recurrent.scan import empty, merge, prefix_softmax, total


class AarenState(NamedTuple):
    """memory: of the current sequence, m, l [B,H] and acc [B,H,V] float32; end [B]
    int32 the next token's position; segment [B] int32 the last token's segment, -1
    before the first. Of the width D of keys nothing is left in it."""

    memory: OnlineSoftmax
    end: jax.Array
    segment: jax.Array


class Aaren(nn.Module, Attention):
    """Aaren (Feng et al., 2024) arXiv:2405.13956: a learned query, growing prefixes.

    `query` [H,D] is learned, the q of a call gives only shapes, and `MultiHead` makes
    no projection for it. The paper's layer holds a query token [E] and projects it, so
    that a block of width 512 has 3,152,896 parameters where a transformer's has
    3,152,384. Token and projection are constants of each other: here they are folded
    into the one vector that they make, which is the same set of functions with E^2
    parameters fewer, trained along other paths. Two things are proposed here, since the
    paper's are not known: the initial queries, normal with deviation 0.02, and `scale`,
    by default D^-0.5.

    causal=False is the many-to-one form: every token gets the answer over all keys of
    its sequence, self or cross. chunk: tokens of a block; it changes the time, not the
    result. `step` takes one token or a block of them.
    """

    scale: float | None = None
    causal: bool = True
    chunk: int = 16
    axis: Axis | None = None
    implementation: str | None = None
    needs_query = False
    row = TemplateRow(RECURRENT, "L D", 1)
    parameter_axes = {"query": "HD"}

    def __post_init__(self):
        check_fields(self)
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D] (its shape), k [B,S,K,D], v [B,S,K,V] ->
        [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=self.causal)
        q_segment, kv_segment = segment_indices(segments, q, self.causal)
        scores = self._scores(q, k)
        if self.causal:
            return self._prefixes(None, scores, v, kv_segment, self.axis)[1]
        v = spread_heads(v, q.shape[2], self.axis)
        if q_segment is None:
            pool = over_mesh(self._pool, "BSH BSKV -> BHV", self.axis)
            pooled = pick(self.implementation, xla=functools.partial(pool, scores, v))
            # [B,H,V] -> [B,T,H,V]
            return jnp.broadcast_to(pooled[:, None], (*q.shape[:3], v.shape[-1]))
        f = over_mesh(self._pool_segments, "BSH BSKV BT BS -> BTHV", self.axis)
        return f(scores, v, q_segment, kv_segment)

    def init_state(self, size, q, k, v, *, x=None) -> AarenState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        self.check_stream()
        b, _, h, _ = q.shape
        clock = jnp.zeros((b,), jnp.int32)
        # the segment before the first is -1
        # m begins at -inf: from the paper's 0 scores far below would underflow
        return AarenState(empty(b, h, v.shape[-1]), clock, clock - 1)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        memory, o = self._prefixes(
            state.memory, self._scores(q, k), v,
            None if segments is None else now.segment, splits(self.axis, q.shape[1]))
        return AarenState(memory, now.next_pos, now.last_segment), o

    @nn.compact
    def _scores(self, q, k) -> jax.Array:
        """s [B,S,H] float32."""
        (_, _, h, d), heads = q.shape, k.shape[2]
        init = nn.initializers.normal(0.02)
        query = self.param("query", init, (h, d), jnp.float32)
        query = query * (d**-0.5 if self.scale is None else self.scale)  # scale q [H,D]
        # s_i = scale q.k_i: [B,S,K,D] x [K,G,D] -> [B,S,K,G]
        s = jnp.einsum(
            "bskd,kgd->bskg", k.astype(jnp.float32), query.reshape(heads, -1, d),
            # scores are exponentiated: their absolute error counts
            precision=jax.lax.Precision.HIGHEST)
        return s.reshape(*s.shape[:2], h)  # [B,S,H]

    def _prefixes(self, state, scores, v, segment, axis: Axis | None):
        """The state of all tokens, None for none over an axis; and o [B,T,H,V]."""
        def local(state, scores, v, segment):
            after, o = prefix_softmax(
                scores, v, state=state and OnlineSoftmax(*state), segment=segment,
                axis=axis, chunk=self.chunk, dtype=v.dtype,
                implementation=self.implementation,
            )
            return *(after or [None] * 3), o

        v = spread_heads(v, scores.shape[2], axis)  # [B,S,K,V] -> [B,S,K|H,V]
        letters = "BH BTH BTKV BT -> BH BH BHV BTHV"
        *after, o = over_mesh(local, letters, axis)(state, scores, v, segment)
        return None if after[0] is None else OnlineSoftmax(*after), o

    def _pool(self, scores, v) -> jax.Array:
        """The answer over all keys [B,H,V]."""
        found: Any = total(scores, v)  # m, l [B,H], acc [B,H,V]
        if self.axis is not None:
            b, h = found.l.shape
            parts = stacked(found, self.axis)  # of each shard [W,B,H,.]
            first = empty(b, h, v.shape[-1])
            found, _ = jax.lax.scan(lambda a, b: (merge(a, b), None), first, parts)
        return output(found).astype(v.dtype)

    def _pool_segments(self, scores, v, q_segment, kv_segment) -> jax.Array:
        """The answer over all keys of each token's segment [B,T,H,V]."""
        return pooled_softmax(
            scores, v, q_segment, kv_segment, chunk=self.chunk, axis=self.axis,
            implementation=self.implementation)
