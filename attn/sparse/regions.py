"""Regions: blocks of keys that are read as one key and one value each.

The key of a region is the elementwise maximum of its keys. Its value is what the
maximum of its own queries finds in it, so that it does not depend on who reads:

    q_r = max_j q_j,  k_r = max_j k_j,  v_r = sum_j softmax_j(s q_r.k_j) v_j,  j in r

Source: Ren et al., 2021, arXiv:2107.05768, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.dense import weights
from attn.sparse import groups


class Tokens(NamedTuple):
    """The tokens of rows, padding behind: q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], their
    positions pos [B,T] and segment indices [B,T], or None for one sequence a row."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    pos: jax.Array
    segment: jax.Array | None


class Regions(NamedTuple):
    """k [B,n,K,D] and v [B,n,H,V], the number of each block in its sequence and its
    segment [B,n], -1 and 0 where there is none."""

    k: jax.Array
    v: jax.Array
    number: jax.Array
    segment: jax.Array


def pooled(
    q, k, v, scale: float, there: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """k_r [B,n,K,D] and v_r [B,n,H,V], float32, of the tokens `there` [B,n,j] of q
    [B,n,j,H,D], k [B,n,j,K,D] and v [B,n,j,K,V]; None for all."""
    b, n, _, h, d = q.shape
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))

    def most(a):
        if there is None:
            return a.max(2)
        top = jnp.where(there[..., None, None], a, -jnp.inf).max(2)
        # of no token 0, as what -inf is multiplied with is no number
        return jnp.where(there.any(-1)[..., None, None], top, 0)

    top = most(q).reshape(b, n, k.shape[3], -1, d)  # [B,n,K,G,D]
    # [B,n,K,G,D] x [B,n,j,K,D] -> [B,n,K,G,j]
    # scaled once: the maximum of s q is s times that of q, as s > 0
    s = jnp.einsum("bnkgd,bnjkd->bnkgj", top, k) * scale
    p = weights(s, None if there is None else there[:, :, None, None])
    # [B,n,K,G,j] x [B,n,j,K,V] -> [B,n,K,G,V]
    o = jnp.einsum("bnkgj,bnjkv->bnkgv", p, v)
    return most(k), o.reshape(b, n, h, -1)


def regular(row: Tokens, block: int, scale: float) -> Regions:
    """The regions of rows of one sequence, whose first token begins a block; the last
    one may be shorter."""
    b, t = row.pos.shape
    whole = -(-t // block) * block

    def cut(a):
        a = jnp.pad(a, [(0, 0), (0, whole - t)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(b, -1, block, *a.shape[2:])

    there = cut(jnp.ones_like(row.pos, bool))
    k, v = pooled(cut(row.q), cut(row.k), cut(row.v), scale, there)
    number = row.pos[:, ::block] // block  # [B,n]
    return Regions(k, v, number, jnp.ones_like(number))


def complete(row: Tokens, block: int, scale: float, partly: bool = False) -> Regions:
    """The complete blocks of rows of any sequences, at most T / block; partly: the
    others too, of which there may be as many as tokens."""
    b, t = row.pos.shape
    segment = jnp.ones_like(row.pos) if row.segment is None else row.segment
    end = (row.pos % block == block - 1) & (segment > 0)
    most = t // block
    if partly:
        # a sequence's last token ends a block too, wherever it stands in it
        following = jnp.concatenate(
            [segment[:, 1:], jnp.zeros_like(segment[:, :1])], 1)
        end, most = end | ((segment > 0) & (segment != following)), t
    # ends first, in order
    last = jnp.argsort(~end, axis=1, stable=True)[:, :max(most, 1)]
    found = jnp.take_along_axis(end, last, 1)
    pos = jnp.take_along_axis(row.pos, last, 1)
    # where the tokens of a block stand in the row, from its first one on: [B,n,j]
    index = last[..., None] - pos[..., None] % block + jnp.arange(block)[None, None]
    # an unfinished block ends before its last place: [B,n,j]
    there = (index <= last[..., None]) & found[..., None]
    index = jnp.clip(index, 0, t - 1).reshape(b, -1, 1, 1)

    def take(a):
        return jnp.take_along_axis(a, index, 1).reshape(*there.shape, *a.shape[2:])

    k, v = pooled(take(row.q), take(row.k), take(row.v), scale, there)
    segment = jnp.take_along_axis(segment, last, 1)
    return Regions(
        k, v, jnp.where(found, pos // block, -1), jnp.where(found, segment, 0))


def compact(row: Tokens) -> Tokens:
    """The row with padding behind."""
    segment, q, k, v, pos = groups.compact(
        jnp.asarray(row.segment), row.q, row.k, row.v, row.pos)
    return Tokens(q, k, v, pos, segment)
