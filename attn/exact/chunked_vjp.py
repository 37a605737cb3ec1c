"""The passes over tiles of exact attention, forward and backward: XLA's form.

While key tiles pass by, a row of queries keeps its running maximum, sum and weighted
value; the backward pass makes each tile again from q, k and lse.
`attn/exact/chunked.py` has the equations, and lays out what comes here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.schedule import Tiling
from pallas_kernels.tile import NEVER, LogitSpec, dropout_keep


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one call before it runs: the tiles and the form of a logit."""

    form: LogitSpec
    tiling: Tiling
    pairs: tuple[tuple[int, int], ...]

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return self.tiling.rows, self.tiling.columns


class Side(NamedTuple):
    """Arrays of one call that have no gradient; None for what it does not use.

    q_pos [B,T], kv_pos [B,S,K|1], q_run [B,T], kv_run [B,S], head [K,G], keep
    [B,K,G,T,S] bool, seed [2] uint32 and batch [B] number the rows for dropout; busy
    [pairs] bool: which tiles hold a visible pair, where that depends on the data.
    """

    q_pos: Any = None
    kv_pos: Any = None
    q_run: Any = None
    kv_run: Any = None
    head: Any = None
    keep: Any = None
    seed: Any = None
    batch: Any = None
    busy: Any = None


def _cut(a, axis: int, n, size: int):
    """Tile `n` of `a` along `axis`; an axis of 1 and None stay whole."""
    if a is None or a.shape[axis] == 1 or a.shape[axis] == size:
        return a
    return jax.lax.dynamic_slice_in_dim(a, n * size, size, axis)


def _put(a, part, axis: int, n, size: int):
    if a.shape[axis] == part.shape[axis]:
        return part
    return jax.lax.dynamic_update_slice_in_dim(a, part, n * size, axis)


def _seen(plan: Plan, side: Side, i, j):
    """The mask and its positions on tile (i, j): (bool or None, h, q_pos, kv_pos)."""
    bq, bk = plan.tile
    offset = plan.tiling.offset
    if offset is None:
        q_pos = _cut(side.q_pos, 1, i, bq)[:, None, None, :, None]
        kv_pos = jnp.moveaxis(_cut(side.kv_pos, 1, j, bk), 2, 1)[:, :, None, None, :]
    else:
        q_pos = (i * bq + offset + jnp.arange(bq))[None, None, None, :, None]
        kv_pos = (j * bk + jnp.arange(bk))[None, None, None, None, :]
    h = side.head[None, :, :, None, None]
    seen = None if plan.form.mask is None else plan.form.mask(h, q_pos, kv_pos)
    tests = [] if seen is None else [seen]
    if offset is None:
        tests.append(kv_pos >= 0)
    if side.q_run is not None:
        q_run = _cut(side.q_run, 1, i, bq)[:, None, None, :, None]
        kv_run = _cut(side.kv_run, 1, j, bk)[:, None, None, None, :]
        tests.append((q_run == kv_run) & (kv_run > 0))
    seen = functools.reduce(lambda a, b: a & b, tests) if tests else None
    return seen, h, q_pos, kv_pos


def _tile_logits(plan: Plan, side: Side, q, k, bias, i, j):
    """Logits of tile (i, j) [B,K,G,bq,bk], -inf where hidden; and d(capped)/d(raw)."""
    bq, bk = plan.tile
    raw = jnp.einsum("bkgid,bkjd->bkgij", q, k, preferred_element_type=jnp.float32)
    seen, h, q_pos, kv_pos = _seen(plan, side, i, j)
    bias = _cut(_cut(bias, 3, i, bq), 4, j, bk)
    s, slope = plan.form.logits(raw, h, q_pos, kv_pos, bias)
    return (s if seen is None else jnp.where(seen, s, NEVER)), slope


def _tile_keep(plan: Plan, side: Side, i, j):
    """What dropout multiplies the weights of tile (i, j) with; None for nothing."""
    bq, bk = plan.tile
    if side.keep is not None:
        chosen = _cut(_cut(side.keep, 3, i, bq), 4, j, bk)
    elif side.seed is not None:
        at = lambda n, size: n * size + jnp.arange(size)
        chosen = dropout_keep(
            plan.form.dropout, side.seed, side.batch[:, None, None, None, None],
            side.head[None, :, :, None, None], at(i, bq)[None, None, None, :, None],
            at(j, bk)[None, None, None, None, :],
        )
    else:
        return None
    return chosen.astype(jnp.float32) / (1 - plan.form.dropout)


def _over_tiles(plan: Plan, side: Side, body: Callable, carry):
    """Runs `body(carry, i, j)` over the plan's tiles, one after the other."""
    if len(plan.pairs) == 1:
        return body(carry, *plan.pairs[0])
    pairs = jnp.asarray(plan.pairs, jnp.int32).reshape(-1, 2)

    def step(carry, at):
        pair, busy = at
        i, j = pair[0], pair[1]
        if busy is None:
            return body(carry, i, j), None
        visit = lambda c: body(c, i, j)
        return jax.lax.cond(busy, visit, lambda c: c, carry), None

    return jax.lax.scan(step, carry, (pairs, side.busy))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled(plan: Plan, side: Side, q, k, v, bias, sink):
    """q [B,K,G,T,D], k [B,K,S,D], v [B,K,S,V], all multiples of a tile; bias
    [B|1,K|1,G|1,T|1,S|1], sink [K,G] -> o [B,K,G,T,V] float32, lse [B,K,G,T]."""
    return _forward(plan, side, q, k, v, bias, sink)[0]


def _forward(plan, side, q, k, v, bias, sink):
    bq, bk = plan.tile
    rows = q.shape[:4]
    m = jnp.full(rows, NEVER, jnp.float32)
    total = jnp.zeros(rows, jnp.float32)
    if sink is not None:
        m, total = jnp.broadcast_to(sink[None, :, :, None], rows), jnp.ones_like(total)
    o = jnp.zeros((*rows, v.shape[-1]), jnp.float32)

    def body(carry, i, j):
        o, m, total = carry
        q_i, k_j, v_j = _cut(q, 3, i, bq), _cut(k, 2, j, bk), _cut(v, 2, j, bk)
        s, _ = _tile_logits(plan, side, q_i, k_j, bias, i, j)
        old = _cut(m, 3, i, bq)
        new = jnp.maximum(old, s.max(-1))
        base = jnp.where(jnp.isfinite(new), new, 0)
        p = jnp.exp(s - base[..., None])
        fade = jnp.exp(old - base)
        now = _cut(total, 3, i, bq) * fade + p.sum(-1)
        drop = _tile_keep(plan, side, i, j)
        p = (p if drop is None else p * drop).astype(v.dtype)
        part = jnp.einsum("bkgij,bkjv->bkgiv", p, v_j,
                          preferred_element_type=jnp.float32)
        acc = _cut(o, 3, i, bq) * fade[..., None] + part
        return (_put(o, acc, 3, i, bq), _put(m, new, 3, i, bq),
                _put(total, now, 3, i, bq))

    o, m, total = _over_tiles(plan, side, body, (o, m, total))
    some = total > 0
    safe = jnp.where(some, total, 1)
    o = o / safe[..., None]
    lse = jnp.where(some, m + jnp.log(safe), NEVER)
    return (o, lse), (side, q, k, v, bias, sink, o, lse)


def _backward(plan, saved, cotangents):
    side, q, k, v, bias, sink, o, lse = saved
    do, dlse = cotangents
    bq, bk = plan.tile
    # d(lse) enters exactly where delta leaves
    delta = (0 if o is None else (do * o).sum(-1)) - dlse
    base = jnp.where(jnp.isfinite(lse), lse, 0)
    do_low = do.astype(v.dtype)
    zeros = lambda a: None if a is None else jnp.zeros(a.shape, jnp.float32)

    def body(carry, i, j):
        dq, dk, dv, dbias = carry
        q_i, k_j, v_j = _cut(q, 3, i, bq), _cut(k, 2, j, bk), _cut(v, 2, j, bk)
        s, slope = _tile_logits(plan, side, q_i, k_j, bias, i, j)
        p = jnp.exp(s - _cut(base, 3, i, bq)[..., None])
        do_i = _cut(do_low, 3, i, bq)
        dp = jnp.einsum("bkgiv,bkjv->bkgij", do_i, v_j,
                        preferred_element_type=jnp.float32)
        drop = _tile_keep(plan, side, i, j)
        dropped = p if drop is None else p * drop
        dp = dp if drop is None else dp * drop
        ds = p * (dp - _cut(delta, 3, i, bq)[..., None])
        dv_j = jnp.einsum("bkgij,bkgiv->bkjv", dropped.astype(v.dtype), do_i,
                          preferred_element_type=jnp.float32)
        if dbias is not None:
            dbias = _add_bias(dbias, ds, plan.tile, i, j)
        ds = ((ds if slope is None else ds * slope) * plan.form.scale).astype(q.dtype)
        dq_i = jnp.einsum("bkgij,bkjd->bkgid", ds, k_j,
                          preferred_element_type=jnp.float32)
        dk_j = jnp.einsum("bkgij,bkgid->bkjd", ds, q_i,
                          preferred_element_type=jnp.float32)
        dq = _put(dq, _cut(dq, 3, i, bq) + dq_i, 3, i, bq)
        dk = _put(dk, _cut(dk, 2, j, bk) + dk_j, 2, j, bk)
        dv = _put(dv, _cut(dv, 2, j, bk) + dv_j, 2, j, bk)
        return dq, dk, dv, dbias

    start = zeros(q), zeros(k), zeros(v), zeros(bias)
    dq, dk, dv, dbias = _over_tiles(plan, side, body, start)
    dsink = None
    if sink is not None:
        share = jnp.exp(sink[None, :, :, None] - base)
        dsink = -(share * delta).sum((0, 3))
    low = lambda d, a: None if a is None else d.astype(a.dtype)
    return (None, low(dq, q), low(dk, k), low(dv, v), low(dbias, bias), dsink)


def _add_bias(dbias, ds, tile, i, j):
    """Adds ds of one tile to the bias gradient, summed where the bias broadcasts."""
    axes = tuple(n for n in range(5) if dbias.shape[n] == 1 and ds.shape[n] > 1)
    part = ds.sum(axes, keepdims=True)
    row = _cut(dbias, 3, i, tile[0])
    row = _put(row, _cut(row, 4, j, tile[1]) + part, 4, j, tile[1])
    return _put(dbias, row, 3, i, tile[0])


tiled.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def part(plan: Plan, side: Side, q, k, v, bias, sink, lse):
    """`tiled` of a part of the keys, with the lse of them all, which it gives back."""
    return jnp.zeros((*q.shape[:4], v.shape[-1]), jnp.float32), lse


def _backward_part(plan, saved, cotangents):
    return *_backward(plan, (*saved[:-1], None, saved[-1]), cotangents), None


part.defvjp(
    lambda plan, *arrays: (part(plan, *arrays), arrays), _backward_part
)
