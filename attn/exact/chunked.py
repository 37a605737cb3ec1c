"""Exact softmax attention in chunks, in memory linear in T: the XLA form.

The queries and keys are cut into chunks, and the tiles of the matrix, pairs of chunks,
that the mask leaves are visited one after the other. While key chunks pass by, a row
keeps its running maximum m, the sum l of its exponentials and the weighted sum acc of
values (`attn/exact/online.py`):

    m' = max(m, max_j s_j);  l = exp(m - m') l + sum_j exp(s_j - m')
    acc = exp(m - m') acc + sum_j exp(s_j - m') v_j;   o = acc / l, lse = m + log l

The backward pass makes each tile again from q, k and lse:

    p = exp(s - m) / l;  ds = p (do.v - delta),  delta = sum(do * o) - d(lse)

in which m and l stay apart: where m is large, m + log l has nothing of l.

Source: Dao et al., 2022, arXiv:2205.14135.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.varying import varying
from attn.exact.chunked_vjp import Constants, Plan, chunked, chunked_part
from attn.exact.distances import Distances, check_distances, grouped as by_group
from attn.masks import Full
from pallas_kernels.arrays import check_logits
from pallas_kernels.logits import Dropout, LogitSpec, Where
from pallas_kernels.schedule import SKIP, Tiling, block_mask, traced_block_mask
from pallas_kernels.tile import NEVER, TileSpec, lse_of

KEYS = 512  # of a chunk of 256 queries
FEWER = 1.5  # tiles of half of that, for one: they pay where a mask leaves so few


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(Full()),
    where: Where = Where(),
    *,
    bias: jax.Array | None = None,
    sink: jax.Array | None = None,
    dropout: Dropout | None = None,
    given: jax.Array | None = None,
    split_lse: bool = False,
    tile: tuple[int, int] | None = None,
    distances: Distances | None = None,
    group: int | None = None,
) -> tuple[jax.Array, ...]:
    """Exact attention in memory linear in T: o [B,T,H,V] and lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]. `bias` [B|1,H|1,T|1,S|1] is added to the
    logits of `spec`, before the mask. `sink` [H]: a logit without value that takes part
    in every row's sum. A row that sees nothing gives o = 0 and lse = -inf (with a sink:
    o = 0, lse = sink). dropout acts if it has a `key` or says what to `keep`.

    given [B,H,T]: the lse that these queries have with all of their keys, if k and v
    are a part of those, for the part's gradients: nothing is computed, o is 0, and
    lse's cotangent is to hold what all parts share, d(lse) - sum(d(o) o) of the whole;
    a number near the lse will do, if both cotangents are multiplied by
    exp(given - lse). split_lse: m and l [B,H,T] instead of lse = m + log l, which a
    large m leaves nothing of l; no gradient flows through m, on which nothing depends.
    tile: queries and keys of a chunk. distances: learned vectors of them, beside k and
    v; not of a part. group: keys of a group, from key 0 on, whose last one is the gate
    of the others (`attn/exact/gated_groups.py`). Source: see the module.
    """
    check_given(q, k, where, bias, sink, dropout, given)
    (b, t, h, _), heads = q.shape, k.shape[2]
    if where.kv_pos is not None and where.kv_pos.ndim == 2:
        where = dataclasses.replace(where, kv_pos=where.kv_pos[..., None])
    if distances is not None:
        check_distances(distances, q, k, v)
    plan, table = _plan(q, k, spec, where, dropout, tile, distances, group)
    const = _constants(plan, where, dropout, (b, h, heads))
    first = None if distances is None else distances.first
    const = const._replace(busy=_busy(plan, table, where), first=first)
    rows, columns = plan.padded
    # a key head's G = H/K query heads lie side by side and share its chunks
    grouped = q.reshape(b, t, heads, h // heads, -1).transpose(0, 2, 3, 1, 4)
    grouped = _pad(grouped, 3, rows)  # [B,K,G,T,D]
    # [B,K,S,D] and [B,K,S,V]
    keys, vals = (_pad(a.transpose(0, 2, 1, 3), 2, columns) for a in (k, v))
    bias = _grouped(bias, heads)
    if bias is not None:
        bias = bias if bias.shape[3] == 1 else _pad(bias, 3, rows)
        bias = bias if bias.shape[4] == 1 else _pad(bias, 4, columns)
    if sink is not None:
        sink = sink.astype(jnp.float32).reshape(heads, h // heads)  # [H] -> [K,G]
    tables = by_group(distances, heads)
    const, (*arrays, tables) = varying(
        (const, (grouped, keys, vals, bias, sink, tables)))
    if given is None:
        o, m, l = chunked(plan, const, *arrays, tables)
        m = jax.lax.stop_gradient(m)
        sums = (m, l) if split_lse else (lse_of(m, l),)
    else:
        # queries that are filled in see nothing
        lse = _pad(given.reshape(b, heads, h // heads, t), 3, rows, NEVER)
        o, *sums = chunked_part(plan, const, *arrays, lse)
    # [B,K,G,T,V] -> [B,T,H,V]
    o = o.transpose(0, 3, 1, 2, 4).reshape(b, rows, h, -1)[:, :t]
    return o.astype(v.dtype), *(a.reshape(b, h, rows)[:, :, :t] for a in sums)


def check_given(q, k, where: Where, bias, sink, dropout, given=None) -> None:
    """Raises ValueError for arrays that do not fit q and k; see `attend`."""
    check_logits(q, k, where, bias=bias, sink=sink, dropout=dropout, given=given)


def _plan(
    q, k, spec: LogitSpec, where: Where, dropout: Dropout | None, tile,
    distances: Distances | None = None, group: int | None = None,
) -> tuple[Plan, np.ndarray]:
    """What is known before the call runs, and what the mask leaves of each tile."""
    t, s = q.shape[1], k.shape[1]
    # where positions are arrays, only the data says which tiles are hidden
    offset = s - t + where.shift if where.counted else None
    bq, bk = tile or tile_for(t, s, group)
    mask = None if spec.mask == Full() else spec.mask
    scale = q.shape[3] ** -0.5 if spec.scale is None else spec.scale
    rate = 0.0 if dropout is None else dropout.rate
    form = TileSpec(mask, scale, spec.softcap, spec.score, rate)

    def planned(rows: int, columns: int) -> tuple[Plan, np.ndarray]:
        tiling = Tiling(t, s, rows, columns, offset)
        table = block_mask(spec.mask, tiling)
        # tiles to visit, row by row
        pairs = tuple((i, j) for i, j in np.argwhere(table != SKIP).tolist())
        zero = 0 if distances is None else distances.zero
        return Plan(form, tiling, pairs, zero=zero, group=group), table

    plan, table = planned(bq, bk)
    unit = group or 1
    if tile is None and s >= KEYS and bk > unit:
        half = -(-bk // unit // 2) * unit
        narrow, its_table = planned(bq, half)
        if len(narrow.pairs) < FEWER * len(plan.pairs):  # a window fills narrow tiles
            return narrow, its_table
        # backward dk and dv of few keys are added up over many queries, and forward
        # their exponentials too are no slower than those of as many pairs
        tall, its_table = planned(2 * bq, half)
        if tall.padded[0] == plan.padded[0]:
            return tall, its_table
    return plan, table


def _constants(plan: Plan, where: Where, dropout: Dropout | None, sizes) -> Constants:
    """The arrays without gradient, filled up to whole chunks."""
    b, h, heads = sizes
    (t, s), (rows, columns) = (plan.tiling.t, plan.tiling.s), plan.padded
    segments = where.q_segment, where.kv_segment
    if where.counted and (rows, columns) != (t, s) and where.q_segment is None:
        # the tail of the last chunk is nobody's key
        segments = jnp.ones((1, t), jnp.int32), jnp.ones((1, s), jnp.int32)
    head = jnp.arange(h, dtype=jnp.int32) if where.head is None else where.head
    keep = seed = batch = None
    if dropout is not None:
        keep = _pad(_pad(_grouped(dropout.keep, heads), 3, rows), 4, columns)
        if dropout.hashed:
            seed, batch = dropout.words, dropout.batch
            batch = jnp.arange(b, dtype=jnp.int32) if batch is None else batch
    return Constants(
        # keys that are filled in have no position
        q_pos=_pad(where.q_pos, 1, rows), kv_pos=_pad(where.kv_pos, 1, columns, -1),
        q_segment=_pad(segments[0], 1, rows), kv_segment=_pad(segments[1], 1, columns),
        head=head.reshape(heads, h // heads), keep=keep, seed=seed, batch=batch,
    )


def _busy(plan: Plan, table: np.ndarray, where: Where) -> jax.Array | None:
    """Which of the plan's tiles hold a visible pair, if that depends on the data."""
    if len(plan.pairs) <= 1 or (where.counted and where.q_segment is None):
        return None
    seen = traced_block_mask(
        plan.form.mask, plan.tiling, table, where.q_pos, where.kv_pos, where.q_segment,
        where.kv_segment,
    )
    # the batch takes its tiles together: one is left out if no row needs it
    i, j = np.asarray(plan.pairs, np.int32).T
    return (seen[:, i, j] != SKIP).any(0)


def tile_for(t: int, s: int, group: int | None = None) -> tuple[int, int]:
    """Chunks (queries, keys) of the XLA path: its logits fit in a core's cache. Keys
    are whole groups, if they are in groups."""
    if group is None:
        return min(t, 256), min(s, KEYS)
    groups = -(-s // group)
    chunks = -(-groups // max(KEYS // group, 1))
    return min(t, 256), -(-groups // chunks) * group


def _pad(a, axis: int, size: int, value=0):
    """`a` filled up with `value` to `size` along `axis`; None stays None."""
    if a is None or a.shape[axis] == size:
        return a
    widths = [(0, size - a.shape[axis] if n == axis else 0) for n in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value)


def _grouped(a, heads: int):
    """[B|1,H|1,T,S] -> [B|1,K|1,G|1,T,S]."""
    if a is None:
        return None
    b, h, t, s = a.shape
    return a.reshape(b, 1, 1, t, s) if h == 1 else a.reshape(b, heads, -1, t, s)
