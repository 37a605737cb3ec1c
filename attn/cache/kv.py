"""Cache: the keys and values that softmax attention remembers, in static shapes.

A slot knows the position of the token that it holds, -1 if it is empty, so that the
mask decides what is seen however slots are ordered, and a policy may keep different
tokens for different heads. The cache holds the row's present sequence: when another
segment begins, what came before can no longer be seen and is dropped.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.dispatch import interpreted
from attn.contract.eager import refuse
from attn.contract.segments import TokenPositions
from attn.contract.varying import varying
from attn.masks import FOREVER


class Cache(NamedTuple):
    """k [B,C,K,D], v [B,C,K,V] in their own dtype; pos [B,C,K], or [B,C,1] if all heads
    hold the same tokens, int32, -1 for an empty slot; end [B] int32 the next token's
    position; segment [B] int32 the last token's segment, -1 before the first."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    end: jax.Array
    segment: jax.Array


def of_cache(cls: type) -> type:
    """A state with a field `cache` shows what others ask of any state: the keys k
    [B,C,K,D], the next token's position end [B] and the last one's segment [B]."""
    for name in ("k", "end", "segment"):
        get = property(operator.attrgetter(f"cache.{name}"))
        setattr(cls, name, get)
    return cls


def empty(k, v, slots: int, *, per_head: bool = False) -> Cache:
    """A cache of `slots` slots for keys and values like k [B,.,K,D] and v [B,.,K,V]."""
    check_size(slots)
    b, _, heads, d = k.shape
    return Cache(
        jnp.zeros((b, slots, heads, d), k.dtype),
        jnp.zeros((b, slots, heads, v.shape[-1]), v.dtype),
        jnp.full((b, slots, heads if per_head else 1), -1, jnp.int32),
        jnp.zeros((b,), jnp.int32),
        jnp.full((b,), -1, jnp.int32),
    )


def check_size(size) -> None:
    """Raises ValueError unless `size` is a number of tokens."""
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool):
        what = f"{type(size).__name__} of shape {tuple(size.shape)}" if hasattr(
            size, "shape") else repr(size)
        raise ValueError(
            f"size is {what}: expected a number of tokens, init_state(size, q, k, v)"
        )
    if size < 1:
        raise ValueError(f"size: a memory for {size} tokens, expected 1 or more")


def of_one_type(cache: Cache, q: jax.Array) -> tuple[Cache, jax.Array]:
    """Cache and queries in the wider of their types: tokens may be of another type than
    the state."""
    kinds = {jnp.dtype(a.dtype) for a in (cache.k, cache.v, q)}
    if len(kinds) == 1:
        return cache, q
    widest = max(kinds, key=lambda kind: jnp.finfo(kind).bits)
    # neither bfloat16 nor float16 holds the other
    widest = widest if jnp.finfo(widest).bits > 16 else jnp.dtype(jnp.float32)
    k, v, q = (a.astype(widest) for a in (cache.k, cache.v, q))
    return cache._replace(k=k, v=v), q


def current(place: TokenPositions) -> jax.Array:
    """Which of the new tokens [B,T] belong to the sequence that goes on afterwards."""
    # segments rise along a row: the last one goes on
    return (place.segment == place.segment.max(1, keepdims=True)) & (place.segment > 0)


def append(cache: Cache, k, v, place: TokenPositions, slot: jax.Array) -> Cache:
    """The cache with new tokens k [B,T,K,D], v [B,T,K,V] written to `slot` [B,T].

    A slot outside the cache drops its token. Tokens of a sequence that has ended are
    not stored, and a row in which a new sequence began forgets the old one.
    """
    slots = cache.k.shape[1]
    stored = current(place)
    # segments count from 1, the sequence that the cache holds
    began = (place.segment > 1).any(1)
    slot = jnp.where(stored & (slot >= 0), slot, slots)  # `slots` is outside: dropped
    row = jnp.arange(k.shape[0])[:, None]
    pos = jnp.where(began[:, None, None], -1, cache.pos)
    new_pos = jnp.broadcast_to(place.pos[..., None], (*slot.shape, pos.shape[2]))

    def written(held):
        return tuple(a.at[row, slot].set(new.astype(a.dtype), mode="drop")
                     for a, new in zip(held, (k, v)))

    held = varying((cache.k, cache.v), k, v, slot)
    held = in_place(written, held, (slot < slots).any())
    keys, vals = held
    return Cache(
        keys, vals,
        pos.at[row, slot].set(new_pos, mode="drop"),
        place.next_pos,
        place.last_segment,
    )


def in_place(write, held, some: jax.Array):
    """write(held) if there is something to write, in the buffers of `held`."""
    if not interpreted():
        return write(held)
    # on a CPU XLA writes a copy of the cache for each that reads it, unless what
    # writes is a branch: then one buffer is written in place
    return jax.lax.cond(some, write, _as_it_is, held)


def _as_it_is(held):
    return held


def append_next(cache: Cache, k, v, place: TokenPositions) -> tuple[Cache, jax.Array]:
    """The cache with one token k [B,1,K,D], v [B,1,K,V] behind those that it holds in
    its first slots, and how many slots are then used [B]."""
    # a new sequence begins in slot 0
    used = jnp.where(place.segment.max(1) > 1, 0, (cache.pos[..., 0] >= 0).sum(1))
    after = append(cache, k, v, place, used[:, None])
    return after, used + (place.segment[:, 0] > 0).astype(jnp.int32)


def concat(cache: Cache, k, v, place: TokenPositions) -> tuple[Cache, jax.Array]:
    """The cache with T more slots for the new tokens, and the segment [B,C+T] of each
    slot: what a piece of several tokens attends to before some of it is forgotten."""
    b, t = k.shape[:2]
    # padding has no position: it is never seen
    own = jnp.where(place.segment > 0, place.pos, -1)[..., None]
    own = jnp.broadcast_to(own, (b, t, cache.pos.shape[2]))
    segments = jnp.concatenate(
        [jnp.ones(cache.k.shape[:2], jnp.int32), place.segment], 1
    )
    both = cache._replace(
        k=jnp.concatenate([cache.k, k.astype(cache.k.dtype)], 1),
        v=jnp.concatenate([cache.v, v.astype(cache.v.dtype)], 1),
        pos=jnp.concatenate([cache.pos, own], 1),
        end=place.next_pos,
        segment=place.last_segment,
    )
    return both, segments


def only_current(cache: Cache, segments: jax.Array) -> Cache:
    """The same slots without the tokens of sequences that have ended. segments
    [B,C]."""
    now = segments == segments.max(1, keepdims=True)
    return cache._replace(pos=jnp.where(now[..., None], cache.pos, -1))


def in_order(cache: Cache) -> Cache:
    """The same tokens in order of position, empty slots behind them."""
    # empty slots go behind, as if they were of the latest tokens
    at = jnp.argsort(jnp.where(cache.pos < 0, FOREVER, cache.pos), axis=1)
    return taken(cache, at)


def taken(cache: Cache, at: jax.Array) -> Cache:
    """The slots `at` [B,N,K|1] of each head."""
    return cache._replace(
        k=jnp.take_along_axis(cache.k, at[..., None], 1),
        v=jnp.take_along_axis(cache.v, at[..., None], 1),
        pos=jnp.take_along_axis(cache.pos, at, 1),
    )


def keep(cache: Cache, importance: jax.Array, size: int) -> Cache:
    """The `size` most important tokens of each head, in order of position.

    importance [B,S,K]: of each slot and key head; empty slots are kept last. Every head
    then has slots of its own: pos becomes [B,size,K].
    """
    pos = jnp.broadcast_to(cache.pos, importance.shape)
    importance = jnp.where(pos >= 0, importance.astype(jnp.float32), -jnp.inf)
    _, chosen = jax.lax.top_k(jnp.moveaxis(importance, 1, 2), size)  # [B,K,size]
    at = jnp.moveaxis(chosen, 1, 2)  # [B,size,K]
    # back into order of position, empty slots last
    late = jnp.where(pos >= 0, pos, FOREVER)
    order = jnp.argsort(jnp.take_along_axis(late, at, 1), axis=1)
    return taken(cache._replace(pos=pos), jnp.take_along_axis(at, order, 1))


def pad_slots(cache: Cache, slots: int) -> Cache:
    """The cache with empty slots added behind, `slots` in all."""
    more = slots - cache.k.shape[1]

    def widen(a, value):
        behind = [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2)
        return jnp.pad(a, behind, constant_values=value)

    return cache._replace(
        k=widen(cache.k, 0), v=widen(cache.v, 0), pos=widen(cache.pos, -1)
    )


def check_fits(cache: Cache, k, v) -> None:
    """Raises ValueError unless k and v are tokens for this cache."""
    if not isinstance(cache, Cache):
        raise ValueError(f"state is a {type(cache).__name__}: expected a Cache")
    for name, held, new in (("k", cache.k, k), ("v", cache.v, v)):
        if (held.shape[0], *held.shape[2:]) != (new.shape[0], *new.shape[2:]):
            raise ValueError(
                f"{name} has shape {new.shape}, the state holds {held.shape}: "
                "expected the same B, K and width"
            )


def check_room(end: jax.Array, size: int) -> None:
    """Raises ValueError if a row has reached past `size` tokens, where values can be
    known (not inside a trace)."""
    most = end.max()

    def full(most) -> ValueError:
        return ValueError(
            f"step: {int(most)} tokens for a memory of {size}: "
            "expected init_state with a larger size"
        )

    refuse(most > size, most, full)


def poison(o: jax.Array, end: jax.Array, size: int) -> jax.Array:
    """o [B,...] with NaN in the rows that have reached past `size` tokens: inside a
    trace nothing can be raised, and a wrong number must not pass for a right one."""
    over = (end > size).reshape((-1,) + (1,) * (o.ndim - 1))  # [B,1,...]
    return jnp.where(over, jnp.nan, o).astype(o.dtype)
