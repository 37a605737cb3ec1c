"""Recycled Attention (Xu et al., 2024) arXiv:2411.05787: few full steps, many cheap.

What one token attends to, the next tokens attend to as well. So only now and then a
token reads the whole cache; the `capacity` keys that it gives most weight to are copied
aside, and the tokens after it read these and what came since. Nothing is lost: the next
full step chooses anew among all keys. Memory is not saved, bytes read are: of `stride`
tokens one reads L keys and the others `capacity`. Nothing is learned.

    full step:     o = attention over all L keys, then C_r = top_K of this token's row
    recycle step:  o = attention over C_r and the token, then its least weight goes

A full step is every `stride`-th token, or, if similarity is asked for, one of which a
look every `check_every` tokens finds the query less than `threshold` like that of the
last full step. What the paper's text leaves open is proposed here: rows of a group are
joined by their maximum (or mean), the token itself is not evicted in its own step, and
queries are compared with all heads concatenated, row by row of the batch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import evict, kv as caches, observed
from attn.cache.evict import Scored
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.calls import refuse_keywords
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact import dense
from attn.exact.dense import logits, values, weights
from attn.softmax import Softmax
from pallas_kernels.arrays import check_logits

SCHEDULES = ("stride", "similarity")


@caches.of_cache
class RecycledState(NamedTuple):
    """A cache of all tokens; the recycled one, with a free slot; the query of the last
    full step asked [B,H,D] float32; since [B] int32: tokens behind the prompt."""

    cache: Cache
    few: Scored
    asked: jax.Array
    since: jax.Array


@dataclasses.dataclass(frozen=True)
class Recycled(Softmax):
    """Recycled Attention (Xu et al., 2024) arXiv:2411.05787: full steps now and then.

    capacity: keys that a key head reads between full steps; schedule: "stride", every
    stride-th token is a full step, or "similarity", with check_every and threshold (of
    a cosine). group: how the rows of a group are joined, "max" or "mean". The other
    fields are those of `Softmax`. All keys stay in memory; rows of weights are made in
    plain jnp, so the kernels do not run in a step.
    """

    capacity: int = 2048
    schedule: str = "stride"
    stride: int = 50
    check_every: int = 5
    threshold: float = 0.8
    group: str = "max"
    part = "reading"
    refuses = {
        "selection": "it selects itself, which copies are read until the next full "
                     "step",
        "storage": "the keys that it reads are copies, as they are, beside all others",
    }
    row = TemplateRow(MASKED, "L^2 D, then (L / b + r) D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(
            self, least={"capacity": 1, "stride": 1, "check_every": 1},
            choices={"schedule": SCHEDULES, "group": ("max", "mean")})

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, and for those that are recycled."""
        caches.check_size(size)
        b, _, h, d = q.shape
        few = evict.empty(k, v, min(self.capacity, size) + 1)
        return RecycledState(caches.empty(k, v, size), few,
                             jnp.zeros((b, h, d), jnp.float32),
                             jnp.zeros((b,), jnp.int32))

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None, **unknown
    ):
        """The next T tokens -> state, [B,T,H,V]: a piece is read exactly, and its last
        token chooses what is recycled."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        cache, slots = state.cache, state.k.shape[1]
        caches.check_fits(cache, k, v)
        now = locate(segments, q.shape[0], q.shape[1], cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        after = caches.append(cache, k, v, now, now.pos)
        if q.shape[1] > 1:
            o = self.read(*caches.concat(cache, k, v, now), q, now, sink=sink)
            last, there = observed.last_queries(q, now)
            full = self._full(after, last, there, sink)[0]
            begun = there.segment[:, 0] > 0
            state = chosen(begun, RecycledState(
                after, full, last[:, 0].astype(jnp.float32),
                jnp.zeros_like(state.since)), state._replace(cache=after))
        else:
            state, o = self._token(state, after, q, k, v, now, sink)
        return state, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def asks(self, state: RecycledState, q, now: TokenPositions) -> jax.Array:
        """Which rows [B] take a full step for the token q [B,1,H,D]."""
        many = state.since + 1
        if self.schedule == "stride":
            due = many % self.stride == 0
        else:
            new, old = (a.astype(jnp.float32).reshape(a.shape[0], -1)
                        for a in (q, state.asked))
            size = jnp.linalg.norm(new, axis=1) * jnp.linalg.norm(old, axis=1)
            # the cosine of all heads' queries side by side [B,H D]
            like = (new * old).sum(1) / jnp.where(size > 0, size, 1)
            due = (many % self.check_every == 0) & (like < self.threshold)
        real = now.segment[:, 0] > 0
        return real & (due | (now.segment[:, 0] > 1))  # or a sequence begins

    def _token(self, state: RecycledState, after: Cache, q, k, v, now, sink):
        """One token: rows that ask read all, the others what is recycled."""
        asks = self.asks(state, q, now)

        def recycle():
            few, o = self._recycle(state.few, q, k, v, now, sink)
            return few, state.asked, o

        def full():
            # of the rows that did not ask nothing changes
            few, o = self._full(after, q, now, sink)
            own = few, q[:, 0].astype(jnp.float32), o
            return chosen(asks, own, recycle())

        few, asked, o = jax.lax.cond(asks.any(), full, recycle)
        began, real = now.segment[:, 0] > 1, now.segment[:, 0] > 0
        since = jnp.where(began, 0, state.since + real.astype(jnp.int32))
        return RecycledState(after, few, asked, since), o

    def _full(self, cache: Cache, q, now: TokenPositions, sink):
        """(what is recycled, o) of a full step of q [B,1,H,D]; cache has its token."""
        segment = jnp.broadcast_to(now.segment, cache.k.shape[:2])
        o, importance = self._found(cache, segment, q, now, sink)
        budget = min(self.capacity, cache.k.shape[1])
        pos = jnp.broadcast_to(cache.pos, importance.shape)
        every = Scored(cache._replace(pos=pos), jnp.zeros_like(importance))
        # C_r: the keys with the greatest weights, and one free slot
        few = evict.best(every, importance, budget, budget + 1)
        return few, o

    def _recycle(self, few: Scored, q, k, v, now: TokenPositions, sink):
        """(what is recycled, o) of a recycle step."""
        few = evict.put(few, k, v, now)
        segment = jnp.broadcast_to(now.segment, few.cache.k.shape[:2])
        o, importance = self._found(few.cache, segment, q, now, sink)
        # the token itself stays in its own step
        importance = jnp.where(few.cache.pos == now.pos[..., None], jnp.inf, importance)
        return evict.drop_one(few, importance, few.cache.k.shape[1] - 1), o

    def _found(self, cache: Cache, segment, q, now: TokenPositions, sink):
        """o [B,1,H,V], and the weight that each slot gets from a group [B,C,K]."""
        cache, wide = caches.of_one_type(cache, q)
        p = observed.row_weights(wide, cache, segment, now, self._spec(), sink)
        group = observed.by_group(p, cache.k.shape[2])  # [B,C,K,G]
        importance = group.max(3) if self.group == "max" else group.mean(3)
        o = dense.values(p, cache.v).astype(q.dtype)
        return o, jax.lax.stop_gradient(importance)

    def trained(self, q, k, v) -> jax.Array:
        """All tokens as the stream reads them, for training that goes on: [B,T,H,V].

        Proposed, not published in detail: of every `stride` tokens the last one sees
        all; the others those of their own stride, and what the last token of the stride
        before chose, without a gradient of the choice. In plain jnp, memory T^2.
        """
        for name in ("mask", "score", "softcap"):
            if getattr(self, name) is not None:
                raise NotImplementedError(
                    f"trained: {name}={getattr(self, name)} is not there yet")
        b, t, h, _ = q.shape
        heads, i = k.shape[2], jnp.arange(t)
        causal = i[None] <= i[:, None]
        s = logits(q, k, self.scale)
        p = jax.lax.stop_gradient(weights(s, causal[None, None]))
        ends = jnp.arange(self.stride - 1, t, self.stride)
        p = p[:, :, ends].reshape(b, heads, h // heads, len(ends), t)  # [B,K,G,N,T]
        importance = p.max(2) if self.group == "max" else p.mean(2)
        best, at = jax.lax.top_k(importance, min(self.capacity, t))
        set_ = at[..., None] == i[None, None, None, None]  # [B,K,N,capacity,T]
        set_ = (set_ & (best > 0)[..., None]).any(-2)  # [B,K,N,T]
        # of stride n what stride n - 1 chose; in the first one all that is causal
        first = jnp.zeros((b, heads, 1, t), bool)
        set_ = jnp.concatenate([first, set_], 2)[:, :, i // self.stride]
        # [T,T]: of one stride
        own = i[None] // self.stride == i[:, None] // self.stride
        # the last token of a stride takes a full step
        whole = (i % self.stride == self.stride - 1)[:, None]
        seen = causal[None, None] & (set_ | (own | whole)[None, None])
        return values(weights(s, jnp.repeat(seen, h // heads, 1)), v)


def chosen(rows: jax.Array, a, b):
    """The rows [B] of a where True, else those of b."""
    return jax.tree.map(
        lambda x, y: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y), a, b)
