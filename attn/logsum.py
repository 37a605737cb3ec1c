"""Logsum: the running log-sum-exp of keys, by channel, over runs and over shards.

    z_t = log sum_(s<=t) exp(k_s)

It is held in two parts, z = top + log total, the largest key and a sum that is measured
from it. Keys of any size are safe then, and the difference of two z, or of a key and z,
keeps the precision that a small number has.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.chunks import only

LOW = -1e30  # the largest of no keys; finite, as differences of two have to be


class Mass(NamedTuple):
    """The sum of exp(keys) = exp(top) total, top and total [...,D] float32; run: the
    run that it is of, in which the tokens that it has read end."""

    top: jax.Array
    total: jax.Array
    run: jax.Array


def nothing(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """top and total of no keys."""
    return jnp.full(shape, LOW, jnp.float32), jnp.zeros(shape, jnp.float32)


def joined(a: Mass, b: Mass) -> Mass:
    """The mass of the keys of a, then b, as far as they are in the run b ends in."""
    same = a.run == b.run
    top = jnp.where(same, jnp.maximum(a.top, b.top), b.top)
    old = only(same, a.total * jnp.exp(jnp.where(same, a.top - top, 0)))
    return Mass(top, old + b.total * jnp.exp(b.top - top), b.run)


def running(
    k: jax.Array,
    real: jax.Array,
    present: jax.Array,
    before: tuple[jax.Array, jax.Array],
    axis: str | None = None,
) -> tuple[Mass, Mass]:
    """The mass [B,T,H,D] of the keys before each token, and with it, of its run.

    k [B,T,H,D] float32; real [B,T]: False for padding; present [B,T]: runs, rising from
    1, padding in the run before it. before: top and total [B,H,D] of run 1 so far.
    With `axis`, T is split over that mesh axis and each shard gathers one mass of each.
    """
    real, present = (a[..., None, None] for a in (real, present))
    top = jnp.where(real, jax.lax.stop_gradient(k), LOW)
    own = Mass(top, only(real, jnp.exp(jnp.where(real, k - top, 0))), present)
    sums = jax.lax.associative_scan(joined, own, axis=1)
    first = Mass(*before, jnp.ones_like(present[:, 0]))
    if axis is not None:
        first = _shards_before(first, sums, axis)
    first = jax.tree.map(lambda a: a[:, None], first)
    now = joined(first, sums)
    last = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:, :-1]], 1), first, now)
    # what was before, as far as it is of the token's own run
    return joined(last, Mass(*nothing(top.shape), present)), now


def _shards_before(first: Mass, sums: Mass, axis: str) -> Mass:
    """The mass in front of this shard; first: in front of all of them."""
    parts = jax.lax.all_gather(jax.tree.map(lambda a: a[:, -1], sums), axis)
    me = jax.lax.axis_index(axis)

    def add(held, shard):
        n, part = shard
        after = joined(held, part)
        return jax.tree.map(lambda a, b: jnp.where(n < me, b, a), held, after), None

    order = jnp.arange(jax.lax.axis_size(axis))
    return jax.lax.scan(add, first, (order, parts))[0]
