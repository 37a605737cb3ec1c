"""ProbSparse (Zhou et al., 2020) arXiv:2012.07436: only queries that stand out look.

Most queries of a long series look at all keys alike, and what such a query gets is the
mean of the values. How far a query is from that is estimated on a few keys that are
sampled for it; the u most distant queries attend exactly, all others get the mean:

    M_t = max_j q_t.k_i(t,j) - sum_j q_t.k_i(t,j) / S,    j = 1 ... U,
    u = min(T, f ceil(ln T)),    U = min(S, f ceil(ln S))

The sum is divided by S, not by U, as in the authors' code.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.one_sequence import one_sequence
from attn.contract.shapes import check
from attn.exact.dense import weights
from attn.parallel.sharding import Axis, mesh_of
from attn.sparse.long_short import blocks

TILE = 256  # queries whose samples are gathered at once


@dataclasses.dataclass(frozen=True)
class ProbSparse(Attention):
    """ProbSparse (Zhou et al., 2020) arXiv:2012.07436: a few queries attend exactly.

    factor: f. Keys are sampled uniformly, with repetition, for each position, alike for
    rows and heads: by the `key` of a call, else by `seed`, or as `samples` [T,U] say.
    The choice has no gradient. A short sequence (f ceil(ln T) >= T) is attended to
    exactly. It has no causal order, as all queries compete, and no cross attention
    here. Of padded rows (proposed here) T and S count real tokens; several sequences in
    a row are refused. Over an `axis` it is left to XLA, which gathers the keys.
    """

    factor: int = 5
    seed: int = 0
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    causal = False
    crosses = False
    noise = ("factor",)
    row = TemplateRow(MASKED, "L D log L", 1)

    def __post_init__(self):
        check_fields(self, least={"factor": 1})

    def __call__(self, q, k, v, *, x=None, segments=None, key=None, samples=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V].
        segments: 0 for padding, of rows of one sequence; samples [T,U]: which keys, of
        the real ones, each position is judged by."""
        check(q, k, v, segments=segments, aligned=True)
        if self.axis is not None:
            mesh_of(self.axis)  # raises without a mesh
        t = q.shape[1]
        if samples is not None and samples.shape != (t, self.number(t)):
            raise ValueError(
                f"samples has shape {samples.shape}: expected {(t, self.number(t))}")
        real, mixed = one_sequence(segments, q)
        xla = functools.partial(self._attend, q, k, v, real, key, samples)
        o = pick(self.implementation, xla=xla)
        return jnp.where(mixed, jnp.nan, o).astype(v.dtype)

    def number(self, t: int) -> int:
        """u = U, of t tokens."""
        return min(t, max(self.factor * math.ceil(math.log(t)), 1))

    def _numbers(self, n: jax.Array) -> jax.Array:
        """u = U [B] int32 of n [B] real tokens."""
        table = jnp.log(jnp.maximum(n, 1).astype(jnp.float32))
        few = self.factor * jnp.ceil(table).astype(jnp.int32)
        return jnp.minimum(n, jnp.maximum(few, 1))

    def _attend(self, q, k, v, real, key, samples) -> jax.Array:
        (b, t, h, d), heads = q.shape, k.shape[2]
        scale = d**-0.5 if self.scale is None else self.scale
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        most, n = self.number(t), real.sum(1, dtype=jnp.int32)
        few = jnp.minimum(self._numbers(n), most)  # [B]
        spread = jax.lax.stop_gradient(self._spread(q, k, real, n, few, key, samples))
        best, at = jax.lax.top_k(spread.swapaxes(1, 2), most)  # [B,H,u]
        taken = jnp.take_along_axis(q.swapaxes(1, 2), at[..., None], 2)  # [B,H,u,D]
        grouped = taken.reshape(b, heads, -1, d)  # [B,K,G u,D]
        logits = scale * jnp.einsum("bkrd,bskd->bkrs", grouped, k)
        p = weights(logits, real[:, None, None])
        found = jnp.einsum("bkrs,bskv->bkrv", p, v).reshape(b, h, most, -1)
        # what all others get [B,1,H,V]
        count = jnp.maximum(n, 1).astype(jnp.float32)[:, None, None, None]
        mean = v.sum(1, keepdims=True) / count
        o = jnp.broadcast_to(
            jnp.repeat(mean, h // heads, 2), (b, t, h, v.shape[-1])).swapaxes(1, 2)
        # fewer than there is room for in a padded row: the rest is written nowhere
        chosen = jnp.arange(most, dtype=jnp.int32)[None, None] < few[:, None, None]
        at = jnp.where(chosen, at, t)
        put = jax.vmap(jax.vmap(lambda o, at, new: o.at[at].set(new, mode="drop")))
        return put(o, at, found).swapaxes(1, 2)

    def _spread(self, q, k, real, n, few, key, samples) -> jax.Array:
        """M [B,T,H], -inf at padding; a tile of queries at a time."""
        (b, t, h, _), heads = q.shape, k.shape[2]
        u = self.number(t)
        if samples is None:
            key = jax.random.key(self.seed) if key is None else key
            shares = jax.random.uniform(key, (t, u), jnp.float32)
            count = n[:, None, None].astype(jnp.float32)
            rank = (shares[None] * count).astype(jnp.int32)  # [B,T,U]
            rank = jnp.minimum(rank, jnp.maximum(n - 1, 0)[:, None, None])
        else:
            rank = jnp.broadcast_to(samples.astype(jnp.int32)[None], (b, t, u))
        # the real tokens of a row, in their order
        order = jnp.argsort(~real, axis=1, stable=True).astype(jnp.int32)
        sampled = jnp.arange(u, dtype=jnp.int32)[None, None, None] < (
            few[:, None, None, None])

        keys_of_row = jnp.maximum(n, 1).astype(jnp.float32)

        def tile(args):
            q, rank = args  # [B,c,H,D] [B,c,U]
            where = jax.vmap(lambda row, at: row[at])(order, rank)
            keys = jax.vmap(lambda row, at: row[at])(k, where)  # [B,c,U,K,D]
            grouped = q.reshape(*q.shape[:2], heads, -1, q.shape[-1])
            s = jnp.einsum("bckgd,bcukd->bckgu", grouped, keys)
            s = s.reshape(*q.shape[:3], u)
            top = jnp.where(sampled, s, -jnp.inf).max(-1)
            total = jnp.where(sampled, s, 0).sum(-1)
            return top - total / keys_of_row[:, None, None]

        c = min(TILE, t)
        spread = jax.lax.map(tile, (blocks(q, c), blocks(rank, c)))  # [N,B,c,H]
        spread = spread.swapaxes(0, 1).reshape(b, -1, h)[:, :t]
        return jnp.where(real[..., None], spread, -jnp.inf)
