"""Estimated rows: attention to keys that columns of a compressed matrix name.

A row of attention is estimated in K columns, each of which stands for the keys of a
K-th of what the row sees; the best columns of all heads together are kept, and the keys
for which they stand are read exactly. The list of a row's keys is made from the columns
by prefix sums, so that neither time nor memory are those of the T x T matrix.

Source: Lee et al., 2023, arXiv:2310.01777, and the code that its authors published.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 2**22  # numbers of gathered keys of the rows that are read at once


class Kept(NamedTuple):
    """The keys of one row [P]: their head, their rank among the keys that the row sees,
    and whether there is one."""

    head: jax.Array
    rank: jax.Array
    there: jax.Array


def column_of(rank, length, columns: int):
    """The column that stands for the key of this rank, of `length` keys seen."""
    at = (rank + 0.5) / jnp.maximum(length, 1) * columns - 1e-4
    return jnp.clip(jnp.floor(at), 0, columns).astype(jnp.int32)


def first_rank(column, length, columns: int) -> jax.Array:
    """The first rank whose column is this one or a later one, in float32 as
    `column_of` has it."""
    scale = length.astype(jnp.float32) / columns
    # `column_of` solved for the rank
    guess = jnp.ceil((column.astype(jnp.float32) + 1e-4) * scale - 0.5)
    guess = guess.astype(jnp.int32)
    # how it was rounded may move it by one
    guess = jnp.clip(guess, 0, length) - 1
    of = functools.partial(
        column_of, length=length.astype(jnp.float32), columns=columns)
    for _ in range(2):
        early = of(guess.astype(jnp.float32)) < column
        short = (guess < length) & ((guess < 0) | early)
        guess = guess + short.astype(jnp.int32)
    return guess


def most_kept(length: int, heads: int, columns: int, keep: int) -> int:
    """How many keys a row of at most `length` keys keeps, at most, over all heads."""
    n = np.arange(1, length + 1)
    # columns that are chosen, and keys that one stands for, of every length n
    chosen = np.minimum(np.maximum(np.round(heads * keep * columns / n), 1),
                        heads * columns)
    each = -(-n // columns) + 1
    return int(np.minimum(chosen * each, heads * n).max())


def selected(p: jax.Array, length: jax.Array, keep: int) -> jax.Array:
    """The best entries of each row over heads and columns: p [B,T,H,K], length [B,T]
    keys seen -> bool. So many that a head keeps `keep` keys in the mean; one or more,
    and none of a row that sees nothing."""
    b, t, heads, columns = p.shape
    most = number_selected(length, heads, columns, keep)
    flat = p.reshape(b, t, heads * columns)
    # the rank of each entry in its row, 0 for the best
    order = jnp.argsort(-flat, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < most[..., None]).reshape(p.shape)


def number_selected(length: jax.Array, heads: int, columns: int, keep: int):
    """round(H k K / length), at least 1; 0 of a row that sees nothing."""
    length = length.astype(jnp.float32)
    most = jnp.round(heads * keep * columns / jnp.maximum(length, 1))
    return jnp.where(length > 0, jnp.maximum(most, 1), 0).astype(jnp.int32)


def kept(chosen: jax.Array, length: jax.Array, most: int) -> Kept:
    """The keys of one row whose columns are chosen [H,K], of `length` keys seen, in at
    most `most` places."""
    heads, columns = chosen.shape
    edges = first_rank(jnp.arange(columns + 1, dtype=jnp.int32), length, columns)
    begin = jnp.broadcast_to(edges[None, :-1], chosen.shape).reshape(-1)
    wide = jnp.where(chosen, (edges[1:] - edges[:-1])[None], 0).reshape(-1)
    end = jnp.cumsum(wide)  # of each column, in places of the list
    place = jnp.arange(most, dtype=jnp.int32)
    # the column that a place belongs to: the first that ends behind it
    at = jnp.searchsorted(end, place, side="right").astype(jnp.int32)
    at = jnp.minimum(at, heads * columns - 1)
    rank = begin[at] + place - (end[at] - wide[at])
    return Kept(at // columns, rank, place < end[-1])


def read(
    q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array, length: jax.Array,
    order: jax.Array | None, scale: float, most: int,
) -> jax.Array:
    """The softmax over kept keys, by head, times values: q [B,T,H,D], k [B,S,K',D],
    v [B,S,K',V], chosen [B,T,H,K] columns of rows that see length [B,T] keys -> o
    [B,T,H,V] float32. order [B,S]: the index of the key of each rank, None if it is the
    rank. A head that keeps nothing gives 0."""
    b, t, h, d = q.shape
    group = h // k.shape[2]

    def row(k, v, order, q, chosen, length):
        list_of = kept(chosen, length, most)
        key = jnp.clip(list_of.rank, 0, k.shape[0] - 1)
        key = key if order is None else order[key]
        mine = (list_of.head[:, None] == jnp.arange(h)[None]) & list_of.there[:, None]
        keys = k[key, list_of.head // group]  # [P,D]
        s = (q[list_of.head].astype(jnp.float32) * keys.astype(jnp.float32)).sum(-1)
        s = s * scale
        top = jnp.where(mine, s[:, None], -jnp.inf).max(0)  # [H]
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
        # where there is no key, exp of nothing large: its gradient would be no number
        below = jnp.where(list_of.there, s - top[list_of.head], 0)
        # a softmax for each head of the list: exp(s - top_h) / sum_h
        e = jnp.where(list_of.there, jnp.exp(below), 0)
        total = jnp.where(mine, e[:, None], 0).sum(0)
        w = e / jnp.where(total > 0, total, 1)[list_of.head]
        vals = v[key, list_of.head // group].astype(jnp.float32)
        # [P,H] x [P,V] -> [H,V]
        return jnp.einsum("ph,pv->hv", jnp.where(mine, w[:, None], 0), vals)

    @jax.checkpoint
    def rows(args):  # of one token of each row of the batch
        orders = None if order is None else 0
        return jax.vmap(row, (0, 0, orders, 0, 0, 0))(k, v, order, *args)

    first = lambda a: jnp.moveaxis(a, 1, 0)
    at_once = max(1, min(t, ROWS // (most * (d + v.shape[3]))))
    o = jax.lax.map(rows, (first(q), first(chosen), first(length)), batch_size=at_once)
    return jnp.moveaxis(o, 0, 1)


def stretched(a: jax.Array, length: jax.Array, rank: jax.Array) -> jax.Array:
    """Columns a [B,T,H,K] of rows that see length [B,T] keys, as keys: [B,H,T,S] of
    the keys whose ranks are rank [B|1,S]. For losses and pictures: memory T^2."""
    columns = a.shape[-1]
    at = column_of(rank[:, None].astype(jnp.float32),
                   length[..., None].astype(jnp.float32), columns)  # [B,T,S]
    at = jnp.minimum(at, columns - 1)[:, :, None]
    at = jnp.broadcast_to(at, (*a.shape[:3], at.shape[-1]))
    return jnp.moveaxis(jnp.take_along_axis(a, at, -1), 2, 1)


def losses(
    scores: jax.Array, teacher: jax.Array, seen: jax.Array, rows: jax.Array,
    squared: jax.Array, by_rows: bool,
) -> jax.Array:
    """0.1 KL(a || softmax(scores)) + the mean squared difference, of a = softmax(
    teacher): scores and teacher [B,H,T,S], seen [B,1,T,S]. rows, squared [B,T]: what
    counts in the divergence and in the difference. The divergence is summed over heads
    and divided by the number of rows, or, `by_rows`, by that of rows and heads."""
    def shares(s):
        s = jnp.where(seen, s, -1e30)
        log = jax.nn.log_softmax(s)
        return jnp.where(seen, log, 0), jnp.where(seen, jnp.exp(log), 0)

    (_, target), (log, own) = shares(teacher), shares(scores)
    some = rows[:, None, :, None] & seen
    kl = jnp.where(some, target * (jnp.log(target + 1e-12) - log), 0).sum()
    count = rows.astype(jnp.float32).sum() * (scores.shape[1] if by_rows else 1)
    gap = jnp.where(squared[:, None, :, None], own - target, 0)
    return 0.1 * kl / count + (gap**2).mean()
