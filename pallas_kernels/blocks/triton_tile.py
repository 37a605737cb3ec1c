"""Chosen blocks on GPU by Triton: which queries and keys a tile holds, and its logits.

Arrays are read where they lie, [B,T,H,D]. Row r of a query block is head r % heads of
its token r // heads, so that rows follow each other in memory. Blocks that do not fill
a tile, of 8 or 50 tokens, are laid end to end: a tile takes the next `columns` keys of
all that were chosen, or the next `rows` rows of all query blocks of a list.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from pallas_kernels.flash.triton_tile import Arrays
from pallas_kernels.machine.triton import lanes, load, power
from pallas_kernels.tile import NEVER, both


class Queries(NamedTuple):
    """Rows of a tile: token, head as it lies in q, whether there is such a row (None:
    all are there), position, segment or None, and global head."""

    token: Any
    head: Any
    real: Any
    pos: Any
    segment: Any
    name: Any


class Keys(NamedTuple):
    """Keys of a tile: token, whether there is such a key and whether it may be seen
    (None: all), position, and segment or None."""

    token: Any
    real: Any
    seen: Any
    pos: Any
    segment: Any


class Chosen(NamedTuple):
    """What query blocks chose: count [B,C,N] blocks, the first of where [B,C,N,n]."""

    count: Any
    where: Any


class Parts(NamedTuple):
    """The inverse lists in parts of bounded length: part p [B,K,P] has the entries
    [B,K,E] from start to stop, all of one block; block j has the parts first[j] to
    first[j + 1] [B,K,S/block+1]."""

    block: Any
    start: Any
    stop: Any
    first: Any
    entries: Any


def queries(static, x: Arrays, b, c, n, r, real) -> Queries:
    """Rows `r` of query blocks `n` of the heads of choice `c`."""
    heads = jnp.int32(static.heads)
    token = n * static.size + jax.lax.div(r, heads)
    head = c * static.heads + jax.lax.rem(r, heads)
    if static.n * static.size != static.t:  # the last block may pass T
        real = both(real, token < static.t)
    pos = token if x.q_pos is None else load(x.q_pos.at[b, token], real, 0)
    segment = None if x.q_segment is None else load(x.q_segment.at[b, token], real, 0)
    return Queries(token, head, real, pos, segment, load(x.heads.at[head], real, 0))


def keys(static, x: Arrays, b, token, real) -> Keys:
    """Keys `token`, of which those that are `real` belong to the tile."""
    if static.s % static.block:  # the last block may pass S
        real = both(real, token < static.s)
    pos, segment, seen = token, None, real
    if x.kv_pos is not None:
        pos = load(x.kv_pos.at[b, token], real, -1)
        seen = both(seen, pos >= 0)  # -1: an empty slot
    if x.kv_segment is not None:
        segment = load(x.kv_segment.at[b, token], real, 0)
    return Keys(token, real, seen, pos, segment)


def of_block(static, columns: int, number, piece):
    """Tokens of a piece of a key block, their places in it, and which are there."""
    at = piece * columns + jax.lax.broadcasted_iota(jnp.int32, (columns,), 0)
    token = number * static.block + at
    real = at < static.block if static.block % columns else None
    return token, at, real


def chosen_keys(static, columns: int, x: Arrays, lists: Chosen, b, c, n):
    """How many tiles the keys chosen by a query block make, and each of them."""
    block = static.block
    count = lists.count[b, c, n]
    if block % columns == 0:  # a tile lies inside a block
        many = block // columns

        def piece(i) -> Keys:
            number = lists.where[b, c, n, jax.lax.div(i, many)]
            token, _, _ = of_block(static, columns, number, jax.lax.rem(i, many))
            return keys(static, x, b, token, None)

        return count * many, piece

    # a tile may span blocks: each key looks up its own
    def several(i) -> Keys:
        at = i * columns + jax.lax.broadcasted_iota(jnp.int32, (columns,), 0)
        real = at < count * block
        number = load(lists.where.at[b, c, n, jax.lax.div(at, block)], real, 0)
        token = number * block + jax.lax.rem(at, block)
        return keys(static, x, b, token, real)

    return jax.lax.div(count * block + columns - 1, columns), several


def listed_rows(static, rows: int, x: Arrays, parts: Parts, b, kv, p):
    """How many tiles the rows of part `p` of the lists make, and each of them."""
    each = static.heads * static.size
    groups = x.q.shape[2] // x.k.shape[2] // static.heads
    start, many = parts.start[b, kv, p], parts.stop[b, kv, p] - parts.start[b, kv, p]

    # an entry c * N + n as its choice and its query block
    def place(entry) -> tuple[Any, Any]:
        choice = kv * groups + jax.lax.div(entry, static.n)
        return choice, jax.lax.rem(entry, static.n)

    if each % rows == 0:  # a tile lies inside a query block
        pieces = each // rows

        def piece(i) -> Queries:
            entry = parts.entries[b, kv, start + jax.lax.div(i, pieces)]
            r = jax.lax.rem(i, pieces) * rows
            r = r + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
            return queries(static, x, b, *place(entry), r, None)

        return many * pieces, piece

    # a tile may span query blocks: each row looks up its own
    def several(i) -> Queries:
        at = i * rows + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
        real = at < many * each
        number = start + jax.lax.div(at, each)
        entry = load(parts.entries.at[b, kv, number], real, 0)
        return queries(static, x, b, *place(entry), jax.lax.rem(at, each), real)

    return jax.lax.div(many * each + rows - 1, rows), several


def logits(static, raw, query: Queries, key: Keys, turned: bool = False):
    """Logits times their unit of a tile, NEVER where hidden, from the products `raw`
    [rows,columns], or, `turned`, [columns,rows]."""
    s, _ = static.form.logits(raw, None, None, None)  # no score here
    i, j = across(turned)
    seen = None if key.seen is None else j(key.seen)
    if key.segment is not None:
        seen = both(seen, (i(query.segment) == j(key.segment)) & j(key.segment > 0))
    if static.form.mask is not None:
        own = static.form.mask(i(query.name), i(query.pos), j(key.pos))
        seen = both(seen, own)
    return s if seen is None else jnp.where(seen, s, NEVER)


def across(turned: bool) -> tuple[Callable, Callable]:
    """How vectors of rows and of columns broadcast against a tile."""

    def down(a):
        return a[:, None]

    def along(a):
        return a[None, :]

    return (along, down) if turned else (down, along)


def _cut(ref, index: tuple, count: int):
    shape = count, power(ref.shape[-1])  # [count,width]
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    # one number for all vectors, or one each, over all lanes
    def wide(a):
        return jnp.broadcast_to(a[:, None], shape) if jnp.ndim(a) else a

    return ref.at[(*map(wide, index), lane)]


def fetch(ref, index: tuple, real, count: int):
    """`count` vectors [count,width] at `index`, one scalar or vector an axis but the
    last; 0 where they are not `real`."""
    return load(_cut(ref, index, count), lanes(ref.shape[-1], count, real), 0)


def put(ref, value, index: tuple, real) -> None:
    """The reverse of `fetch`."""
    count = value.shape[0]
    triton.store(_cut(ref, index, count), value.astype(ref.dtype),
                 mask=lanes(ref.shape[-1], count, real))
