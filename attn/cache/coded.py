"""Coded: exact attention with a cache that holds codes, whichever they are.

A prompt is read with its own keys and values as they are, a token reads what is stored.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.contract.calls import refuse_keywords
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from pallas_kernels.arrays import check_logits


class Coded:
    """What stands before `Softmax` among the bases of a cache that holds codes, which
    says how new tokens are stored and what the codes stand for.

    A state has `room`, `end` and `segment`.
    """

    part = "storage"

    def stored(self, state: Any, k, v, now: TokenPositions) -> Any:
        """The state with tokens k [B,T,K,D], v [B,T,K,V]."""
        raise NotImplementedError(f"{type(self).__name__} stores nothing")

    def cache(self, state: Any) -> Cache:
        """All that is held, as numbers."""
        raise NotImplementedError(f"{type(self).__name__} holds nothing")

    def step(
        self: Any, state, q, k, v, *, x=None, segments=None, bias=None, sink=None,
        **unknown,
    ):
        """The next T tokens -> state, [B,T,H,V]: one reads what is stored, a piece its
        own keys and values as they are."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        caches.check_room(now.next_pos, state.room)
        after = self.stored(state, k, v, now)
        if q.shape[1] == 1:
            cache = self.cache(after)
            # of one token the cache holds its own sequence alone
            newest = now.segment.max(1, keepdims=True)
            read = cache, jnp.broadcast_to(newest, cache.k.shape[:2])
        else:
            # what was held, as codes stand for it, and the piece as it is [B,C+T,K,.]
            read = caches.concat(self.cache(state), k, v, now)
        o = self.read(*read, q, now, sink=sink).astype(v.dtype)
        return after, caches.poison(o, now.next_pos, state.room)
