"""Partial softmax: what some of the keys say of a query, in three numbers a head.

However many they are, it is the largest logit, the sum of the exponentials below it and
the weighted sum of values. Triples of different keys merge in any order:

    m_c = max_j s_j,  l_c = sum_j exp(s_j - m_c),  a_c = sum_j exp(s_j - m_c) v_j
    m = max_c m_c,  l = sum_c exp(m_c - m) l_c,  a = sum_c exp(m_c - m) a_c,  o = a / l

What is summed has been rescaled to the common m before. Keys of which a query sees none
give m = -1e30, l = 0 and a = 0. m, l and a are float32 (Milakov & Gimelshein, 2018,
arXiv:1805.02867).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

EMPTY = -1e30  # the maximum of no logits, finite so that differences are no NaN


class Partial(NamedTuple):
    """What some keys say of each query, float32: m, l [B,H,T] and a [B,T,H,V]."""

    m: jax.Array
    l: jax.Array
    a: jax.Array


def normalized(o: jax.Array, lse: jax.Array) -> Partial:
    """The triple of an attention that is done, as `attend` gives it: o [B,T,H,V] and
    lse [B,H,T], -inf where a row sees nothing. It is (lse, 1, o)."""
    some = lse > EMPTY
    return Partial(
        jnp.where(some, lse, EMPTY), some.astype(jnp.float32), o.astype(jnp.float32)
    )


def merge(parts: Partial, axis: str | tuple[str, ...] | None = None) -> Partial:
    """The triple of all keys: of the parts on the devices along mesh axis `axis`,
    inside `shard_map`, by one maximum and one sum; without one, of a leading axis."""
    if axis is None:
        m = jax.lax.stop_gradient(parts.m).max(0)
        add, top = lambda a: a.sum(0), m[None]
    else:
        m = top = jax.lax.pmax(jax.lax.stop_gradient(parts.m), axis)
        add = lambda a: jax.lax.psum(a, axis)
    # where no part has seen a key, exp(EMPTY - EMPTY) would be 1
    fade = jnp.where(parts.l > 0, jnp.exp(parts.m - top), 0)
    l, a = add((fade * parts.l)), add(fade.swapaxes(-1, -2)[..., None] * parts.a)
    return Partial(m, l, a)


def output(part: Partial) -> jax.Array:
    """a / l, [B,T,H,V] float32; 0 where nothing was seen."""
    total = jnp.where(part.l > 0, part.l, 1)
    return part.a / total.swapaxes(-1, -2)[..., None]
