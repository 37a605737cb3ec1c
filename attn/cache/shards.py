"""Shards: the memory of heads that each keep a window and a shard of the past.

A key head's slots are those of its window, which tokens share by turns, and behind them
those of its shard, in order, so that a head holds about 1 / stride of all tokens.
Positions are the heads' own, and the mask says by them what is still seen.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.contract.segments import TokenPositions
from attn.sparse.shards import Sharding, first_blocks, heads_of


class S2State(NamedTuple):
    """sharded: of key heads with a shard, a `Cache` with a position for each head:
    slots of the window, used by turns, then those of the shard, in order. whole: of
    dense key heads, all tokens; None if there are none."""

    sharded: Cache
    whole: Cache | None

    @property
    def k(self) -> jax.Array:
        """[B,C,K,D], of the heads with a shard."""
        return self.sharded.k

    @property
    def end(self) -> jax.Array:
        """[B] int32: the next token's position."""
        return self.sharded.end

    @property
    def segment(self) -> jax.Array:
        """[B] int32: the last token's segment, -1 before the first."""
        return self.sharded.segment


def empty(mask: Sharding, size: int, q, k, v) -> S2State:
    """A memory of `size` tokens like q, k and v, up to whole strides of blocks."""
    window = mask.block * mask.local
    # a shard has every stride-th block
    far = -(-size // (mask.block * mask.stride)) * mask.block
    short = size <= window
    slots, room = (size,) * 2 if short else (window + far, far * mask.stride)

    def like(dense: bool):
        return jax.eval_shape(lambda *a: heads_of(mask, *a, dense=dense)[1:], q, k, v)

    own_k, own_v = like(False)
    sharded = caches.empty(own_k, own_v, slots, per_head=True)
    if mask.dense_from is None:
        return S2State(sharded, None)
    own_k, own_v = like(True)
    return S2State(sharded, caches.empty(own_k, own_v, room))


def room(mask: Sharding, state: S2State) -> int:
    """How many tokens of a sequence the memory is for."""
    slots, window = state.k.shape[1], mask.block * mask.local
    return slots if slots <= window else (slots - window) * mask.stride


def slots_of(mask: Sharding, now: TokenPositions, cache: Cache) -> jax.Array:
    """The slot [B,T,K] of each token in each key head; -1 if a later token of the call
    takes it, or it is of no use."""
    window, (slots, heads) = mask.block * mask.local, cache.k.shape[1:3]
    pos = now.pos[..., None]  # [B,T,1]
    stays = pos >= now.next_pos[:, None, None] - window  # [B,T,1]
    near = jnp.where(stays, pos % window, -1)
    if slots <= window:
        return jnp.broadcast_to(near, (*now.pos.shape, heads))
    number = pos // mask.block
    # [B,T,K]: block r, r + stride, ... of the head
    mine = number % mask.stride == jnp.asarray(first_blocks(mask, heads))[None, None]
    # block r + stride m of the text is block m of the shard, behind the window
    at = window + number // mask.stride * mask.block + pos % mask.block
    # what is of the shard stays for good, all else as long as the window has it
    return jnp.where(mine, at, near)


def append(cache: Cache, k, v, now: TokenPositions, slot: jax.Array) -> Cache:
    """`attn.cache.kv.append` with a slot [B,T,K] for each head; a
    slot outside the cache drops its token."""
    slots, heads = cache.k.shape[1], cache.pos.shape[2]
    stored = caches.current(now)[..., None] & (slot >= 0)
    slot = jnp.where(stored, slot, slots)  # outside: dropped
    row = jnp.arange(k.shape[0])[:, None, None]
    head = jnp.arange(heads)[None, None]
    began = (now.segment > 1).any(1)[:, None, None]
    pos = jnp.where(began, -1, cache.pos)
    new_pos = jnp.broadcast_to(now.pos[..., None], slot.shape)
    return Cache(
        cache.k.at[row, slot, head].set(k.astype(cache.k.dtype), mode="drop"),
        cache.v.at[row, slot, head].set(v.astype(cache.v.dtype), mode="drop"),
        pos.at[row, slot, head].set(new_pos, mode="drop"),
        now.next_pos, now.last_segment,
    )
