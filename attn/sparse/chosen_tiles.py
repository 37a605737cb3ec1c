"""Chosen blocks, a few rows at a time: the XLA form of `attn/sparse/chosen_blocks.py`.

A row of `chosen` is one small attention: its queries, and the J = n block keys that
were chosen for it. Rows are visited one after the other, so that the keys of a row and
its logits stay in a core's cache and are never written out, and the backward pass makes
each row again from q, k, m and l:

    p = exp(s - m) / l;  ds = p (do.v - delta),  delta = sum(do * o) - d(lse)

A row's gradients of keys are summed into k and v at the end, once: inside of the loop
each row would cost as much as all keys.

Source: Dao et al., 2022, arXiv:2205.14135, for the online form and its backward pass.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.varying import varying
from attn.exact.online import EMPTY, exp_below
from pallas_kernels.logits import LogitSpec, Where
from pallas_kernels.tile import NEVER, base_and_factor, lse_of

LOGITS = 2**19  # of the rows that are visited at once, over batch and heads


class Plan(NamedTuple):
    """What is known before the call runs. at_once: rows of one visit; counted: keys
    stand at their own numbers."""

    spec: LogitSpec
    scale: float
    block: int
    at_once: int
    counted: bool
    keys: int


class Rows(NamedTuple):
    """What is known of each row, without gradient: chosen [N,B,C,n] of C heads that
    choose, bias [N,B,C,n] or None, q_pos and q_segment [N,B|1,I]."""

    chosen: Any
    bias: Any
    q_pos: Any
    q_segment: Any


class Side(NamedTuple):
    """What all rows share, without gradient: kv_pos, kv_segment [B|1,M,block]; None
    where they go without saying; head [C,G]."""

    kv_pos: Any
    kv_segment: Any
    head: Any


def attend(
    q, k, v, chosen, spec: LogitSpec, where: Where, block: int, bias=None
) -> tuple[jax.Array, jax.Array]:
    """o [B,T,H,V] and lse [B,H,T]; arguments as `chosen_blocks.attend` has them."""
    (b, t, h, d), s = q.shape, k.shape[1]
    c, n = chosen.shape[1:3]  # heads that choose, rows
    queries = by_rows(q, n)  # [N,B,I,H,D]
    size = queries.shape[2]
    # [N,B,I,H,D] -> [N,B,C,G,I,D], of the G heads that share a choice
    queries = queries.reshape(n, b, size, c, h // c, d).transpose(0, 1, 3, 4, 2, 5)
    keys, vals = (by_blocks(a, block) for a in (k, v))  # [B,K,M,block,.]
    logits = h * size * chosen.shape[3] * block
    plan = Plan(
        spec, d**-0.5 if spec.scale is None else spec.scale, block,
        max(1, min(n, LOGITS // logits)), where.kv_pos is None, s,
    )
    first = lambda a: jnp.moveaxis(a, 2, 0)  # [B,C,N,n] -> [N,B,C,n]
    q_pos = where.q_pos
    q_pos = jnp.arange(t, dtype=jnp.int32)[None] if q_pos is None else q_pos
    rows = Rows(
        first(chosen.astype(jnp.int32)), None if bias is None else first(bias),
        by_rows(q_pos, n), _maybe(by_rows, where.q_segment, n),
    )
    head = jnp.arange(h, dtype=jnp.int32) if where.head is None else where.head
    side = Side(
        _maybe(_cut, where.kv_pos, block), _maybe(_cut, where.kv_segment, block),
        head.reshape(c, h // c),
    )
    rows, side, arrays = varying((rows, side, (queries, keys, vals)))
    o, m, l = chosen_tiles(plan, rows, side, *arrays)
    # [N,B,C,G,I,V] -> [B,N,I,C,G,V] -> [B,T,H,V]
    o = o.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * size, h, v.shape[3])[:, :t]
    lse = lse_of(jax.lax.stop_gradient(m), l)  # [N,B,C,G,I]
    lse = lse.transpose(1, 2, 3, 0, 4).reshape(b, h, n * size)[..., :t]
    return o.astype(v.dtype), lse


def by_rows(a: jax.Array, n: int) -> jax.Array:
    """[B,T,...] -> [n,B,T/n,...], filled up behind."""
    b, t = a.shape[:2]
    size = -(-t // n)
    a = jnp.pad(a, [(0, 0), (0, n * size - t)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(b, n, size, *a.shape[2:]), 1, 0)


def by_blocks(a: jax.Array, block: int) -> jax.Array:
    """[B,S,K,X] -> [B,K,M,block,X] of M blocks, filled up behind."""
    b, s, heads, width = a.shape
    m = -(-s // block)
    a = jnp.pad(a, ((0, 0), (0, m * block - s), (0, 0), (0, 0)))
    return a.reshape(b, m, block, heads, width).transpose(0, 3, 1, 2, 4)


def taken(blocks: jax.Array, chosen: jax.Array) -> jax.Array:
    """blocks [B,K,M,block,X] that chosen [B,C,n] names -> [B,C,n*block,X]; -1 names
    some block. Head c reads key head c // (C/K)."""
    b, heads, _, block, width = blocks.shape
    c, n = chosen.shape[1:]
    at = jnp.maximum(chosen, 0).reshape(b, heads, c // heads * n)
    # one index a block: an index for each element would be larger than the blocks
    take = functools.partial(jnp.take, axis=0, mode="clip")
    return jax.vmap(jax.vmap(take))(blocks, at).reshape(b, c, n * block, width)


def _maybe(f, a, *args):
    return None if a is None else f(a, *args)


def _cut(a: jax.Array, block: int) -> jax.Array:
    """Positions or segments [B|1,S] -> [B|1,M,block]; -1 behind the last."""
    b, s = a.shape
    return jnp.pad(
        a, ((0, 0), (0, -s % block)), constant_values=-1).reshape(b, -1, block)


def _seen(plan: Plan, row: Rows, side: Side) -> jax.Array:
    """Which of a row's keys its queries see: [B,C,G,I,J]."""
    b, c, n = row.chosen.shape

    def of_keys(a):  # [B|1,M,block] -> [B,C,1,1,J]
        a = jnp.broadcast_to(a, (b, *a.shape[1:]))
        take = functools.partial(jnp.take, axis=0, mode="clip")
        found = jax.vmap(take)(a, jnp.maximum(row.chosen, 0))  # [B,C,n,block]
        return found.reshape(b, c, 1, 1, -1)

    inside = jnp.arange(plan.block, dtype=jnp.int32).reshape(1, 1, 1, -1)
    own = row.chosen[..., None] * plan.block + inside
    own = own.reshape(b, c, 1, 1, n * plan.block)  # the numbers of keys
    pos = own if plan.counted else of_keys(side.kv_pos)
    there = jnp.repeat(row.chosen >= 0, plan.block, -1)[:, :, None, None]
    there = there & (own < plan.keys) & (pos >= 0)
    at = row.q_pos[:, None, None, :, None]  # [B|1,1,1,I,1]
    seen = plan.spec.mask(side.head[None, :, :, None, None], at, pos) & there
    if row.q_segment is None:
        return seen
    segment = of_keys(side.kv_segment)
    return seen & (row.q_segment[:, None, None, :, None] == segment) & (segment > 0)


def _logits(plan: Plan, row: Rows, side: Side, q, k) -> jax.Array:
    """[B,C,G,I,J], -inf where a key is hidden."""
    # [B,C,G,I,D] x [B,C,J,D] -> [B,C,G,I,J]
    s = jnp.einsum("bcgid,bcjd->bcgij", q, k, preferred_element_type=jnp.float32)
    s = s * plan.scale
    if row.bias is not None:
        s = s + jnp.repeat(row.bias, plan.block, -1)[:, :, None, None]
    return jnp.where(_seen(plan, row, side), s, NEVER)


def _over_rows(plan: Plan, body, rows):
    """`body` of each row, a few at a time, stacked."""
    return jax.lax.map(body, rows, batch_size=plan.at_once)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chosen_tiles(plan: Plan, rows: Rows, side: Side, q, k, v):
    """q [N,B,C,G,I,D], k and v [B,K,M,block,.] -> o [N,B,C,G,I,V] float32 and m, l
    [N,B,C,G,I]."""
    return _forward(plan, rows, side, q, k, v)[0]


def _forward(plan: Plan, rows: Rows, side: Side, q, k, v):
    def one(args):
        row, q_i = args
        keys, vals = (taken(a, row.chosen) for a in (k, v))
        s = _logits(plan, row, side, q_i, keys)
        # finite where nothing is seen: exp(-inf - m) is 0 then
        m = s.max(-1, initial=EMPTY)
        p = exp_below(s, m[..., None])
        l = p.sum(-1)
        # [B,C,G,I,J] x [B,C,J,V] -> [B,C,G,I,V]
        acc = jnp.einsum("bcgij,bcjv->bcgiv", p.astype(v.dtype), vals,
                         preferred_element_type=jnp.float32)
        return acc / jnp.where(l > 0, l, 1)[..., None], m, l

    o, m, l = _over_rows(plan, one, (rows, q))
    return (o, m, l), (rows, side, q, k, v, o, m, l)


def _backward(plan: Plan, saved, cotangents):
    rows, side, q, k, v, o, m, l = saved
    do, _, dl = cotangents
    # d(log l) = l d(l) enters exactly where delta leaves
    delta = (do * o).sum(-1) - l * dl
    base, factor = base_and_factor(m, l)
    delta, do = delta * factor, (do * factor[..., None]).astype(v.dtype)

    def one(args):
        row, q_i, do_i, delta_i, base_i = args
        keys, vals = (taken(a, row.chosen) for a in (k, v))
        s = _logits(plan, row, side, q_i, keys)
        # no logit is above base, but by how it was rounded
        p = exp_below(s, base_i[..., None])
        dp = jnp.einsum("bcgiv,bcjv->bcgij", do_i, vals,
                        preferred_element_type=jnp.float32)
        ds = (p * (dp - delta_i[..., None]) * plan.scale).astype(q.dtype)
        low = p.astype(v.dtype)
        # [B,C,G,I,J] x [B,C,J,D] -> [B,C,G,I,D]; the others [B,C,J,.], summed over G
        dq = jnp.einsum("bcgij,bcjd->bcgid", ds, keys,
                        preferred_element_type=jnp.float32)
        dk = jnp.einsum("bcgij,bcgid->bcjd", ds, q_i,
                        preferred_element_type=jnp.float32)
        dv = jnp.einsum("bcgij,bcgiv->bcjv", low, do_i,
                        preferred_element_type=jnp.float32)
        return dq, dk, dv

    dq, dk, dv = _over_rows(plan, one, (rows, q, do, delta, base))
    dk, dv = (_summed(d, rows.chosen, a) for d, a in ((dk, k), (dv, v)))
    return None, None, dq.astype(q.dtype), dk, dv


def _summed(d: jax.Array, chosen: jax.Array, like: jax.Array) -> jax.Array:
    """What all rows say of the blocks that they chose: d [N,B,C,J,X], chosen
    [N,B,C,n] -> [B,K,M,block,X] as `like`."""
    b, heads, m, block, width = like.shape
    n, _, c, each = chosen.shape
    # [N,B,C,n] -> [B,K,N C/K n]; -1 is outside, and dropped
    own = c // heads * each  # of a row and a key head
    at = jnp.where(chosen < 0, m, chosen).reshape(n, b, heads, own)
    at = at.transpose(1, 2, 0, 3).reshape(b, heads, n * own)
    d = d.reshape(n, b, heads, own, block, width).transpose(1, 2, 0, 3, 4, 5)
    d = d.reshape(b, heads, n * own, block, width)

    def add(at, d):
        return jnp.zeros((m, block, width), jnp.float32).at[at].add(d, mode="drop")

    return jax.vmap(jax.vmap(add))(at, d).astype(like.dtype)


chosen_tiles.defvjp(_forward, _backward)
