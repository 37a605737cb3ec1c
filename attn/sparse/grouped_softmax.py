"""Grouped softmax: the weight of one key in a group multiplies those of its others.

A row of keys is cut into groups, each closed by a landmark. A query takes one softmax
over the text of its own group and the landmarks of earlier ones, and another inside
each earlier group; the landmark's share of the first is dealt out by the second:

    w_ij = p_ij                       j in the own group
    w_ij = p_ij|group * p_i,m(group)  j in an earlier group with landmark m; w_im = 0

The rows of queries are taken by tiles, so that memory is linear in T. This is the form
for groups that begin anywhere, are retrieved or dropped; where each fills a window of
its own, `attn/exact/gated_groups.py` has them in the chunks of exact attention.
Source: Mohtashami and Jaggi, 2023, arXiv:2305.16300.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.varying import varying
from attn.exact.online import exp_below
from attn.sparse.groups import Row, reducers
from pallas_kernels.logits import Dropout
from pallas_kernels.tile import NEVER

TILE = 128  # queries at once
STEPS = 4  # of the staircase that leaves out keys behind all queries of a tile


class Retrieved(NamedTuple):
    """Groups retrieved for each query: the logits [B,K,G,q,n] of their landmarks, -inf
    where there is none, and values [B,K,G,q,n,V], what the softmax inside of each one
    gives."""

    logits: jax.Array
    values: jax.Array


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
    by_hand: bool = True,
) -> jax.Array:
    """Attention by grouped softmax, q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V].

    size: tokens of a group, its landmark included; None if they vary. ordered: query t
    sees no key behind t. retrieve: the groups for the queries with given indices, as
    `Retrieved`. dropout: of the gates, by its key. by_hand: with a backward pass that
    is written out; without it there are forward-mode derivatives too.
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
    how = How(size, scale, 0.0 if dropout is None else dropout.rate, by_hand)

    @functools.partial(jax.checkpoint, static_argnums=(1,))
    def one(n, end):
        k_end, v_end, keys_end = jax.tree.map(lambda a: a[:, :end], (k, v, keys))
        at = tuple(jax.lax.dynamic_index_in_dim(a, n, 1, False) for a in rows)
        retrieved = None
        if retrieve is not None:
            retrieved = retrieve(jnp.minimum(n * tile + jnp.arange(tile), t - 1))
        noise = None
        if dropout is not None and dropout.key is not None and dropout.rate:
            noise = jax.random.fold_in(dropout.key, n)
        mine = jax.lax.dynamic_index_in_dim(q, n, 1, False)
        return _tile(how, mine, k_end, v_end, keys_end, Row(*at), retrieved, noise)

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


class How(NamedTuple):
    """What is known of a tile before it runs; rate: of dropout; by_hand: it has the
    backward pass that is written out here."""

    size: int | None
    scale: float
    rate: float = 0.0
    by_hand: bool = True


def _tile(how: How, q, k, v, keys: Row, at: Row, retrieved, noise):
    """One tile of queries q [B,q,K,G,D] -> [B,q,H,V]."""
    if retrieved is None:
        # what a backward pass adds up over devices has to vary over all of them
        form = _text_by_hand if how.by_hand else _text
        o = form(how, *varying((q, k, v, keys, at, noise)))
    else:
        o = _with_retrieved(how, q, k, v, keys, at, retrieved)
    return o.reshape(*o.shape[:2], -1, o.shape[-1]).astype(v.dtype)


class Weights(NamedTuple):
    """The weights of a tile [B,K,G,q,S]: w of the values; p of the first softmax, 0 in
    earlier groups' text; gates, p of an earlier group's landmark, dropped or not, at
    all keys of the group."""

    w: jax.Array
    p: jax.Array
    gates: jax.Array


class Kinds(NamedTuple):
    """What a key is to a query, bool [B,1,1,q,S]: text of its own group, landmark of an
    earlier one, text of an earlier one; no key is two of them."""

    own: jax.Array
    landmark: jax.Array
    far: jax.Array


def _kinds(keys: Row, at: Row) -> Kinds:
    at = Row(*(a[:, None, None, :, None] for a in at[:4]))  # [B,1,1,q,1]
    of = Row(*(a[:, None, None, None, :] for a in keys[:4]))  # [B,1,1,1,S]
    seen = (at.segment == of.segment) & (of.segment > 0) & (of.pos <= at.pos)
    mine, mark = at.group == of.group, of.mark
    return Kinds(seen & mine & ~mark, seen & ~mine & mark, seen & ~mine & ~mark)


def _logits(q, k, scale) -> jax.Array:
    # [B,q,K,G,D] x [B,S,K,D] -> [B,K,G,q,S]
    return scale * jnp.einsum(
        "bikgd,bjkd->bkgij", q, k, preferred_element_type=jnp.float32
    )


def _weights(how: How, s, kinds: Kinds, keys: Row, noise=None, beside=None) -> tuple:
    """`Weights` of logits s [B,K,G,q,S], and the shares p of landmarks `beside`
    [B,K,G,q,n], which take part in the first softmax."""
    peak, total = reducers(keys, how.size)
    near = kinds.own | kinds.landmark
    top = jnp.where(near, s, NEVER).max(-1, keepdims=True)
    if beside is not None:
        top = jnp.maximum(top, beside.max(-1, keepdims=True, initial=NEVER))
    # the peaks cancel, so no gradient flows through them
    top = _finite(top)
    base = jnp.where(kinds.far, _finite(peak(jnp.where(kinds.far, s, NEVER))), top)
    # one exponential for both softmaxes: a key takes part in one of them
    e = exp_below(jnp.where(near | kinds.far, s, NEVER), base)
    z = _row_sum(jnp.where(near, e, 0))
    others = None
    if beside is not None:
        others = exp_below(beside, top)
        z = z + _row_sum(others)
    z = jnp.where(z > 0, z, 1)
    p = jnp.where(near, e / z, 0)
    gates = jnp.where(kinds.landmark, p, 0)
    if noise is not None:
        gates = _dropped(gates, noise, how.rate)
    gates = total(gates)
    inner = total(jnp.where(kinds.far, e, 0))
    # p_ij, or p_ij|group p_i,m(group); the weight of a landmark is 0
    w = e * jnp.where(kinds.far, gates / jnp.where(inner > 0, inner, 1),
                      jnp.where(kinds.own, 1 / z, 0))
    return Weights(w, p, gates), None if others is None else others / z


def _finite(peak: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))


def _values(w, v) -> jax.Array:
    # [B,K,G,q,S] x [B,S,K,V] -> [B,q,K,G,V]
    return jnp.einsum("bkgij,bjkv->bikgv", w.astype(v.dtype), v,
                      preferred_element_type=jnp.float32)


def _text(how: How, q, k, v, keys: Row, at: Row, noise):
    """The tile's output [B,q,K,G,V] float32 of the text alone. noise: a PRNG key."""
    found, _ = _weights(how, _logits(q, k, how.scale), _kinds(keys, at), keys, noise)
    return _values(found.w, v)


def _text_forward(how, *arrays):
    return _text(how, *arrays), arrays


def _text_backward(how, arrays, do):
    """The gradients, from weights that are made again:

        dw = do v^T;  delta = sum_j w dw;  share_g = sum_{j in g} w dw
        ds = w (dw - delta)               j in the own group
        ds = w (dw - share_g / gate_g)    j in an earlier group g
        ds = share_g - p delta            j the landmark of g
    """
    q, k, v, keys, at, noise = arrays
    kinds = _kinds(keys, at)
    (w, p, gates), _ = _weights(how, _logits(q, k, how.scale), kinds, keys, noise)
    do = do.astype(v.dtype)
    # [B,q,K,G,V] x [B,S,K,V] -> [B,K,G,q,S]
    dw = jnp.einsum("bikgv,bjkv->bkgij", do, v, preferred_element_type=jnp.float32)
    each = w * dw
    delta = _row_sum(each)
    share = reducers(keys, how.size)[1](jnp.where(kinds.far, each, 0))
    inner = share / jnp.where(gates != 0, gates, 1)  # d(gate): where that is 0, w is
    ds = jnp.where(kinds.landmark, share - p * delta,
                   each - w * jnp.where(kinds.far, inner, delta))
    ds = (how.scale * ds).astype(q.dtype)
    # [B,K,G,q,S] x [B,S,K,D] -> [B,q,K,G,D], the other way for dk, and dv
    dq = jnp.einsum("bkgij,bjkd->bikgd", ds, k, preferred_element_type=jnp.float32)
    dk = jnp.einsum("bkgij,bikgd->bjkd", ds, q, preferred_element_type=jnp.float32)
    dv = jnp.einsum("bkgij,bikgv->bjkv", w.astype(v.dtype), do,
                    preferred_element_type=jnp.float32)
    low = (g.astype(a.dtype) for g, a in zip((dq, dk, dv), (q, k, v)))
    return *low, None, None, None


_text_by_hand = jax.custom_vjp(_text, nondiff_argnums=(0,))
_text_by_hand.defvjp(_text_forward, _text_backward)


def _with_retrieved(how: How, q, k, v, keys: Row, at: Row, retrieved: Retrieved):
    """The same with groups that each query has retrieved."""
    found, distant = _weights(
        how, _logits(q, k, how.scale), _kinds(keys, at), keys, beside=retrieved.logits
    )
    # [B,K,G,q,n] x [B,K,G,q,n,V] -> [B,q,K,G,V]
    return _values(found.w, v) + jnp.einsum(
        "bkgin,bkginv->bikgv", distant, retrieved.values.astype(jnp.float32))


def _row_sum(e: jax.Array) -> jax.Array:
    return e.sum(-1, keepdims=True)


def _dropped(gates, key, rate: float):
    keep = jax.random.bernoulli(key, 1 - rate, gates.shape)
    return jnp.where(keep, gates / (1 - rate), 0)
