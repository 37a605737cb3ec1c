"""Long-short: near tokens as they are and far ones compressed, in one softmax.

What a block of queries sees are rows of keys: those of its window, and a few that each
stand for many. Blocks are read one after the other and again going back, so that memory
is that of one block. Source: Zhu et al. (2021) arXiv:2107.02192.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.dense import weights


class Keys(NamedTuple):
    """k [B,S,K,D] and v [B,S,K,V] float32."""

    k: jax.Array
    v: jax.Array


def compress(p: jax.Array, keys: Keys) -> Keys:
    """Rows of keys in the shares p [B,S,K,r], which are of blocks [B,N,l,K,r] if the
    keys are: [B,r,K,.], or [B,N,r,K,.]."""
    axes = "bskr,bskd->brkd" if p.ndim == 4 else "bnskr,bnskd->bnrkd"
    return Keys(*(jnp.einsum(axes, p, a) for a in keys))  # [r,S] [S,D]


def read(logits: list[jax.Array], seen: list, values: list[jax.Array]) -> jax.Array:
    """One softmax over parts of keys -> [B,c,H,V]. logits of each [B,K,G,c,S], seen
    broadcasts to it, values [B,S,K,V]."""
    seen = [jnp.broadcast_to(a, s.shape) for a, s in zip(seen, logits)]
    p = weights(jnp.concatenate(logits, -1), jnp.concatenate(seen, -1))
    # [B,K,G,c,S] x [B,S,K,V] -> [B,c,K,G,V]
    o = jnp.einsum("bkgcs,bskv->bckgv", p, jnp.concatenate(values, 1))
    return o.reshape(*o.shape[:2], -1, o.shape[-1])


def dots(q: jax.Array, k: jax.Array) -> jax.Array:
    """q.k [B,K,G,c,S] of q [B,c,H,D] and k [B,S,K,D]."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    # [B,c,K,G,D] x [B,S,K,D] -> [B,K,G,c,S]
    return jnp.einsum("bckgd,bskd->bkgcs", grouped, k)


def place_dots(q: jax.Array, table: jax.Array, heads: int) -> jax.Array:
    """q.R [B,K,G,c,W] of q [B,c,H,D] with what distances are [W,H,D]."""
    # [B,c,H,D] x [W,H,D] -> [B,H,c,W], then by key head
    s = jnp.einsum("bchd,whd->bhcw", q, table)
    return s.reshape(s.shape[0], heads, -1, *s.shape[2:])


def blocks(a: jax.Array, c: int) -> jax.Array:
    """a [B,T,...] as [N,B,c,...], zeros behind."""
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % c)] + [(0, 0)] * (a.ndim - 2))
    return a.reshape(a.shape[0], -1, c, *a.shape[2:]).swapaxes(0, 1)


def windows(keys: Keys, c: int, size: int, behind: int) -> Keys:
    """Of each block of c queries `size` keys, [N,B,size,K,.], of keys [B,S,K,.] with as
    many zeros behind as are wanted. Cut at once: a slice of what a loop closes over
    would cost all of it, going back."""
    n = (keys.k.shape[1] + behind - size) // c + 1
    at = jnp.arange(n)[:, None] * c + jnp.arange(size)[None]
    wide = (jnp.pad(a, ((0, 0), (0, behind), (0, 0), (0, 0))) for a in keys)
    return Keys(*(a[:, at].swapaxes(0, 1) for a in wide))


def noncausal(q, near: Keys, far: Keys, count: jax.Array, window: int) -> jax.Array:
    """o [B,T,H,V]: blocks of `window` queries see as many keys and half as many to
    either side, and all of `far`. q [B,T,H,D] scaled, near of T keys, far of r; count
    [B]: tokens of the row, which stand in front."""
    t, half = q.shape[1], max(window // 2, 1)
    size = window + 2 * half
    # of each block the keys begin `half` in front of it
    wide = Keys(*(jnp.pad(a, ((0, 0), (half, 0), (0, 0), (0, 0))) for a in near))
    near = windows(wide, window, size, half + -t % window)

    @jax.checkpoint
    def block(args):
        n, q, (k, v) = args
        at = n * window - half + jnp.arange(size, dtype=jnp.int32)[None]
        seen = (at >= 0) & (at < count[:, None])  # [B,size]
        # of a row without tokens nothing is seen
        some = (count > 0)[:, None, None, None, None]
        return read([dots(q, far.k), dots(q, k)], [some, seen[:, None, None, None]],
                    [far.v, v])

    q = blocks(q, window)
    number = jnp.arange(q.shape[0], dtype=jnp.int32)
    o = jax.lax.map(block, (number, q, near))  # [N,B,w,H,V]
    return o.swapaxes(0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :t]


class Places(NamedTuple):
    """near [w,H,D], far [M,H,D]: R of each distance; asks, turns [H,D]: the biases b_w
    and b_r of queries."""

    near: jax.Array
    far: jax.Array
    asks: jax.Array
    turns: jax.Array


def row(q, near: Keys, far: Keys, places: Places, at: jax.Array, first, memory: int,
        known: jax.Array) -> jax.Array:
    """o [B,c,H,V] of queries q [B,c,H,D], scaled, at positions `at` [c]. near: keys at
    positions first, first + 1, ...; of those from -memory on a query sees the last w.
    far: of its M rows a query sees the first `known` [c], the newest at distance 0."""
    heads, w = near.k.shape[2], places.near.shape[0]
    here = first + jnp.arange(near.k.shape[1], dtype=jnp.int32)
    back = at[:, None] - here[None]  # [c,S]
    seen = (back >= 0) & (back < w) & (here >= -memory)[None]
    # [c,M]
    age = known[:, None] - 1 - jnp.arange(far.k.shape[1], dtype=jnp.int32)[None]
    # (q + b_w).k_j + (q + b_r).R_(i-j) of near keys, q.k + q.R of far rows
    s = dots(q + places.asks[None, None], near.k)
    s = s + _at(place_dots(q + places.turns[None, None], places.near, heads), back)
    long = dots(q, far.k) + _at(place_dots(q, places.far, heads), age)
    return read([long, s], [a[None, None, None] for a in (age >= 0, seen)],
                [far.v, near.v])


def _at(s: jax.Array, distance: jax.Array) -> jax.Array:
    """Of logits s [B,K,G,c,W] of each distance those of pairs [c,S]: [B,K,G,c,S]."""
    index = jnp.clip(distance, 0, s.shape[-1] - 1)
    return jnp.take_along_axis(
        s, jnp.broadcast_to(index[None, None, None], (*s.shape[:3], *index.shape)), -1)


def causal(q, near: Keys, far: Keys, places: Places, *, start, chunk: int, rank: int,
           memory: int) -> jax.Array:
    """o [B,T,H,V] of T tokens from position `start` on. near: w - 1 keys in front of
    these, and theirs; far: `rank` rows of each chunk of `chunk` tokens, first those of
    the memory."""
    t, before = q.shape[1], places.near.shape[0] - 1
    # blocks as long as the window read no key more than twice
    c = min(t, max(chunk, before + 1))
    near, q = windows(near, c, before + c, -t % c), blocks(q, c)

    @jax.checkpoint
    def block(args):
        n, q, keys = args
        at = start + n * c + jnp.arange(c, dtype=jnp.int32)
        known = (memory + at) // chunk * rank
        return row(q, keys, far, places, at, at[0] - before, memory, known)

    number = jnp.arange(q.shape[0], dtype=jnp.int32)
    o = jax.lax.map(block, (number, q, near))
    return o.swapaxes(0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :t]
