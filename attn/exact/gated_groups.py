"""Gated groups: in a tile, the last key of a group says what the others get together.

Keys are cut into groups of equal size. A query takes part in one group, its own, key by
key, and in each other one by the logit of its gate, the last key, which has no value:

    c_g = log sum_(j in g) exp(s_j)  of the own group,  s_gate(g)  of another one
    p_j = exp(c_g - log sum_g exp(c_g)) exp(s_j) / sum_(i in g) exp(s_i)

so that the softmax over groups is online while their keys pass by, as that over keys is
in exact attention. Back, with delta = sum_j p_j dp_j as there:

    share_g = sum_(j in g) p_j dp_j
    ds_j = p_j (dp_j - delta) in the own group,  p_j dp_j - p_j|g share_g in another one
    ds_gate = share_g - p_g delta

Source: Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.online import exp_below
from pallas_kernels.tile import NEVER


class Groups(NamedTuple):
    """Logits of a tile by group: c [...,bq,n], the weights inside [...,bq,n,size], 0 of
    a gate, and which group is a query's own, bool [...,bq,n]."""

    c: jax.Array
    inside: jax.Array
    own: jax.Array


def by_group(s: jax.Array, q_pos: jax.Array, kv_pos: jax.Array, size: int) -> Groups:
    """The groups of a tile's logits s [B,K,G,bq,bk], -inf where hidden; q_pos
    [...,bq,1] and kv_pos [...,1,bk] broadcast against them."""
    cut = s.reshape(*s.shape[:-1], -1, size)  # [B,K,G,bq,n,size]
    gate = cut[..., -1]  # [B,K,G,bq,n]
    # of the last key no value is ever read
    text = jnp.where(jnp.arange(size) == size - 1, NEVER, cut)
    peak = text.max(-1, keepdims=True)
    e = exp_below(text, jnp.where(peak > NEVER, peak, 0))
    l = e.sum(-1, keepdims=True)
    own = q_pos // size == kv_pos[..., ::size] // size  # [...,bq,n]
    # a group is its own queries' until its gate has passed: none of it is hidden there
    c = jnp.where(own, (peak + jnp.log(l))[..., 0], gate)
    return Groups(c, e / jnp.where(l > 0, l, 1), own)


def weights(groups: Groups, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(c - base) [...,bq,n], at most 1, and that of each key [...,bq,bk]."""
    share = exp_below(groups.c, base)
    return share, _flat(groups.inside * share[..., None])


def pulled(groups: Groups, share: jax.Array, p: jax.Array, dp: jax.Array,
           delta: jax.Array) -> jax.Array:
    """ds [...,bq,bk] of weights p and their cotangents dp; share: of `weights`, delta
    [...,bq,1]."""
    each = (p * dp).reshape(groups.inside.shape)
    total, part = each.sum(-1), share * delta  # [...,bq,n]
    text = each - groups.inside * jnp.where(groups.own, part, total)[..., None]
    gate = jnp.where(groups.own, 0, total - part)[..., None]  # [...,bq,n,1]
    last = jnp.arange(each.shape[-1]) == each.shape[-1] - 1
    return _flat(jnp.where(last, gate, text))


def _flat(a: jax.Array) -> jax.Array:
    return a.reshape(*a.shape[:-2], -1)
