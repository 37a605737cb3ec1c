"""Relative, of Music Transformer (Huang et al., 2018) arXiv:1809.04281: a learned
vector for each distance, in memory linear in the length.

Music repeats itself shifted: what counts is how far back something was. A query is
compared with each key, and with the vector of its distance:

    s_ij = D^-0.5 (q_i.k_j + q_i.e_(i-j)),    o_i = sum_j p_ij (v_j + w_(i-j))

(w only on request). Shaw et al. (arXiv:1803.02155) write e out for all pairs, T T D
numbers. Here the products q E^T are skewed into place, a tile at a time
(`attn/exact/distances.py`). A block length makes it local: a token sees its own block
up to itself and the whole one before.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.rolling_slots import rolling_slots
from attn.contract.attention import EXACT, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.exact.attend import attend
from attn.exact.distances import Distances
from attn.masks import BlockCausal, Causal, Full, Mask
from attn.parallel.sharding import Axis, gather, mesh_of, over_mesh, spread_heads
from pallas_kernels.arrays import check_logits
from pallas_kernels.logits import LogitSpec, Where


class Relative(nn.Module, Attention):
    """Relative, of Music Transformer (Huang et al., 2018) arXiv:1809.04281: exact
    attention with a learned vector for each distance.

    reach: distances 0 to reach - 1 have a vector; a farther key has none, that is 0,
    not the last one's. Parameters: `distances` [H,R,D], or [1,R,D] if heads are
    `shared`, of deviation D^-0.5, the last row of distance 0, so that a model of short
    texts has the last rows of one of long ones; with `by_value`, `distance_values`
    [H|1,R,V] beside the values, too. block: m of the local form, whose distances are
    below 2 m (the authors' table has 4 m rows: reach=4 * m); None for the global one.
    causal=False, of the global one: R is 2 reach - 1, the last rows of keys that come
    later. Its distances are between tokens of one sequence: there is no cross
    attention.

    Packed segments and streams are proposed here. No kernel says distances: XLA's tiles
    do, and on a mesh keys are gathered. A stream compares with all `reach` vectors and
    takes the products of the slots that are there; how it is split is left to XLA.
    """

    reach: int = 512
    shared: bool = False
    by_value: bool = False
    block: int | None = None
    causal: bool = True
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    crosses = False  # a key of another sequence is at no distance
    row = TemplateRow(EXACT, "L^2 D", 2)

    @property
    def weightless(self) -> Any:
        """Why there is no matrix A with o = A v, if there is none."""
        return "vectors of distances are added to v" if self.by_value else None
    parameter_axes = {"distances": "HRD", "distance_values": "HRD"}

    def __post_init__(self):
        check_fields(self, least={"reach": 1, "block": 1})
        if self.block is not None and not self.causal:
            raise ValueError(
                f"Relative: block={self.block}, causal=False: expected block=None, as "
                "the local form is causal")
        super().__post_init__()

    @property
    def visible(self) -> Mask:
        """The mask: of a text shorter than two blocks both forms see the same."""
        if not self.causal:
            return Full()
        own = Causal()
        return own if self.block is None else own & BlockCausal(self.block, 1)

    def __call__(self, q, k, v, *, x=None, segments=None, pairwise_bias=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V].

        pairwise_bias [B|1,H|1,T,T] is added to the logits: of other relations of two
        tokens, such as pitch and time (the paper's for chorales); not over an axis.
        """
        check(q, k, v, segments=segments, aligned=True)
        check_logits(q, k, bias=pairwise_bias)
        b, t, h, _ = q.shape
        tables = self._tables(q, v)
        index = jnp.arange(t, dtype=jnp.int32)[None]
        pos = segment = None
        if segments is not None or self.axis is not None:
            now = locate(segments, b, t)
            pos, segment = now.pos, None if segments is None else now.segment
        if self.axis is not None and pairwise_bias is not None:
            raise NotImplementedError(
                "pairwise_bias over a mesh axis: its keys do not travel")
        k, v = (spread_heads(a, h, self.axis) for a in (k, v))
        shared = "." if self.shared else "H"
        letters = f"BTHD BSKD BSKV .T BT BT {shared}.. {shared}.. . -> BTHV"
        f = over_mesh(self._local, letters, self.axis)
        return f(q, k, v, index, pos, segment, *tables, pairwise_bias)

    def _local(self, q, k, v, index, pos, segment, keys, values, bias) -> jax.Array:
        k, v, kv_pos, kv_segment = (
            gather(a, self.axis) for a in (k, v, pos, segment))
        where = Where(pos, kv_pos, segment, kv_segment)
        if segment is None and self.axis is None:
            where = Where()
        # key 0 stands at the row's beginning, query 0 where this shard begins; where
        # padding may stand inside a sequence, places in the row do not count
        first = index[0, 0] if segment is None else None
        # row reach - 1 is e_0
        distances = Distances(keys, values, self.reach - 1, first)
        return attend(
            q, k, v, self._spec, where, bias=bias, distances=distances,
            implementation=self.implementation)[0]

    @property
    def _spec(self) -> LogitSpec:
        # one scale, of q.k and of q.e
        return LogitSpec(self.visible, self.scale)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, of the local form of two blocks; q, k, v
        give shapes and dtypes."""
        self.check_stream()
        caches.check_size(size)
        return caches.empty(k, v, rolling_slots(self.visible, size).slots)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True, piece=True)
        caches.check_fits(state, k, v)
        if self.axis is not None:
            mesh_of(self.axis)  # how a step is split is left to the compiler
        (b, t), slots = q.shape[:2], state.k.shape[1]
        now = locate(segments, b, t, state.end, state.segment)
        ring = rolling_slots(self.visible, slots)
        if not ring.endless:
            caches.check_room(now.next_pos, slots)
        tables = self._tables(q, v)
        after = caches.append(state, k, v, now, ring.slot(now))
        both, segment = caches.concat(state, k, v, now)
        if t == 1:
            # the token's own sequence is all that is left in the cache
            newest = now.segment.max(1, keepdims=True)
            both, segment = after, jnp.broadcast_to(newest, (b, slots))
        both, q = caches.of_one_type(both, q)
        where = Where(now.pos, both.pos, now.segment, segment)
        o = attend(
            q, both.k, both.v, self._spec, where,
            distances=Distances(*tables, self.reach - 1),
            implementation=self.implementation)[0].astype(v.dtype)
        return after, o if ring.endless else caches.poison(o, now.next_pos, slots)

    @nn.compact
    def _tables(self, q, v) -> tuple[jax.Array, Any]:
        """e [H|1,R,D], and w [H|1,R,V] or None."""
        heads = 1 if self.shared else q.shape[2]
        # distances 0 to reach - 1, without an order -(reach - 1) to reach - 1
        rows = self.reach if self.causal else 2 * self.reach - 1
        draw = functools.partial(self._drawn, heads, rows)
        values = draw("distance_values", v.shape[3]) if self.by_value else None
        return draw("distances", q.shape[3]), values

    def _drawn(self, heads: int, rows: int, name: str, width: int) -> jax.Array:
        # e and w [H|1,R,width]
        init = nn.initializers.normal(width**-0.5)
        return self.param(name, init, (heads, rows, width), jnp.float32)
