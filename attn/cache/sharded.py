"""Shard cache: a cache whose slots are split over a mesh axis.

A device holds some of the slots. New tokens are written by the device that their slot
is on, and a few queries are answered by every device from what it holds; the answers
are joined by their log-sum-exp, in one maximum and one sum of B T H (V+1) numbers,
however long the cache is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache.kv import Cache
from attn.contract.segments import TokenPositions
from attn.exact.online import (
    OnlineSoftmax, join, merge, output, state_of, without_value
)
from attn.parallel.sharding import Axis, devices_of, mesh_of, over_mesh
from pallas_kernels.logits import LogitSpec


def splits(cache: Cache, axis: Axis | None) -> bool:
    """Whether the slots of `cache` can be split over `axis`, and its heads over the
    mesh axis `model`."""
    if axis is None:
        return False
    model = mesh_of(axis).shape.get("model", 1)
    return cache.k.shape[1] % devices_of(axis) == 0 and cache.k.shape[2] % model == 0


def append(
    cache: Cache, k, v, place: TokenPositions, slot: jax.Array, axis: Any
) -> Cache:
    """`attn.cache.kv.append` where each device writes to its own slots."""
    # slots are numbered in the global view: a device's first number is its offset
    numbers = jnp.arange(cache.k.shape[1], dtype=jnp.int32)

    def local(numbers, slot, k, v, *rest):
        old_k, old_v, pos, *place = rest
        now = TokenPositions(*place)
        mine = slot - numbers[0]
        # -1: the slot is on another device, and the token is dropped here
        mine = jnp.where((mine >= 0) & (mine < numbers.shape[0]), mine, -1)
        part = Cache(old_k, old_v, pos, now.next_pos, now.last_segment)
        return tuple(caches.append(part, k, v, now, mine)[:3])

    held = _letters(cache)
    # new tokens are whole on every device: their T has no axis
    f = over_mesh(local, f"S B. B.KD B.KV {held} B. B. B B -> {held}", axis)
    new_k, new_v, pos = f(numbers, slot, k, v, *cache[:3], *place)
    return Cache(new_k, new_v, pos, place.next_pos, place.last_segment)


def read(
    cache: Cache, kv_segment: jax.Array, q: jax.Array, now: TokenPositions,
    spec: LogitSpec, axis: Any, *, sink: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`attn.cache.reading.read`, o [B,T,H,V], where each device reads its own slots."""
    heads = jnp.arange(q.shape[2], dtype=jnp.int32)

    def local(q, head, kv_segment, *rest):
        k, v, pos, *place = rest
        now = TokenPositions(*place)
        part = Cache(k, v, pos, now.next_pos, now.last_segment)
        found = reading.read(
            part, kv_segment, q, now, spec, head=head, split_lse=True,
            implementation=implementation,
        )
        # one maximum and one sum along the axis
        return tuple(merge(state_of(*found), axis))

    letters = f"B.HD H BS {_letters(cache)} B. B. B B -> B.H B.H B.HV"
    # m, l [B,T,H], acc [B,T,H,V]
    found = over_mesh(local, letters, axis)(q, heads, kv_segment, *cache[:3], *now)
    state = OnlineSoftmax(*found)
    if sink is not None:
        state = join(state, without_value(sink, state))  # once, not by each device
    return output(state).astype(cache.v.dtype)


def _letters(cache: Cache) -> str:
    return "BSKD BSKV " + ("BSK" if cache.pos.shape[2] > 1 else "BS.")
