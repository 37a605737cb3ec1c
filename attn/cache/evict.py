"""Evict: a cache of a fixed number of slots, out of which one token goes for each that
comes.

There is one slot more than tokens are kept. A token is written to the free slot, all
are read, and then the least important one goes: its slot is the next free one. Nothing
is moved, so that a step costs what reading costs, and heads may hold other tokens. Of a
prompt, which is read exactly, the most important tokens are taken at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache import observed
from attn.cache.kv import Cache
from attn.contract.calls import refuse_keywords
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.contract.varying import varying
from pallas_kernels.arrays import check_logits


@caches.of_cache
class Scored(NamedTuple):
    """A cache with pos [B,C,K], or [B,C,1] if all heads hold the same tokens, and score
    of the same shape, float32: what the policy has seen of each slot."""

    cache: Cache
    score: jax.Array


def empty(k, v, slots: int, *, one_set: bool = False) -> Scored:
    """A memory of `slots` slots for keys and values like k [B,.,K,D], v [B,.,K,V]."""
    cache = caches.empty(k, v, slots, per_head=not one_set)
    return Scored(cache, jnp.zeros(cache.pos.shape, jnp.float32))


def put(state: Scored, k, v, now: TokenPositions) -> Scored:
    """The memory with one token k [B,1,K,D], v [B,1,K,V] in a free slot of each head. A
    sequence that begins empties all; without a free slot the token is dropped."""
    cache, slots = state.cache, state.cache.k.shape[1]
    began = (now.segment > 1).any(1)[:, None, None]
    pos = jnp.where(began, -1, cache.pos)
    score = jnp.where(began, 0, state.score)
    room = (pos < 0).any(1) & (now.segment > 0)  # [B,K|1]
    # the first free slot of each head; outside, and so dropped, without one
    slot = jnp.where(room, jnp.argmax(pos < 0, 1), slots)
    # k and v have K heads, pos and score may have one for all: [B,K], [B,K|1]
    row, head = jnp.ogrid[:k.shape[0], :k.shape[2]]
    own = jnp.broadcast_to(slot, (k.shape[0], k.shape[2]))

    def write(held):
        return tuple(a.at[row, own, head].set(new[:, 0].astype(a.dtype), mode="drop")
                     for a, new in zip(held, (k, v)))

    held = varying((cache.k, cache.v), k, v, own)
    keys, vals = caches.in_place(write, held, room.any())
    row, head = jnp.ogrid[:k.shape[0], :slot.shape[1]]
    new = jnp.broadcast_to(now.pos, slot.shape)
    pos = pos.at[row, slot, head].set(new, mode="drop")
    # nothing yet: what its own query gives it comes behind
    score = score.at[row, slot, head].set(0, mode="drop")
    return Scored(Cache(keys, vals, pos, now.next_pos, now.last_segment), score)


def drop_one(state: Scored, importance: jax.Array, budget: int) -> Scored:
    """Without the least important token [B,C,K|1] of each head that holds more than
    `budget`; of equal ones the latest goes."""
    pos = state.cache.pos
    importance = jnp.where(pos >= 0, importance, jnp.inf)
    least = (importance == importance.min(1, keepdims=True)) & (pos >= 0)
    # of equal ones the one at the greatest position
    gone = jnp.argmax(jnp.where(least, pos, -1), 1)[:, None]  # [B,1,K|1]
    many = (pos >= 0).sum(1, keepdims=True) > budget  # [B,1,K|1]
    here = jnp.arange(pos.shape[1])[None, :, None] == gone
    pos = jnp.where(here & many, -1, pos)
    return state._replace(cache=state.cache._replace(pos=pos))


def best(state: Scored, importance: jax.Array, budget: int, slots: int) -> Scored:
    """The `budget` most important tokens of each head in order of position, of equal
    ones the earliest, in `slots` slots. importance [B,C,K|1]."""
    cache = state.cache
    size = min(budget, slots, cache.k.shape[1])
    importance = jnp.where(cache.pos >= 0, importance, -jnp.inf)
    number = jnp.arange(cache.k.shape[1])[None, :, None]
    number = jnp.broadcast_to(number, importance.shape)
    late = jnp.where(cache.pos < 0, caches.FOREVER, cache.pos)
    # the most important first, of equal ones the earliest; then back in order
    *_, at = jax.lax.sort((-importance, late, number), dimension=1, num_keys=2)
    at = at[:, :size]
    order = jnp.argsort(jnp.take_along_axis(late, at, 1), axis=1)
    at = jnp.take_along_axis(at, order, 1)  # [B,size,K|1]
    score = jnp.take_along_axis(state.score, at, 1)
    cache = caches.pad_slots(caches.taken(cache, at), slots)
    score = jnp.pad(score, [(0, 0), (0, slots - size), (0, 0)])
    return Scored(cache, jnp.where(cache.pos >= 0, score, 0))


class Evicting:
    """What stands before `Softmax` among the bases of a policy that evicts while it
    decodes: it says its `budget`, how scores change, and what is important.

    one_set: all heads hold the same tokens.
    """

    part = "selection"
    refuses = {
        "storage": "a token that goes is written over, and codes of a group are of "
                   "tokens that stay together",
        "reading": "what goes is said by what every key receives, and of keys that are "
                   "not read that is not known",
    }
    one_set: Any = False

    @property
    def budget(self) -> int:
        """Tokens that a head keeps after a step."""
        raise NotImplementedError(f"{type(self).__name__} says no budget")

    def scored(self, score, got, q) -> jax.Array:
        """The scores [B,C,K|1] after slots received got [B,C,K] from queries q
        [B,T,H,D], added up over queries and the heads of a group."""
        raise NotImplementedError(f"{type(self).__name__} says no score")

    def importance(self, state: Scored, now: TokenPositions) -> jax.Array:
        """How important each slot is [B,C,K|1]; the least goes."""
        return state.score

    def watched(self: Any, cache, segment, q, now, sink) -> jax.Array:
        """What the slots [B,C] of a piece received, [B,C,K]: of all its queries."""
        return observed.received(cache, segment, q, now, self._spec(), sink)

    def init_state(self: Any, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: `budget` slots and a free one, or `size`
        slots if nothing has to go."""
        caches.check_size(size)
        slots = size if size <= self.budget else self.budget + 1
        return empty(k, v, slots, one_set=self.one_set)

    def step(
        self: Any, state, q, k, v, *, x=None, segments=None, bias=None, sink=None,
        **unknown,
    ):
        """The next T tokens -> state, [B,T,H,V]: they are read exactly with all that is
        held, and then what is not important goes."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        caches.check_fits(state.cache, k, v)
        slots = state.k.shape[1]
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        if slots <= self.budget:
            caches.check_room(now.next_pos, slots)
        if q.shape[1] == 1:
            full, o, got = self._one(state, q, k, v, now, sink)
        else:
            full, o, got = self._piece(state, q, k, v, now, sink)
        # [B,C,K|1], 0 for an empty slot
        score = jnp.where(full.cache.pos >= 0, self.scored(full.score, got, q), 0)
        full = full._replace(score=score)
        if q.shape[1] > 1:
            after = best(full, self.importance(full, now), self.budget, slots)
        elif slots > self.budget:
            after = drop_one(full, self.importance(full, now), self.budget)
        else:
            after = full
        o = o.astype(v.dtype)
        if slots <= self.budget:
            o = caches.poison(o, now.next_pos, slots)
        return after, o

    def _one(self: Any, state: Scored, q, k, v, now, sink):
        """One token: written first, then all slots are read."""
        full = put(state, k, v, now)
        newest = now.segment.max(1, keepdims=True)
        newest = jnp.broadcast_to(newest, full.cache.k.shape[:2])
        cache, wide = caches.of_one_type(full.cache, q)
        o, got = observed.read(
            cache, newest, wide, now, self._spec(), sink=sink,
            implementation=self.implementation)
        return full, o, got

    def _piece(self: Any, state: Scored, q, k, v, now, sink):
        """Several tokens: early ones are read before late ones take their place."""
        both, segment = caches.concat(state.cache, k, v, now)
        o = self.read(both, segment, q, now, sink=sink)
        got = jax.lax.stop_gradient(self.watched(both, segment, q, now, sink))
        # [B,C+T,K|1]: new slots have received nothing yet
        score = jnp.pad(state.score, [(0, 0), (0, q.shape[1]), (0, 0)])
        return Scored(caches.only_current(both, segment), score), o, got
