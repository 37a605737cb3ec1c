"""Policy: exact attention with a cache that keeps the most important tokens.

A prompt is attended to exactly; then every head keeps the `capacity` tokens that the
policy finds most important, and what is generated afterwards is added and never
dropped. A policy says one thing, `importance`; slots in order of position, what is kept
and the room for what comes are the same for all of them:

    class Newest(Policy, Softmax):
        capacity: int = 320

        def importance(self, q, cache, now, sink=None):
            return cache.pos
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.contract.calls import refuse_keywords
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from pallas_kernels.arrays import check_logits


class Policy:
    """What stands before `Softmax` among the bases of a policy, which has a field
    `capacity` and says how important tokens are.

    share_group: the query heads of a group have one cache [B,C,K,D]; otherwise each
    keeps tokens of its own, and the cache grows to H heads.
    """

    part = "selection"
    share_group: Any = True

    def importance(
        self, q: jax.Array, cache: Cache, now: TokenPositions, sink: Any = None
    ) -> jax.Array:
        """How important each slot is, [B,C,K]; the greatest are kept, empty ones last.

        q [B,T,H,D] at `now`: the piece that was just read. cache: all that could be
        kept, with that piece, in order of position, empty slots behind. sink [H]: given
        only if the call has one.
        """
        raise NotImplementedError(f"{type(self).__name__} says no importance")

    def kept_of(self: Any, prompt: int) -> int:
        """How many tokens of a prompt, or of a piece of one, each head keeps."""
        return self.capacity

    def init_state(self: Any, size, q, k, v, *, x=None):
        """An empty memory for a prompt as long as q and the rest of `size` tokens."""
        caches.check_size(size)
        prompt = min(q.shape[1], size)
        # what is kept of a prompt, and one slot for each later token
        slots = min(prompt, self.kept_of(prompt)) + size - prompt
        k, v = (jax.eval_shape(self._stored, q, a) for a in (k, v))
        return caches.empty(k, v, slots, per_head=True)

    def step(
        self: Any, state, q, k, v, *, x=None, segments=None, bias=None, sink=None,
        **unknown,
    ):
        """The next T tokens -> state, [B,T,H,V]: one token is appended, a piece is
        attended to exactly and then compressed to `capacity`."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        k, v = self._stored(q, k), self._stored(q, v)
        caches.check_fits(state, k, v)
        slots = state.k.shape[1]
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        if q.shape[1] == 1:
            after, used = caches.append_next(state, k, v, now)
            caches.check_room(used, slots)
            newest = now.segment.max(1, keepdims=True)
            newest = jnp.broadcast_to(newest, after.k.shape[:2])
            o = self.read(after, newest, q, now, sink=sink).astype(v.dtype)
            return after, caches.poison(o, used, slots)
        # all keys are read before some of them are dropped
        both, slot_segments = caches.concat(state, k, v, now)
        o = self.read(both, slot_segments, q, now, sink=sink).astype(v.dtype)
        # only what goes on afterwards can be kept
        mine = caches.in_order(caches.only_current(both, slot_segments))
        size = min(self.kept_of(q.shape[1]), slots, mine.k.shape[1])
        given = (q, mine, now) if sink is None else (q, mine, now, sink)
        # the `size` most important of each head, in order of position
        after = caches.keep(mine, self.importance(*given), size)
        return caches.pad_slots(after, slots), o

    def _stored(self, q: jax.Array, a: jax.Array) -> jax.Array:
        """k or v [B,S,K,.] with as many heads as keep tokens of their own."""
        # [B,S,K,.] -> [B,S,H,.]
        return a if self.share_group else jnp.repeat(a, q.shape[2] // a.shape[2], 2)
