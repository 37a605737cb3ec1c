"""Compensated: the first tokens, the last ones, and one that stands for all others.

What leaves the memory is not lost altogether: its mean key and mean value stay, as one
token that counts as many times as tokens it stands for (RazorAttention, Tang et al.,
2024, arXiv:2407.15891, section 3):

    o = (N e^(q.k^) v^ + sum_n e^(q.k_n) v_n) / (N e^(q.k^) + sum_n e^(q.k_n))

which is one more key whose logit is log N greater.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache.kv import Cache
from attn.cache.rolling_slots import RollingSlots
from attn.contract.calls import refuse_keywords
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.attend import attend
from attn.exact.dense import few
from attn.exact.online import (
    EMPTY, OnlineSoftmax, join, output, state_of, without_value
)
from pallas_kernels.arrays import check_logits
from pallas_kernels.logits import Where


class Rest(NamedTuple):
    """What stands for the tokens that left: mean key k [B,K,D], mean value v [B,K,V]
    float32, and many [B] int32, how many they were."""

    k: jax.Array
    v: jax.Array
    many: jax.Array


@caches.of_cache
class Compensated(NamedTuple):
    """A cache of the first and the last tokens, by turns, and the rest."""

    cache: Cache
    rest: Rest


class Compensating:
    """What stands before `Softmax` among the bases of an attention that keeps the first
    `sinks` tokens, the last `window` ones, and the mean of the rest."""

    sinks: Any
    window: Any

    def init_state(self: Any, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, of at most sinks + window slots."""
        caches.check_size(size)
        b, _, heads, d = k.shape
        mean_k, mean_v = (
            jnp.zeros((b, heads, n), jnp.float32) for n in (d, v.shape[3]))
        slots = min(size, self.sinks + self.window)
        rest = Rest(mean_k, mean_v, jnp.zeros((b,), jnp.int32))
        return Compensated(caches.empty(k, v, slots), rest)

    def step(
        self: Any, state, q, k, v, *, x=None, segments=None, bias=None, sink=None,
        **unknown,
    ):
        """The next T tokens -> state, [B,T,H,V]: a piece is read exactly, with what is
        held, before its early tokens are folded into the rest."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        check_logits(q, k, sink=sink)
        cache, slots = state.cache, state.cache.k.shape[1]
        caches.check_fits(cache, k, v)
        now = locate(segments, q.shape[0], q.shape[1], cache.end, cache.segment)
        endless = slots >= self.sinks + self.window
        ring = RollingSlots(slots, min(self.sinks, slots), endless)
        if not endless:
            caches.check_room(now.next_pos, slots)
        # of a sequence that has ended nothing stays
        began = (now.segment > 1).any(1)
        rest = Rest(*(jnp.where(began.reshape(-1, *(1,) * (a.ndim - 1)), 0, a)
                      for a in state.rest))
        # positions before this one, behind the first tokens, leave the window
        left = now.next_pos[:, None, None] - (slots - ring.first)
        slot = ring.slot(now)
        if q.shape[1] > 1:
            both, segment = caches.concat(cache, k, v, now)
            held = caches.only_current(both, segment)
        else:  # the one whose slot is taken
            held = caches.taken(cache, jnp.clip(slot, 0, slots - 1)[..., None])
            old = began | (now.segment[:, 0] == 0)
            held = held._replace(pos=jnp.where(old[:, None, None], -1, held.pos))
        gone = (held.pos >= ring.first) & (held.pos < left) & endless
        after = Compensated(
            caches.append(cache, k, v, now, slot), folded(rest, held, gone))
        if q.shape[1] > 1:
            o = self._found(Compensated(both, state.rest), segment, q, now, sink, 1)
        else:
            newest = now.segment.max(1, keepdims=True)
            newest = jnp.broadcast_to(newest, after.cache.k.shape[:2])
            o = self._found(after, newest, q, now, sink, None)
        o = o.astype(v.dtype)
        return after, o if endless else caches.poison(o, now.next_pos, slots)

    def _found(self: Any, state: Compensated, segment, q, now, sink, only):
        """What queries find among the slots and in the rest, which is of the sequence
        with the index `only`, None for their own."""
        cache, wide = caches.of_one_type(state.cache, q)
        spec, how = self._spec(), {
            "split_lse": True, "implementation": self.implementation}
        if few(q.shape[1] * q.shape[2], wide.dtype) or q.shape[1] == 1:
            found = reading.read(cache, segment, wide, now, spec, **how)
        else:
            where = Where(now.pos, cache.pos, now.segment, segment)
            found = attend(wide, cache.k, cache.v, spec, where, **how)
        both = join(state_of(*found), self._of_rest(state.rest, q, now, only))
        if sink is not None:
            both = join(both, without_value(sink, both))
        return output(both)

    def _of_rest(self: Any, rest: Rest, q, now: TokenPositions, only):
        """The online softmax state [B,T,H] of the one token that is the rest."""
        b, t, h, d = q.shape
        heads = rest.k.shape[1]
        wide = q.astype(jnp.float32).reshape(b, t, heads, h // heads, d)
        # [B,T,K,G,D] x [B,K,D] -> [B,T,K,G]: q.k^ of the mean key
        s = jnp.einsum("btkgd,bkd->btkg", wide, rest.k).reshape(b, t, h)
        s = s * (d**-0.5 if self.scale is None else self.scale)
        if self.softcap is not None:
            s = self.softcap * jnp.tanh(s / self.softcap)
        some = rest.many[:, None] > 0
        mine = now.segment > 0 if only is None else now.segment == only
        some = (some & mine)[..., None]  # [B,T,1]
        # N e^(q.k^) = e^(q.k^ + log N)
        many = jnp.log(jnp.maximum(rest.many, 1).astype(jnp.float32))
        s = s + many[:, None, None]
        v = jnp.repeat(rest.v, h // heads, 1)[:, None]  # [B,1,H,V]
        l = jnp.broadcast_to(some, s.shape).astype(jnp.float32)
        return OnlineSoftmax(
            jnp.where(some, s, EMPTY), l, jnp.where(some[..., None], v, 0.0))


def folded(rest: Rest, cache: Cache, gone: jax.Array) -> Rest:
    """The rest with the tokens of slots that are `gone` [B,C,1]."""
    more = gone[..., 0].sum(1, dtype=jnp.int32)
    count = rest.many + more
    total = jnp.maximum(count, 1).astype(jnp.float32)[:, None, None]

    def mean(old, a):
        a = jnp.where(gone[..., None], a, 0).astype(jnp.float32)
        # m + (sum - n m) / N: of one token m + (x - m) / N, as the paper has it
        share = more.astype(jnp.float32)[:, None, None]
        return old + (a.sum(1) - share * old) / total

    return Rest(mean(rest.k, cache.k), mean(rest.v, cache.v), count)
