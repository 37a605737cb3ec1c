"""Routing Transformer (Roy et al., 2020) arXiv:2003.05997: attention among the tokens
of a cluster.

Queries and keys are compared with centroids, which learn by online k-means. Each
centroid gathers the tokens that are nearest to it, and these attend to one another: who
reads whom is a matter of content, at a cost of T^1.5 with sqrt(T) clusters. Other heads
read their neighbourhood.

    q, k <- LayerNorm(q), LayerNorm(k);   members of c: the w tokens with the largest
    q.mu_c, and the w with the largest k.mu_c;   o_t = sum over the clusters of t of
    softmax(q_t.k_members) v_members / (number of clusters + eps)

Centroids are state and no parameters: the collection "centroids" of a module's
variables, which changes where it is mutable, as in
`module.apply(variables, q, k, v, mutable=["centroids", "losses"])`, together with the
commitment loss, sown into "losses".
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.cache.kv import Cache, check_size
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.masks import BlockCausal, Causal, Mask
from attn.parallel.sharding import Axis, devices_of, gather, over_mesh
from attn.softmax import Softmax
from attn.sparse import kmeans, lists as listed, routed
from attn.sparse.kmeans import LAYER, NORMS, UNIT, OnlineKMeans
from attn.sparse.lists import Lists
from attn.sparse.routed import Routes

WHOLE, PREFIX = "whole", "prefix"


class RoutingState(NamedTuple):
    """lists: the members of each cluster; local: of local heads, a `Cache` that is a
    ring, or None; end [B] int32 the next token's position; segment [B] int32 the last
    token's segment, -1 before the first."""

    lists: Lists | None
    local: Cache | None
    end: jax.Array
    segment: jax.Array


class Routing(nn.Module, Attention):
    """Routing Transformer (Roy et al., 2020) arXiv:2003.05997: clusters of tokens.

    clusters C, window w: members of each, None for T / C. members: "whole", among all
    tokens, as published, or "prefix", among those up to the token. local: the last so
    many heads are local: softmax over blocks of local_block tokens, the own one and
    `flange` before it (and behind it, without an order). share_qk: keys are the queries
    and k is not read. norm: "layer", or "unit" as in a public reimplementation
    (lucidrains, routing-transformer), which routes by directions, attends with q and k
    as they are at D^-0.5, and, if they are shared, with keys of length 1 and to the
    token itself only if there is no other. eps: added to the number of clusters of a
    token. memory: learned keys and values in front of each cluster's (of "unit").
    decay: of the moving averages. beta: of the commitment loss.

    **Members of "whole" are chosen among later tokens, too**: with `causal` a query
    reads no later key, but a later token can take an earlier one's place, so that
    changing it changes outputs before it, though by no gradient. A stream cannot do
    that: `step` always routes as "prefix" does, which equals "whole" only while windows
    hold all tokens. "prefix", which is proposed here and costs more, never looks ahead.
    Also proposed: packed rows, in which each sequence has members of its own (up to T
    of a cluster); with K < H key heads, keys are repeated and routed a query head each.
    Relative positions and strided heads of the authors' code are left out.
    """

    clusters: int = 16
    window: int | None = None
    members: str = WHOLE
    local: int = 0
    local_block: int = 256
    flange: int = 1
    share_qk: bool = True
    causal: bool = True
    norm: str = LAYER
    memory: int = 0
    eps: float = 0.01
    decay: float = 0.999
    beta: float = 1e-4
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    crosses = property(lambda self: not self.share_qk)
    mixes = True  # members of a cluster are chosen among all queries
    # any later token can take an earlier one's place among the members of "whole"
    ahead = property(lambda self: 0 if self.members == PREFIX else None)
    row = TemplateRow(MASKED, "L C D + C w^2 D", 2)
    parameter_axes = {
        "kmeans/mean": "HRD", "kmeans/total": "HRD", "kmeans/number": "HR",
        "memory_[kv]": "HRTD",
    }

    def __post_init__(self):
        least = {"clusters": 1, "window": 1, "local": 0, "local_block": 1, "flange": 0,
                 "memory": 0, "eps": 0, "decay": 0, "beta": 0}
        check_fields(self, least=least, choices={
            "members": (WHOLE, PREFIX), "norm": NORMS})
        for given, what in (
            (self.memory and self.norm != UNIT, f"memory={self.memory}, norm="
             f"{self.norm!r}: expected norm='unit' with a memory"),
            (self.members == PREFIX and not self.causal, "members='prefix', causal="
             "False: expected members='whole' without an order"),
        ):
            if given:
                raise ValueError(f"Routing: {what}")
        super().__post_init__()

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]; S is
        T but without an order and sharing."""
        aligned = self.causal or self.share_qk
        check(q, k, v, segments=segments, aligned=aligned)
        far, near = self._split(q, k, v)
        q_seg, kv_seg = segment_indices(segments, q, aligned)
        parts = []
        if far is not None:
            parts.append(self._routed(far, q_seg, kv_seg))
        if near is not None:
            parts.append(self._local(near)(*near, segments=segments))
        return jnp.concatenate(parts, 2)

    def _routed(self, far, q_seg, kv_seg) -> jax.Array:
        """All tokens at once, of heads that are routed."""
        q, k, v = far
        q, k, found = self._vectors(q, k)
        real = [s if s is None else s > 0 for s in (q_seg, kv_seg)]
        mean, memory = self._learned(found, v, real)
        w = self.window or -(-k.shape[1] // self.clusters)
        routes, t = self._routes(w, q, memory), q.shape[1]
        if self.members == WHOLE:
            # each device reads for its share of the members
            size = t if q_seg is not None else min(w, t)
            devices, local = devices_of(self.axis), self._whole
            number = jnp.arange(-(-size // devices) * devices, dtype=jnp.int32)
        else:
            number, local = jnp.arange(t, dtype=jnp.int32), self._prefix
        # q, k, v, what routes queries and keys, centroids, segments, memory
        letters = "T BTHD BSHD BSHV BTHD BSHD H BT BS H -> BTHV BTH"
        given = (number, q, k, v.astype(jnp.float32), found[0],
                 found[1] if len(found) > 1 else None, mean, q_seg, kv_seg, memory)
        local = functools.partial(local, routes)
        o, count = pick(
            self.implementation,
            xla=lambda: over_mesh(local, letters, self.axis)(*given))
        return self._mean(o, count, v)

    def _whole(self, routes, number, *given) -> tuple:
        """What this shard's tokens get, of members that are chosen among all."""
        *others, mean, q_seg, kv_seg, memory = given
        q, k, v, by_q, by_k, q_seg, kv_seg = (
            gather(a, self.axis) for a in (*others, q_seg, kv_seg))
        w, t = routes.window, q.shape[1]
        q_at = k_at = routed.members(kmeans.scores(by_q, mean), w, q_seg)  # [B,H,C,M]
        if by_k is not None:
            k_at = routed.members(kmeans.scores(by_k, mean), w, kv_seg)
        routes = routes._replace(memory=memory)
        if self.axis is None:
            return routed.whole(q, k, v, q_at, k_at, routes, (q_seg, kv_seg))
        # t names no token
        mine = jnp.pad(q_at, ((0, 0),) * 3 + ((0, number.size),), constant_values=t)
        found = routed.whole(
            q, k, v, mine[..., number], k_at, routes, (q_seg, kv_seg))
        # the sum over all devices' members: [B,T,H,.] -> this shard's rows of it
        return tuple(jax.lax.psum_scatter(
            a, self.axis, scatter_dimension=1, tiled=True) for a in found)

    def _prefix(self, routes, number, *given) -> tuple:
        """What this shard's tokens get, of members up to each. The members are those of
        all earlier tokens: every device goes through all of them."""
        *others, mean, segment, _, memory = given
        q, k, v, by_q, by_k, segment = (
            gather(a, self.axis) for a in (*others, segment))
        if segment is None:
            segment = jnp.ones(q.shape[:2], jnp.int32)
        score = kmeans.scores(by_q, mean)  # [B,H,C,T]
        other = score if by_k is None else kmeans.scores(by_k, mean)
        lists = listed.empty(k, v, mean.shape[1], routes.window)
        _, *found = listed.prefix(
            lists, q, k, v, score, other, segment, routes._replace(memory=memory))
        return tuple(a[:, number] for a in found)  # this shard's rows

    def init_state(self, size, q, k, v, *, x=None) -> RoutingState:
        """An empty memory: lists of `window` members (None: size / clusters, up) a
        cluster and query head, and a ring for local heads, whatever the size."""
        check_size(size)
        self.check_stream()
        like = jax.eval_shape(self._split, q, k, v)
        (far, near), lists, local = like, None, None
        if far is not None:
            w = self.window or -(-size // self.clusters)
            lists = listed.empty(far[1], far[2], self.clusters, w)
        if near is not None:
            local = self._local(near).init_state(2**30, *near)
        b = q.shape[0]
        return RoutingState(
            lists, local, jnp.zeros((b,), jnp.int32), jnp.full((b,), -1, jnp.int32))

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V], routed as with members="prefix"."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self.check_stream()
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        far, near = self._split(q, k, v)
        lists, local, parts = None, None, []
        if far is not None:
            q, k, v = far
            q, k, found = self._vectors(q, k)
            mean, memory = self._learned(found, v)
            routes = self._routes(state.lists.score.shape[-1], q, memory)
            score = kmeans.scores(found[0], mean)  # [B,H,C,T]
            other = score if len(found) == 1 else kmeans.scores(found[1], mean)
            # the sequence that goes on has index 1
            held = state.lists._replace(segment=jnp.ones_like(state.end))
            lists, o, count = pick(self.implementation, xla=lambda: listed.prefix(
                held, q, k, v, score, other, now.segment, routes))
            lists = lists._replace(segment=jnp.ones_like(state.end))
            parts.append(self._mean(o, count, v))
        if near is not None:
            local, o = self._local(near).step(state.local, *near, segments=segments)
            parts.append(o)
        state = RoutingState(lists, local, now.next_pos, now.last_segment)
        return state, jnp.concatenate(parts, 2)

    def _split(self, q, k, v) -> tuple:
        """(q, k, v) of routed and of local heads, None if there are none; k and v have
        H heads."""
        h = q.shape[2]
        if self.local > h:
            raise ValueError(f"local={self.local}: expected at most H={h} heads")
        k = q if self.share_qk else jnp.repeat(k, h // k.shape[2], 2)
        v = jnp.repeat(v, h // v.shape[2], 2)
        n = h - self.local
        far, near = ([a[:, :, part] for a in (q, k, v)]
                     for part in (slice(n), slice(n, None)))
        return far if n else None, near if self.local else None

    def _local(self, near) -> Softmax:
        """Attention of local heads."""
        behind = 0 if self.causal else self.flange
        mask: Mask = BlockCausal(self.local_block, self.flange, behind)
        return Softmax(
            Causal() & mask if self.causal else mask, self.scale, axis=self.axis,
            implementation=self.implementation,
        )

    @nn.compact
    def _learned(self, found: list, v, real=None) -> tuple:
        """The centroids [H,C,D], and the memory of each cluster, or None."""
        follow = OnlineKMeans(
            self.clusters, self.norm, self.decay, self.beta, name="kmeans")
        mean, memory = follow(found, real), None
        if self.memory:
            memory = tuple(
                self.param(f"memory_{n}", nn.initializers.normal(1.0),
                           (*mean.shape[:2], self.memory, width), jnp.float32)
                for n, width in (("k", mean.shape[2]), ("v", v.shape[3])))
        return mean, memory

    def _vectors(self, q, k) -> tuple:
        """q and k as they are attended with, and as they are routed by: of queries
        and, if they are others, of keys."""
        qn = kmeans.normalised(q, self.norm)
        kn = qn if self.share_qk else kmeans.normalised(k, self.norm)
        found = [qn] if self.share_qk else [qn, kn]
        if self.norm == LAYER:
            return qn, kn, found
        return q.astype(jnp.float32), (
            kn if self.share_qk else k.astype(jnp.float32)), found

    def _routes(self, window: int, q, memory) -> Routes:
        # vectors of layer norm have length sqrt(D): that is the scale
        own = 1.0 if self.norm == LAYER else q.shape[-1] ** -0.5
        return Routes(
            window, own if self.scale is None else self.scale, self.causal,
            self.norm == UNIT and self.share_qk, self.eps, memory)

    def _mean(self, o, count, v) -> jax.Array:
        """What a token gets, of its clusters; 0 if it is in none."""
        # a mean over its clusters, with eps beside their number
        many = jnp.where(count > 0, count + self.eps, 1)
        return (o / many[..., None]).astype(v.dtype)
