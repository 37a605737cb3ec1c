"""SEA (Lee et al., 2023) arXiv:2310.01777: the matrix is estimated first, and then its
largest parts are read exactly.

A Performer says for little what a token's context might be; a small convolutional
decoder makes of it an estimate of the token's row of the attention matrix, compressed
to K columns; the best columns of all heads are stretched to the keys that they stand
for, and to these the attention is exact. The estimate learns from a teacher's matrix
(`distil`), which its selection, having no gradient, cannot teach it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.one_sequence import one_sequence
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.parallel.sharding import Axis, over_mesh
from attn.recurrent.estimator import Estimate, Estimator
from attn.sparse import estimated


@caches.of_cache
class SEAState(NamedTuple):
    """A cache of all tokens; memory [B,H,m,D+V+1], the Performer's sums; tails, the
    last rows that the convolutions saw [B,2H,4,K/4]; total [B,K',V], the sum of values;
    all float32 but the cache."""

    cache: Cache
    memory: jax.Array
    tails: tuple[jax.Array, jax.Array]
    total: jax.Array


class SEA(Estimator, Attention):
    """SEA (Lee et al., 2023) arXiv:2310.01777: sparse attention by an estimated mask.

    columns K of the estimate; keep k: keys that a head reads in the mean over heads (a
    row's best columns are chosen over all heads together, so one head may get all and
    another none, which then gives 0). With K columns a row of more than H k K keys
    reads a whole column, a K-th of them. causal: each token has an order and a learned
    place of its own, of `length` at most; if not, T is split evenly. nb_factor: the
    Performer has D ln D / nb_factor features. gated: the output is g2 times g1 times
    the attention plus 1 - g2 of the mean of all values, by two learned gates; without
    (proposed here), keep >= T is exact attention.

    count_padding: without an order, keys at padding count in the Performer's
    denominator and rows of padding in the mean row and in losses, as in the authors'
    code, whose results so depend on padding; False, proposed here, leaves them out.

    The random directions are a variable of the layer, `fixed/directions`, which no
    optimiser sees; where it is not given they are those of `seed`, and `redrawn` gives
    those of a later time, from (seed, time) alone. Packed sequences are refused
    (NotImplementedError, and NaN inside a trace); padding is not read, and is refused
    in causal order. Over an `axis` the estimate is left to XLA, as its convolutions mix
    heads, and rows are read where they lie, from keys that are whole on every device.
    """

    columns: int = 128
    keep: int = 7
    causal: bool = True
    length: int = 2048
    nb_factor: float = 1.0
    gated: bool = True
    count_padding: bool = False
    seed: int = 0
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    crosses = False
    row = TemplateRow(MASKED, "L m D + L K H^2 + r L D", 1)
    weightless = "what it gives a key is estimated from v too"
    parameter_axes = {
        "enc/kernel": "FR", "enc/bias": "R", "enc_norm/*": "R", "gate/kernel": "FR",
        "gate/bias": "R", "place": "TF", "directions": "FR",
        "decoder/columns/kernel": "RF", "decoder/columns/bias": "F",
        "decoder/conv?/kernel": "WWRF", "decoder/conv?/bias": "F",
        "decoder/norm_*/*": "R",
    }

    def __post_init__(self):
        check_fields(
            self, least={"columns": 4, "keep": 1, "length": 1}, above={"nb_factor": 0})
        if self.columns % 4:
            raise ValueError(f"SEA: columns={self.columns}: expected a multiple of 4")
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V].
        segments: 0 for padding, of rows of one sequence, without a causal order."""
        check(q, k, v, segments=segments, aligned=True)
        valid, mixed = self._valid(segments, q)
        estimate, _ = self._estimate(q, k, v, valid, None)
        o = self._context(estimate, q, k, v)
        return jnp.where(mixed, jnp.nan, o).astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, at most `length`."""
        self.check_stream()
        caches.check_size(size)
        b, _, h, d = q.shape
        width = v.shape[3]
        # a convolution has the taps t - 4, t - 2 and t: four rows of history
        tail = jnp.zeros((b, 2 * h, 4, self.columns // 4), jnp.float32)
        memory = jnp.zeros((b, h, self._features(d), d + width + 1), jnp.float32)
        total = jnp.zeros((b, k.shape[2], width), jnp.float32)
        return SEAState(caches.empty(k, v, size), memory, (tail, tail), total)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True, piece=True)
        caches.check_fits(state.cache, k, v)
        self._valid(segments, q)
        slots = state.cache.k.shape[1]
        b, t = q.shape[:2]
        now = locate(None, b, t, state.cache.end, state.cache.segment)
        caches.check_room(now.next_pos, slots)
        cache = caches.append(state.cache, k, v, now, now.pos)
        valid = jnp.ones(q.shape[:2], bool)
        estimate, kept = self._estimate(q, k, v, valid, state)
        memory, tails, total = kept
        both, wide = caches.of_one_type(cache, q)
        o = self._context(estimate, wide, both.k, both.v, state.total, v)
        after = SEAState(cache, memory, tails, total)
        return after, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def _valid(self, segments, q) -> tuple[jax.Array, jax.Array]:
        """Which tokens are no padding [B,T], and rows of more sequences [B,1,1,1]."""
        if self.causal and segments is not None:
            raise NotImplementedError(
                "segments: convolutions and the mean of all values run over a row, "
                "which has one sequence without padding in causal order"
            )
        return one_sequence(segments, q)

    def _context(self, estimate: Estimate, q, k, v, before=None, new=None):
        """The output [B,T,H,V] of rows q over all keys k, v; before [B,K',V]: the sum
        of the values before the new ones, of a stream."""
        # without an order the authors' code scales beside a teacher only; here always
        h, scale = q.shape[2], q.shape[3] ** -0.5 if self.scale is None else self.scale
        most = estimated.most_kept(
            q.shape[1] if self.causal and before is None else k.shape[1], h,
            self.columns, self.keep)
        order = None
        if not self.causal:
            # valid keys first, in their order
            order = jnp.argsort(~estimate.valid, axis=1, stable=True).astype(jnp.int32)
        read = functools.partial(estimated.read, scale=scale, most=most)
        axis = self.axis
        if axis is not None and q.shape[1] == 1:
            axis = None  # one token is read in the global view

        def xla():
            f = over_mesh(read, "BT B B BT BT B -> BT", axis)
            return f(q, k, v, self.selected(estimate), estimate.length, order)

        o = pick(self.implementation, xla=xla)
        if not self.gated:
            return o
        g = estimate.gates
        mean = jnp.repeat(self._mean(estimate, v if new is None else new, before),
                          h // v.shape[2], 2) if self.causal else self._average(
                              estimate, v, h)
        # gates [B,T,H,1] each, o [B,T,H,V], mean [B,T|1,H,V]
        return g[..., 1:] * g[..., :1] * o + (1 - g[..., 1:]) * mean

    def _mean(self, estimate: Estimate, v, before) -> jax.Array:
        """The mean of all values up to each token [B,T,K',V]."""
        sums = jnp.cumsum(v.astype(jnp.float32), 1)
        sums = sums if before is None else sums + before[:, None]
        return sums / estimate.length[..., None, None].astype(jnp.float32)

    def _average(self, estimate: Estimate, v, h: int) -> jax.Array:
        """The values by how much all tokens look at each column, [B,1,H,V]; as the
        authors have it the weights do not sum to one."""
        rows = estimate.valid.sum(1, dtype=jnp.float32)[:, None, None]
        rows = jnp.maximum(rows, v.shape[1] if self.count_padding else 1)
        p = self.shares(estimate).sum(1) / rows  # [B,H,K]
        length = estimate.valid.sum(1, dtype=jnp.int32)[:, None]
        rank = jnp.cumsum(estimate.valid, 1, dtype=jnp.int32) - 1
        w = estimated.stretched(p[:, None], length, rank)[:, :, 0]  # [B,H,S]
        w = jnp.where(estimate.valid[:, None], w, 0)
        v = jnp.repeat(v.astype(jnp.float32), h // v.shape[2], 2)
        # [B,H,S] x [B,S,H,V] -> [B,1,H,V]
        return jnp.einsum("bhs,bshv->bhv", w, v)[:, None]

    def distil(self, q, k, v, scores, context, *, segments=None) -> jax.Array:
        """The loss against a teacher's logits `scores` [B,H,T,T], scaled, and its
        output `context` [B,T,H,V], a number; memory T^2, as the teacher's."""
        valid, _ = self._valid(segments, q)
        estimate, _ = self._estimate(q, k, v, valid, None)
        return self._distil(estimate, q, k, v, scores, context)

    def _distil(self, estimate: Estimate, q, k, v, scores, context):
        valid = estimate.valid
        scores, context = (
            jax.lax.stop_gradient(a.astype(jnp.float32)) for a in (scores, context))
        t = q.shape[1]
        rank = jnp.cumsum(valid, 1, dtype=jnp.int32) - 1
        length = estimate.length if self.causal else jnp.broadcast_to(
            valid.sum(1, dtype=jnp.int32)[:, None], valid.shape)
        own = estimated.stretched(estimate.scores, length, rank)  # [B,H,T,S]
        seen = jnp.broadcast_to(valid[:, None, None], (q.shape[0], 1, t, t))
        if self.causal:
            seen = seen & jnp.tril(jnp.ones((t, t), bool))[None, None]
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        keys = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
        # [B,T,H,D] x [B,S,H,D] -> [B,H,T,S], S = T
        dense = scale * jnp.einsum("bthd,bshd->bhts", q, keys)
        every = valid | self.count_padding
        # the same two terms of the estimate, and of the exact logits
        both = sum(estimated.losses(s, scores, seen, valid, every, self.causal)
                   for s in (own, dense))
        o = self._context(estimate, q, k, v)
        return both + ((o - context) ** 2).mean()
