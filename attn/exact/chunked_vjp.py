"""The passes over chunks of exact attention, forward and backward: XLA's form.

While key chunks pass by, a row of queries keeps its online softmax state; the backward
pass makes each tile again from q, k and lse.
`attn/exact/chunked.py` has the equations, and lays out what comes here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.varying import varying
from attn.exact import gated_groups
from attn.exact.distances import Tables, pulled, term, weighted
from attn.exact.online import (
    EMPTY, OnlineSoftmax, empty, exp_below, output, rescale
)
from pallas_kernels.schedule import Tiling
from pallas_kernels.tile import (
    NEVER, TileSpec, base_and_factor, dropout_keep, sink_logit
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one call before it runs: the tiles and the form of a logit.
    zero: the row of distance 0 in tables of distances. group: keys of a group that has
    a gate."""

    form: TileSpec
    tiling: Tiling
    pairs: tuple[tuple[int, int], ...]
    zero: int = 0
    group: int | None = None

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return self.tiling.rows, self.tiling.columns

    @property
    def padded(self) -> tuple[int, int]:
        """Queries and keys of all tiles."""
        (n, m), (bq, bk) = self.tiling.grid, self.tile
        return n * bq, m * bk


class Constants(NamedTuple):
    """Arrays of one call that have no gradient; None for what it does not use.

    q_pos [B,T], kv_pos [B,S,K|1], q_segment [B,T], kv_segment [B,S], head [K,G], keep
    [B,K,G,T,S] bool, seed [2] uint32 and batch [B] number the rows for dropout; busy
    [pairs] bool: which tiles hold a visible pair, where that depends on the data; first
    int32: how far query 0 stands from key 0, for tables of distances.
    """

    q_pos: Any = None
    kv_pos: Any = None
    q_segment: Any = None
    kv_segment: Any = None
    head: Any = None
    keep: Any = None
    seed: Any = None
    batch: Any = None
    busy: Any = None
    first: Any = None


def _cut(a, axis: int, n, size: int):
    """Tile `n` of `a` along `axis`; an axis of 1 and None stay whole."""
    if a is None or a.shape[axis] == 1 or a.shape[axis] == size:
        return a
    return jax.lax.dynamic_slice_in_dim(a, n * size, size, axis)


def _put(a, part, axis: int, n, size: int):
    if a.shape[axis] == part.shape[axis]:
        return part
    return jax.lax.dynamic_update_slice_in_dim(a, part, n * size, axis)


def _seen(plan: Plan, const: Constants, i, j):
    """The mask and its positions on tile (i, j): (bool or None, h, q_pos, kv_pos)."""
    bq, bk = plan.tile
    offset = plan.tiling.offset
    if offset is None:
        q_pos = _cut(const.q_pos, 1, i, bq)[:, None, None, :, None]
        kv_pos = jnp.moveaxis(_cut(const.kv_pos, 1, j, bk), 2, 1)[:, :, None, None, :]
    else:
        # i and j may be traced: one program serves all tiles of a scan
        q_pos = (i * bq + offset + jnp.arange(bq))[None, None, None, :, None]
        kv_pos = (j * bk + jnp.arange(bk))[None, None, None, None, :]
    h = const.head[None, :, :, None, None]
    seen = None if plan.form.mask is None else plan.form.mask(h, q_pos, kv_pos)
    tests = [] if seen is None else [seen]
    if offset is None:
        tests.append(kv_pos >= 0)
    if const.q_segment is not None:
        q_segment = _cut(const.q_segment, 1, i, bq)[:, None, None, :, None]
        kv_segment = _cut(const.kv_segment, 1, j, bk)[:, None, None, None, :]
        tests.append((q_segment == kv_segment) & (kv_segment > 0))
    seen = functools.reduce(lambda a, b: a & b, tests) if tests else None
    return seen, h, q_pos, kv_pos


def _tile_logits(plan: Plan, const: Constants, q, k, bias, tables, i, j):
    """Logits of tile (i, j) [B,K,G,bq,bk], -inf where hidden; and
    d(capped)/d(scale raw)."""
    bq, bk = plan.tile
    # [B,K,G,bq,D] x [B,K,bk,D] -> [B,K,G,bq,bk]
    raw = jnp.einsum("bkgid,bkjd->bkgij", q, k, preferred_element_type=jnp.float32)
    seen, h, q_pos, kv_pos = _seen(plan, const, i, j)
    if tables is not None:
        raw = raw + _term(plan, const, i, j)(q, tables.keys)
    bias = _cut(_cut(bias, 3, i, bq), 4, j, bk)
    s, slope = plan.form.logits(raw, h, q_pos, kv_pos, bias)
    # -inf before exp: a hidden key has weight 0, and so no gradient
    return (s if seen is None else jnp.where(seen, s, NEVER)), slope


def _term(plan: Plan, const: Constants, i, j) -> Callable:
    """x_i.e_(i-j) of tile (i, j): see `attn/exact/distances.py`."""
    places = _seen(plan, const, i, j)[2:]
    return term(plan.zero, const.first, plan.tile, (i, j), places)


def _groups(plan: Plan, const: Constants, s, i, j) -> gated_groups.Groups | None:
    """The groups of the tile's logits, if they have gates."""
    if plan.group is None:
        return None
    _, _, q_pos, kv_pos = _seen(plan, const, i, j)
    return gated_groups.by_group(s, q_pos, kv_pos, plan.group)


def _tile_keep(plan: Plan, const: Constants, i, j):
    """What dropout multiplies the weights of tile (i, j) with; None for nothing."""
    bq, bk = plan.tile
    if const.keep is not None:
        chosen = _cut(_cut(const.keep, 3, i, bq), 4, j, bk)
    elif const.seed is not None:
        row, column = i * bq + jnp.arange(bq), j * bk + jnp.arange(bk)
        chosen = dropout_keep(
            plan.form.dropout, const.seed, const.batch[:, None, None, None, None],
            const.head[None, :, :, None, None], row[None, None, None, :, None],
            column[None, None, None, None, :],
        )
    else:
        return None
    # what is kept is made larger, so that the expectation stays
    return chosen.astype(jnp.float32) / (1 - plan.form.dropout)


def _over_tiles(plan: Plan, const: Constants, body: Callable, carry):
    """The carry after `body(carry, i, j)` of the plan's tiles, one after the other."""
    # one tile needs no loop, and its slices become no operations at all
    if len(plan.pairs) == 1:
        return body(carry, *plan.pairs[0])
    # by numpy: jax looks at each number of nested tuples by itself
    pairs = jnp.asarray(np.asarray(plan.pairs, np.int32).reshape(-1, 2))

    def step(carry, at):
        pair, busy = at
        i, j = pair[0], pair[1]
        if busy is None:
            return body(carry, i, j), None
        return jax.lax.cond(busy, lambda c: body(c, i, j), lambda c: c, carry), None

    return jax.lax.scan(step, carry, (pairs, const.busy))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(plan: Plan, const: Constants, q, k, v, bias, sink, tables=None):
    """q [B,K,G,T,D], k [B,K,S,D], v [B,K,S,V], all multiples of a tile; bias
    [B|1,K|1,G|1,T|1,S|1], sink [K,G], tables of distances -> o [B,K,G,T,V] float32, m,
    l [B,K,G,T]."""
    return _forward(plan, const, q, k, v, bias, sink, tables)[0]


def _forward(plan, const, q, k, v, bias, sink, tables=None):
    state = empty(q.shape[:4], v.shape[-1])
    if sink is not None:
        # a logit without value: m = sink, l = 1, acc = 0; -inf is none
        m = jnp.broadcast_to(sink_logit(sink)[None, :, :, None], state.m.shape)
        some = (m > NEVER).astype(jnp.float32)
        state = state._replace(m=jnp.maximum(m, EMPTY), l=some)
    body = functools.partial(_forward_tile, plan, const, (q, k, v, bias, tables))
    state = varying(state, const, q, k, v, bias, sink, tables)
    state = _over_tiles(plan, const, body, state)
    o, m, l = output(state), state.m, state.l
    return (o, m, l), (const, q, k, v, bias, sink, tables, o, m, l)


def _forward_tile(plan: Plan, const: Constants, arrays, state, i, j) -> OnlineSoftmax:
    """The state of all queries with what tile (i, j) says of its own: the inner
    loop of FlashAttention's Algorithm 1 (arXiv:2205.14135), divided only at last."""
    (q, k, v, bias, tables), (bq, bk) = arrays, plan.tile
    q_i, k_j, v_j = _cut(q, 3, i, bq), _cut(k, 2, j, bk), _cut(v, 2, j, bk)
    s, _ = _tile_logits(plan, const, q_i, k_j, bias, tables, i, j)
    old = OnlineSoftmax(*(_cut(a, 3, i, bq) for a in state))
    groups = _groups(plan, const, s, i, j)
    top = s if groups is None else groups.c
    m = jnp.maximum(old.m, top.max(-1))  # [B,K,G,bq]
    # exp(s_j - m'): m' is finite, so a row that sees nothing is no NaN
    if groups is None:
        parts = p = exp_below(s, m[..., None])
    else:
        parts, p = gated_groups.weights(groups, m[..., None])
    _, l, acc = rescale(old, m)  # l and acc times exp(m - m')
    l = l + parts.sum(-1)  # dropout leaves the sum as it is
    keep = _tile_keep(plan, const, i, j)
    p = p if keep is None else p * keep
    # [B,K,G,bq,bk] x [B,K,bk,V] -> [B,K,G,bq,V]
    acc = acc + jnp.einsum("bkgij,bkjv->bkgiv", p.astype(v.dtype), v_j,
                           preferred_element_type=jnp.float32)
    if tables is not None and tables.values is not None:
        acc = acc + weighted(_term(plan, const, i, j), p, tables.values)
    new = OnlineSoftmax(m, l, acc)
    return OnlineSoftmax(*(_put(a, b, 3, i, bq) for a, b in zip(state, new)))


def _backward(plan, saved, cotangents):
    *arrays, o, m, l = saved
    do, _, dl = cotangents
    # delta = rowsum(do o); d(log l) = l d(l) enters exactly where it leaves
    delta = (do * o).sum(-1) - l * dl
    base, factor = base_and_factor(m, l)
    return _gradients(plan, arrays, base, delta * factor, do * factor[..., None])


def _gradients(plan, arrays, base, delta, do):
    """The gradients, with weights exp(s - base): base, delta [B,K,G,T]; do."""
    const, q, k, v, bias, sink, tables = arrays
    rows = do.astype(v.dtype), delta, base
    given = q, k, v, bias, tables
    body = functools.partial(_backward_tile, plan, const, given, rows)
    start = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), given)
    start = varying(start, const, *given, rows)
    grads = _over_tiles(plan, const, body, start)
    dsink = None
    if sink is not None:
        # the sink's share of each row is a weight whose value is 0
        share = jnp.exp(sink_logit(sink)[None, :, :, None] - base)
        dsink = -(share * delta).sum((0, 3)).astype(sink.dtype)
    *low, dtables = jax.tree.map(lambda d, a: d.astype(a.dtype), grads, given)
    return None, *low, dsink, dtables


def _backward_tile(plan: Plan, const: Constants, arrays, rows, carry, i, j):
    """(dq, dk, dv, dbias, dtables) with what tile (i, j) adds, as FlashAttention goes
    back:

        p = exp(s - base);  dv += p^T do;  dp = do v^T;  ds = p (dp - delta)
        dq += scale ds k;  dk += scale ds^T q

    arrays: q, k, v, bias, tables; rows: do, delta and base of the queries. Base is lse,
    or near it; do and delta are multiplied by exp(base - lse).
    """
    (q, k, v, bias, tables), (bq, bk) = arrays, plan.tile
    dq, dk, dv, dbias, dtables = carry
    q_i, k_j, v_j = _cut(q, 3, i, bq), _cut(k, 2, j, bk), _cut(v, 2, j, bk)
    do, delta, base = (_cut(a, 3, i, bq) for a in rows)
    s, slope = _tile_logits(plan, const, q_i, k_j, bias, tables, i, j)
    groups = _groups(plan, const, s, i, j)
    # no logit is above base; of large ones, one that was rounded otherwise here may be
    if groups is None:
        p = exp_below(s, base[..., None])  # [B,K,G,bq,bk]
    else:
        share, p = gated_groups.weights(groups, base[..., None])
    # [B,K,G,bq,V] x [B,K,bk,V] -> [B,K,G,bq,bk]
    dp = jnp.einsum("bkgiv,bkjv->bkgij", do, v_j, preferred_element_type=jnp.float32)
    by_value = tables is not None and tables.values is not None
    if by_value:  # values are v_j + w_(i-j)
        dp = dp + _term(plan, const, i, j)(do, tables.values)
    keep = _tile_keep(plan, const, i, j)
    # dropout acts behind the softmax: on p for dv, on dp for ds
    dropped = p if keep is None else p * keep
    dp = dp if keep is None else dp * keep
    if groups is None:
        ds = p * (dp - delta[..., None])
    else:
        ds = gated_groups.pulled(groups, share, p, dp, delta[..., None])
    # [B,K,G,bq,bk] x [B,K,G,bq,V] -> [B,K,bk,V], summed over G
    dv_j = jnp.einsum("bkgij,bkgiv->bkjv", dropped.astype(v.dtype), do,
                      preferred_element_type=jnp.float32)
    # the bias stands behind scale and softcap
    if dbias is not None:
        dbias = _add_bias(dbias, ds, plan.tile, i, j)
    # back through softcap and scale
    ds = ((ds if slope is None else ds * slope) * plan.form.scale).astype(q.dtype)
    # [B,K,G,bq,bk] x [B,K,bk,D] -> [B,K,G,bq,D], and the other way for dk
    dq_i = jnp.einsum("bkgij,bkjd->bkgid", ds, k_j, preferred_element_type=jnp.float32)
    dk_j = jnp.einsum("bkgij,bkgid->bkjd", ds, q_i, preferred_element_type=jnp.float32)
    if tables is not None:
        # q stands in q.e too; of w, what p and do say of it
        of_q, dkeys = pulled(
            _term(plan, const, i, j), q_i.astype(jnp.float32),
            tables.keys.astype(jnp.float32), ds.astype(jnp.float32))
        dq_i, dvalues = dq_i + of_q, dtables.values
        if by_value:
            dvalues = dvalues + pulled(
                _term(plan, const, i, j), do.astype(jnp.float32),
                tables.values.astype(jnp.float32), dropped)[1]
        dtables = Tables(dtables.keys + dkeys, dvalues)
    dq = _put(dq, _cut(dq, 3, i, bq) + dq_i, 3, i, bq)
    dk = _put(dk, _cut(dk, 2, j, bk) + dk_j, 2, j, bk)
    dv = _put(dv, _cut(dv, 2, j, bk) + dv_j, 2, j, bk)
    return dq, dk, dv, dbias, dtables


def _add_bias(dbias, ds, tile, i, j):
    """Adds ds of one tile to the bias gradient, summed where the bias broadcasts."""
    axes = tuple(n for n in range(5) if dbias.shape[n] == 1 and ds.shape[n] > 1)
    part = ds.sum(axes, keepdims=True)  # [B|1,K|1,G|1,bq|1,bk|1]
    row = _cut(dbias, 3, i, tile[0])
    row = _put(row, _cut(row, 4, j, tile[1]) + part, 4, j, tile[1])
    return _put(dbias, row, 3, i, tile[0])


chunked.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_part(plan: Plan, const: Constants, q, k, v, bias, sink, lse):
    """`chunked` of a part of the keys, with the lse of them all, which it returns."""
    return jnp.zeros((*q.shape[:4], v.shape[-1]), jnp.float32), lse


def _backward_part(plan, saved, cotangents):
    *arrays, lse = saved
    do, dlse = cotangents
    # a row that sees nothing: exp(-inf - 0) is 0, where -inf - -inf were no number
    base = jnp.where(jnp.isfinite(lse), lse, 0)
    # what d(o) says of delta is in lse's cotangent already
    *grads, _ = _gradients(plan, (*arrays, None), base, -dlse, do)
    return *grads, None


def _forward_part(plan, *arrays):
    return chunked_part(plan, *arrays), arrays


chunked_part.defvjp(_forward_part, _backward_part)
