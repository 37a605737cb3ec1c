"""Rolling: a memory of the first tokens and the last ones, whatever was attended to.

The last tokens share slots by turns. A prompt is read exactly first, which is what sets
this apart from a mask of a window and sinks (`attn/masks.py`), whose prompt is cut too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.cache.rolling_slots import RollingSlots
from attn.contract.calls import refuse_keywords
from attn.contract.segments import locate
from attn.contract.shapes import check
from pallas_kernels.arrays import check_logits
from pallas_kernels.logits import Where


class Rolling:
    """What stands before `Softmax` among the bases of a policy that has fields `sinks`
    and `window`.

    evict: whether the oldest token goes "before" a single token is read, so that this
    sees sinks + window tokens with itself, or "after" it. rebase: positions count by
    slot, so that no distance is longer than the memory. rope: the rotation, if it is
    done here: keys are then stored before it, if `rebase`.
    """

    part = "selection"
    refuses = {
        "storage": "slots are used by turns, and codes of a group are of tokens that "
                   "stay together",
        "reading": "slots are used by turns, and marks of a block are of tokens that "
                   "stay there",
    }
    sinks: Any
    window: Any
    evict: Any = "before"
    rebase: Any = False
    rope: Any = None

    @property
    def budget(self) -> int:
        """Tokens that are kept."""
        return self.sinks + self.window

    def init_state(self: Any, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, of at most sinks + window slots."""
        caches.check_size(size)
        return caches.empty(k, v, min(size, self.budget))

    def step(
        self: Any, state, q, k, v, *, x=None, segments=None, bias=None, sink=None,
        **unknown,
    ):
        """The next T tokens -> state, [B,T,H,V]."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        caches.check_fits(state, k, v)
        slots, t = state.k.shape[1], q.shape[1]
        now = locate(segments, q.shape[0], t, state.end, state.segment)
        if self.rope is not None and not self.rebase:
            q, k = (self.rope.rotate(a, now.pos) for a in (q, k))
        ring = RollingSlots(slots, min(self.sinks, slots), slots >= self.budget)
        if not ring.endless:
            caches.check_room(now.next_pos, slots)
        after = self._append(state, k, v, now, ring.slot(now))
        if t == 1 and self.evict == "before":
            newest = now.segment.max(1, keepdims=True)
            read = after, jnp.broadcast_to(newest, after.k.shape[:2])
            end = now.next_pos
        else:
            read, end = caches.concat(state, k, v, now), state.end
        o = self._read_based(*read, q, now, end, sink).astype(v.dtype)
        return after, o if ring.endless else caches.poison(o, now.next_pos, slots)

    def _read_based(self: Any, cache: Cache, segment, q, now, end, sink):
        """`read` with positions by slot: of `end` [B] tokens sinks + window are held,
        and those behind the sinks stand that much nearer."""
        if not self.rebase:
            return self.read(cache, segment, q, now, sink=sink)
        # as many tokens have gone as came beyond sinks + window
        shift = jnp.maximum(end - self.budget, 0)
        # a sequence that began with this piece, of an index above 1, was not cut
        moved = based(cache.pos, shift, self.sinks)  # [B,C,1]
        moved = jnp.where(segment[..., None] > 1, cache.pos, moved)
        pos = based(now.pos[..., None], shift, self.sinks)[..., 0]
        pos = jnp.where(now.segment > 1, now.pos, pos)
        now = now._replace(pos=pos)
        cache = cache._replace(pos=moved)
        if self.rope is not None:
            # keys were stored before the rotation: they are turned to their slots anew
            turned = self.rope.rotate(cache.k, jnp.maximum(moved, 0))
            cache, q = cache._replace(k=turned), self.rope.rotate(q, now.pos)
        return self.read(cache, segment, q, now, sink=sink)


def based(pos: jax.Array, shift: jax.Array, sinks: int) -> jax.Array:
    """Positions [B,C,1] by slot: those behind the sinks, `shift` [B] nearer."""
    return jnp.where(pos >= sinks, pos - shift[:, None, None], pos)


def rerotated(k: jax.Array, pos: jax.Array, rope: Any) -> jax.Array:
    """Keys k [B,C,K,D] that were rotated at pos [B,C,K|1], -1 for none, as if they had
    been at 0, 1, ... in the order in which they lie (re-rotation, as in kvpress)."""
    slot = jnp.arange(pos.shape[1], dtype=pos.dtype)[None, :, None]  # [1,C,1]
    # rotations add up: from pos by slot - pos to slot
    return rope.rotate(k, jnp.where(pos < 0, 0, slot - pos))


class Turned:
    """What stands before `Softmax` among the bases of a policy that caches keys before
    their rotation `rope`, which a call on all tokens makes itself."""

    rope: Any = None

    def __call__(
        self: Any, q, k, v, *, x=None, segments=None, bias=None, sink=None, key=None,
        mask=None, **unknown,
    ):
        """All tokens at once, exactly, at their true positions; see `Softmax`."""
        if self.rope is not None:
            check(q, k, v, segments=segments)
            q, k = turned(self.rope, q, k, self._where(q, k, segments))
        return super().__call__(  # type: ignore[misc]
            q, k, v, segments=segments, bias=bias, sink=sink, key=key, mask=mask,
            **unknown)


def turned(rope: Any, q, k, where: Where) -> tuple[jax.Array, jax.Array]:
    """q [B,T,H,D] and k [B,S,K,D] rotated to their positions; where these count, the
    last tokens are aligned."""
    t, s = q.shape[1], k.shape[1]
    q_pos, kv_pos = where.q_pos, where.kv_pos
    if where.counted:
        q_pos = jnp.arange(s - t, s, dtype=jnp.int32)[None]
        kv_pos = jnp.arange(s, dtype=jnp.int32)[None]
    return rope.rotate(q, q_pos), rope.rotate(k, kv_pos)
