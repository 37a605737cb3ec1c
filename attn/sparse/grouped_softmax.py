"""Grouped softmax: the weight of one key in a group multiplies those of its others.

A row of keys is cut into groups, each closed by a landmark. A query takes one softmax
over the text of its own group and the landmarks of earlier ones, and another inside
each earlier group; the landmark's share of the first is dealt out by the second:

    w_ij = p_ij                       j in the own group
    w_ij = p_ij|group * p_i,m(group)  j in an earlier group with landmark m; w_im = 0

The rows of queries are taken by tiles, so that memory is linear in T.
Source: Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.logits import Dropout
from pallas_kernels.tile import NEVER

TILE = 128  # queries at once
STEPS = 4  # of the staircase that leaves out keys behind all queries of a tile


class Row(NamedTuple):
    """What is known of the tokens of a row, [B,T] each.

    segment (an index), pos: as in `attn.contract.segments`. group: number of the
    token's group. mark: it is a landmark. spills: its group began in an earlier window
    of `size` keys; None if every group fills a window of its own.
    """

    segment: jax.Array
    pos: jax.Array
    group: jax.Array
    mark: jax.Array
    spills: jax.Array | None = None


class Retrieved(NamedTuple):
    """Groups retrieved for each query: logits [B,K,G,q,n,size], the landmark's last,
    -inf where there is none, and values [B,K,G,q,n,size,V]."""

    logits: jax.Array
    values: jax.Array


def regular(
    segment: jax.Array, pos: jax.Array, size: int, *, packed: bool = True
) -> Row:
    """The row in which every `size`-th token of a sequence is a landmark. packed: its
    groups begin anywhere, in order and without gaps."""
    spills = None
    if packed:
        index = jnp.arange(segment.shape[1])[None]
        spills = index // size != (index - pos % size) // size
    mark = (pos % size == size - 1) & (segment > 0)
    return Row(segment, pos, pos // size, mark, spills)


def irregular(segment: jax.Array, pos: jax.Array, mark: jax.Array) -> Row:
    """The row in which landmarks stand anywhere: where mark [B,T]."""
    mark = mark & (segment > 0)
    return Row(segment, pos, jnp.cumsum(mark, axis=1) - mark, mark)


def compact(segment: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """segment [B,S] and other arrays [B,S,...] with padding (0) moved to the end."""
    # stable: tokens stay in order, and so do positions
    order = jnp.argsort(segment == 0, axis=1, stable=True)

    def take(a):
        at = order.reshape(order.shape + (1,) * (a.ndim - 2))
        return jnp.take_along_axis(a, at, 1)

    return tuple(take(a) for a in (segment, *others))


def grouped(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Row,
    keys: Row,
    *,
    size: int | None,
    scale: float,
    ordered: bool = False,
    retrieve: Callable[[Any], Retrieved] | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Attention by grouped softmax, q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V].

    size: tokens of a group, its landmark included; None if they vary. ordered: query t
    sees no key behind t. retrieve: the groups for the queries with given indices, as
    `Retrieved`. dropout: of the gates, by its key.
    """
    b, t, h, _ = q.shape
    heads = k.shape[2]
    tile = min(TILE, t)
    count = -(-t // tile)
    q = _pad(q, count * tile).reshape(b, count, tile, heads, h // heads, -1)
    rows = jax.tree.map(
        lambda a: _pad(a, count * tile).reshape(b, count, tile), queries[:4]
    )
    if size is not None:
        whole = -(-k.shape[1] // size) * size
        keys, k, v = jax.tree.map(lambda a: _pad(a, whole), (keys, k, v))
    s = k.shape[1]

    @functools.partial(jax.checkpoint, static_argnums=(1,))
    def one(n, end):
        k_end, v_end, keys_end = jax.tree.map(lambda a: a[:, :end], (k, v, keys))
        at = tuple(jax.lax.dynamic_index_in_dim(a, n, 1, False) for a in rows)
        retrieved = None
        if retrieve is not None:
            retrieved = retrieve(jnp.minimum(n * tile + jnp.arange(tile), t - 1))
        noise = None
        if dropout is not None and dropout.key is not None and dropout.rate:
            noise = jax.random.fold_in(dropout.key, n), dropout.rate
        mine = jax.lax.dynamic_index_in_dim(q, n, 1, False)
        return _tile(
            mine, k_end, v_end, keys_end, Row(*at), size, scale, retrieved, noise
        )

    # keys behind a tile's last query are never looked at, in STEPS sizes: one program
    # for each stretch of tiles
    outs = []
    for first, last in _staircase(count if ordered else 1, count):
        end = min(-(-last * tile // (size or 1)) * (size or 1), s) if ordered else s
        if last - first == 1:
            outs.append(one(first, end)[None])
        else:
            body = lambda n, end=end: one(n, end)
            outs.append(jax.lax.map(body, jnp.arange(first, last)))
    o = jnp.concatenate(outs)  # [N,B,tile,H,V]
    return o.swapaxes(0, 1).reshape(b, count * tile, h, -1)[:, :t]


def _staircase(parts: int, count: int) -> list[tuple[int, int]]:
    """The query tiles 0..count in at most STEPS stretches (first, last)."""
    steps = min(STEPS, parts)
    edges = [round(n * count / steps) for n in range(steps + 1)]
    return list(zip(edges, edges[1:]))


def _pad(a: jax.Array, length: int) -> jax.Array:
    """`a` [B,n,...] filled up with zeros to `length`."""
    return jnp.pad(a, [(0, 0), (0, length - a.shape[1])] + [(0, 0)] * (a.ndim - 2))


def _tile(q, k, v, keys: Row, at: Row, size, scale, retrieved, noise):
    """One tile of queries q [B,q,K,G,D] -> [B,q,H,V]."""
    # [B,q,K,G,D] x [B,S,K,D] -> [B,K,G,q,S]
    s = jnp.einsum("bikgd,bjkd->bkgij", q, k, preferred_element_type=jnp.float32)
    s = s * scale
    at = Row(*(a[:, None, None, :, None] for a in at[:4]))  # [B,1,1,q,1]
    of = Row(*(a[:, None, None, None, :] for a in keys[:4]))  # [B,1,1,1,S]
    seen = (at.segment == of.segment) & (of.segment > 0) & (of.pos <= at.pos)
    own, mark = at.group == of.group, of.mark
    outer = jnp.where(seen & (own ^ mark), s, NEVER)  # own text, or landmarks of others
    n = s.shape[-1]
    if retrieved is not None:
        outer = jnp.concatenate([outer, retrieved.logits[..., -1]], -1)
    # the first softmax: the own group's text and the landmarks of earlier groups
    p = _softmax(outer, outer.max(-1, keepdims=True), _row_sum)
    first, gates = jnp.where(own, p[..., :n], 0), jnp.where(own, 0, p[..., :n])
    distant = p[..., n:]
    if noise is not None:
        gates, distant = _dropped(gates, 0, *noise), _dropped(distant, 1, *noise)
    # the second one: the text inside each earlier group
    peak, total = _reducers(keys, size)
    inside = jnp.where(seen & ~own & ~mark, s, NEVER)
    inner = _softmax(inside, peak(inside), total)
    w = first + inner * total(gates)  # p_ij, or p_ij|group p_i,m(group)
    # [B,K,G,q,S] x [B,S,K,V] -> [B,q,K,G,V]
    o = jnp.einsum("bkgij,bjkv->bikgv", w.astype(v.dtype), v,
                   preferred_element_type=jnp.float32)
    if retrieved is not None:
        text = retrieved.logits[..., :-1]
        peak_of = text.max(-1, keepdims=True, initial=NEVER)
        inner = _softmax(text, peak_of, _row_sum)
        w = (inner * distant[..., None]).astype(v.dtype)
        # [B,K,G,q,n,size-1] x [B,K,G,q,n,size-1,V] -> [B,q,K,G,V]
        o = o + jnp.einsum("bkginj,bkginjv->bikgv", w, retrieved.values[..., :-1, :],
                           preferred_element_type=jnp.float32)
    return o.reshape(*o.shape[:2], -1, o.shape[-1]).astype(v.dtype)


def _softmax(s, peak, total: Callable) -> jax.Array:
    """exp(s) over its total, 0 where there is nothing; `peak`: the group's largest."""
    # the peak cancels, so no gradient flows through it
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    e = jnp.exp(s - peak)
    z = total(e)
    return e / jnp.where(z > 0, z, 1)


def _row_sum(e: jax.Array) -> jax.Array:
    return e.sum(-1, keepdims=True)


def _dropped(gates, salt: int, key, rate: float):
    keep = jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, gates.shape)
    return jnp.where(keep, gates / (1 - rate), 0)


def _reducers(keys: Row, size: int | None) -> tuple[Callable, Callable]:
    """(max, sum) over each key's group, of arrays [B,K,G,q,S], for every key of it."""
    if size is None:
        peak, total = jax.ops.segment_max, jax.ops.segment_sum
        return _by_group(keys, peak), _by_group(keys, total)
    if keys.spills is None:
        return _by_window(jnp.max, size), _by_window(jnp.sum, size)
    spills = keys.spills.reshape(keys.spills.shape[0], 1, 1, 1, -1, size)
    return (_by_two_windows(jnp.max, jnp.maximum, NEVER, spills),
            _by_two_windows(jnp.sum, jnp.add, 0.0, spills))


def _by_group(keys: Row, reduce: Callable) -> Callable:
    """Groups of any lengths."""
    def row(x, group):
        return reduce(jnp.moveaxis(x, -1, 0), group, group.shape[0])[group]

    return lambda x: jnp.moveaxis(jax.vmap(row)(x, keys.group), 1, -1)


def _by_window(reduce: Callable, size: int) -> Callable:
    """Groups that fill a window of `size` keys each."""
    def over(x):
        cut = x.reshape(*x.shape[:-1], -1, size)  # [...,S] -> [...,n,size]
        each = jnp.broadcast_to(reduce(cut, axis=-1, keepdims=True), cut.shape)
        return each.reshape(x.shape)

    return over


def _by_two_windows(reduce, join, nothing: float, spills: jax.Array) -> Callable:
    """Groups that lie in the window in which they begin and, where `spills`
    [B,1,1,1,n,size] says so, in the one after that."""
    def over(x):
        cut = x.reshape(*x.shape[:-1], *spills.shape[-2:])
        left, right = ([*[(0, 0)] * (x.ndim - 1), end] for end in ((1, 0), (0, 1)))

        def part(there):
            return reduce(jnp.where(there, cut, nothing), axis=-1)

        behind = jnp.pad(part(spills)[..., 1:], right, constant_values=nothing)
        each = join(part(~spills), behind)  # of the groups that begin in each window
        before = jnp.pad(each[..., :-1], left, constant_values=nothing)
        return jnp.where(spills, before[..., None], each[..., None]).reshape(x.shape)

    return over
