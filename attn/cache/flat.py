"""Flat: one row of slots that all heads share, so that heads hold as many tokens as
each needs, and their number may depend on the data.

A slot knows its head as well as its token. Both are one number, so that slots are those
of a cache with one key head, which all of H queries read, and the mask lets a query see
the slots of its own head. The bytes that are read are those that are held; the products
are K times as many, which costs nothing while it is bytes that take the time.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache.kv import Cache
from attn.contract.segments import TokenPositions
from attn.contract.varying import varying
from attn.masks import FOREVER, Mask
from pallas_kernels.logits import LogitSpec


class Flat(NamedTuple):
    """C K slots for K heads together: k [B,C,K,D], v [B,C,K,V], whose axes C and K are
    one row. pos [B,C,K] int32: p K + h of the token at position p of key head h, -1 for
    an empty slot; end, segment [B] int32 as in `Cache`."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    end: jax.Array
    segment: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """Positions of the tokens [B,C,K], -1 for an empty slot."""
        return jnp.where(self.pos < 0, -1, self.pos // self.pos.shape[2])

    @property
    def heads(self) -> jax.Array:
        """The key head of each slot [B,C,K], -1 for an empty one."""
        return jnp.where(self.pos < 0, -1, self.pos % self.pos.shape[2])

    @property
    def used(self) -> jax.Array:
        """How many slots hold a token [B]."""
        return (self.pos >= 0).sum((1, 2), dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class OfHead(Mask):
    """What `mask` shows of the slots of a query's own key head: of `heads`, each with
    `group` query heads. Keys stand at p K + h."""

    mask: Mask
    heads: int
    group: int

    def __call__(self, h, i, j):
        # a code j = p K + h' is of key head j % K at position j // K
        return (h // self.group == j % self.heads) & self.mask(h, i, j // self.heads)


@dataclasses.dataclass(frozen=True)
class ScoreOfHead:
    """A score of positions, of keys that stand at p K + h."""

    score: Callable
    heads: int

    def __call__(self, h, i, j):
        return self.score(h, i, j // self.heads)


def empty(k, v, slots: int) -> Flat:
    """`slots` slots a head, for all together, of keys and values like k and v."""
    return Flat(*caches.empty(k, v, slots, per_head=True))


def flatten(cache: Cache) -> Flat:
    """The slots of a cache, with or without positions of each head."""
    heads = cache.k.shape[2]
    pos = jnp.broadcast_to(cache.pos, cache.k.shape[:3])
    # p K + h, of which order is that of positions, and then of heads
    code = jnp.where(pos < 0, -1, pos * heads + _numbers(heads)[None])
    return Flat(*cache._replace(pos=code))


def by_head(flat: Flat) -> Cache:
    """Every slot as one of each head, [B,C K,K,.]: pos is -1 for heads that are not its
    own. For choosing among slots, not for reading: nothing is copied, only named."""
    b, c, heads = flat.pos.shape
    row, own = flat.tokens.reshape(b, -1), flat.heads.reshape(b, -1)
    # [B,C K,1] == [1,1,K] -> [B,C K,K]
    pos = jnp.where(own[..., None] == _numbers(heads)[None], row[..., None], -1)
    # [B,C,K,.] -> [B,C K,1,.] -> [B,C K,K,.]
    k, v = (jnp.broadcast_to(a.reshape(b, c * heads, 1, -1), (b, c * heads, heads,
            a.shape[3])) for a in (flat.k, flat.v))
    return Cache(k, v, pos, flat.end, flat.segment)


def keep(flat: Flat, kept: jax.Array, slots: int) -> Flat:
    """The slots that are `kept` [B,C,K], in order of position, in `slots` a head; what
    finds no room, which are the latest tokens, is dropped."""
    b, _, heads = flat.pos.shape
    pos = flat.pos.reshape(b, -1)
    # what is not kept stands behind all others
    late = jnp.where(kept.reshape(b, -1) & (pos >= 0), pos, FOREVER)
    at = jnp.argsort(late, axis=1)[:, :slots * heads]  # [B,slots K] or fewer
    more = slots * heads - at.shape[1]
    there = jnp.take_along_axis(late, at, 1)
    pos = jnp.where(there < FOREVER, there, -1)
    pos = jnp.pad(pos, [(0, 0), (0, more)], constant_values=-1)

    def taken(a):
        a = jnp.take_along_axis(a.reshape(b, -1, a.shape[3]), at[..., None], 1)
        a = jnp.pad(a, [(0, 0), (0, more), (0, 0)])
        return a.reshape(b, slots, heads, -1)

    return flat._replace(
        k=taken(flat.k), v=taken(flat.v), pos=pos.reshape(b, slots, heads))


def append(flat: Flat, k, v, now: TokenPositions) -> tuple[Flat, jax.Array]:
    """The cache with one token k [B,1,K,D], v [B,1,K,V] behind those that it holds, and
    how many slots are then used [B]."""
    c, heads = flat.pos.shape[1:]
    began, real = now.segment.max(1) > 1, now.segment[:, 0] > 0
    used = jnp.where(began, 0, flat.used)
    # of one token K slots behind each other, in the axes in which they are stored
    number = used[:, None] + _numbers(heads)
    slot = jnp.where(real[:, None], number // heads, c), number % heads
    row = jnp.arange(k.shape[0])[:, None]

    def write(held):
        return tuple(a.at[row, *slot].set(new[:, 0].astype(a.dtype), mode="drop")
                     for a, new in zip(held, (k, v)))

    held = varying((flat.k, flat.v), k, v, *slot)
    keys, vals = caches.in_place(write, held, real.any())
    # [B,1] K + [1,K] -> [B,K]
    code = now.pos * heads + _numbers(heads)
    pos = jnp.where(began[:, None, None], -1, flat.pos)
    pos = pos.at[row, *slot].set(code, mode="drop")
    after = Flat(keys, vals, pos, now.next_pos, now.last_segment)
    return after, used + heads * real


def read(
    flat: Flat, q, now: TokenPositions, spec: LogitSpec, **how: Any
) -> tuple[jax.Array, ...]:
    """What queries q [B,T,H,D] at `now`, of the sequence that goes on (segment index 1,
    or that of a token that begins another), find: `attn.cache.reading.read`."""
    heads = flat.pos.shape[2]
    score = None if spec.score is None else ScoreOfHead(spec.score, heads)
    # one head of C K slots, of which a query sees those of its own key head
    spec = dataclasses.replace(
        spec, mask=OfHead(spec.mask, heads, q.shape[2] // heads), score=score)
    one = _one_head(flat)
    segment = jnp.ones(one.k.shape[:2], jnp.int32)  # [B,C K]
    if q.shape[1] == 1:
        segment = jnp.broadcast_to(now.segment, segment.shape)
    return reading.read(one, segment, q, now, spec, **how)


def _one_head(flat: Flat) -> Cache:
    """The slots as those of a cache with one key head [B,C K,1,.]."""
    b = flat.k.shape[0]
    k, v = (a.reshape(b, -1, 1, a.shape[3]) for a in (flat.k, flat.v))
    return Cache(k, v, flat.pos.reshape(b, -1, 1), flat.end, flat.segment)


def _numbers(heads: int) -> jax.Array:
    """The numbers of heads [1,K]."""
    return jnp.arange(heads, dtype=jnp.int32)[None]
