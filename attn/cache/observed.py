"""Observed: how much attention each key receives, which many policies go by.

A decoding kernel gives the sums of weights beside its output; XLA has the few rows of
weights as a matrix anyway. Of a prompt the sums of all its rows are taken tile by tile,
so that the T x S matrix never exists.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attn.cache.kv import Cache, current, of_one_type
from attn.contract.dispatch import interpreted, pick
from attn.contract.segments import TokenPositions
from attn.contract.varying import varying
from attn.exact import dense
from pallas_kernels.decode.api import decode
from pallas_kernels.logits import LogitSpec, Where

TILE = 64  # queries whose rows of weights exist at once
PARTS = 8  # of a long prompt: each looks at what stands before its end


def row_weights(
    q, cache: Cache, kv_segment, now: TokenPositions, spec: LogitSpec, sink=None
) -> jax.Array:
    """The weights [B,H,T,C] float32 of queries q [B,T,H,D] at `now`, of slots with
    segment indices kv_segment [B,C]; rows that see nothing are 0."""
    where = Where(now.pos, cache.pos, now.segment, kv_segment)
    here = dense.everywhere(where, q, cache.k)
    s = dense.formed(dense.logits(q, cache.k, spec.scale), spec, here)  # [B,H,T,C]
    return dense.weights(s, dense.allowed(spec.mask, here), sink)


def by_group(p: jax.Array, heads: int) -> jax.Array:
    """Weights [B,H,T,C] as [B,C,K,G]: added up over queries, by the K groups of H."""
    b, h, _, c = p.shape
    # [B,H,T,C] -> [B,K,G,C]
    p = p.sum(2).reshape(b, heads, h // heads, c)
    return jnp.moveaxis(p, 3, 1)


def read(
    cache: Cache, kv_segment, q, now: TokenPositions, spec: LogitSpec, *,
    sink: Any = None, implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What a few queries find, as `attn.cache.reading.read`: o [B,T,H,V], and what each
    slot receives of them [B,C,K] float32, added up over queries and the heads of a
    group."""
    heads = cache.k.shape[2]

    def kernel(backend):
        where = Where(now.pos, cache.pos, now.segment, kv_segment)
        o, _, got = decode(
            q, cache.k, cache.v, spec, where, sink=sink, statistics=True,
            backend=backend, interpret=interpreted())
        return o, got

    def xla():
        p = row_weights(q, cache, kv_segment, now, spec, sink)
        # [B,T,H,V], and [B,C,K,G] -> [B,C,K]
        return dense.values(p, cache.v), by_group(p, heads).sum(3)

    tpu, gpu = (functools.partial(kernel, name) for name in ("tpu", "triton"))
    return pick(implementation, xla=xla, tpu=tpu, gpu=gpu)


def received(
    cache: Cache, kv_segment, q, now: TokenPositions, spec: LogitSpec, sink: Any = None
) -> jax.Array:
    """What each slot receives of all queries of a piece q [B,T,H,D]: [B,C,K] float32,
    the columns of the attention map, added up over the heads of a group. The last T
    slots hold the piece itself, in order: of a long one, rows of its earlier parts do
    not look at its later ones."""
    cache, q = of_one_type(cache, q)
    t, slots = q.shape[1], cache.k.shape[1]
    parts = PARTS if spec.mask.causal and t <= slots and t >= PARTS * TILE else 1
    size = -(-t // parts // TILE) * TILE if parts > 1 else t
    total = jnp.zeros((*cache.k.shape[:2], cache.k.shape[2]), jnp.float32)
    for at in range(0, t, size):
        # the last T slots are the piece: behind `end` these rows see nothing
        rows, end = slice(at, min(at + size, t)), slots - t + min(at + size, t)
        early = cache._replace(**{name: getattr(cache, name)[:, :end] for name in (
            "k", "v", "pos")})
        here = now._replace(pos=now.pos[:, rows], segment=now.segment[:, rows])
        got = _received(early, kv_segment[:, :end], q[:, rows], here, spec, sink)
        total = total.at[:, :end].add(got)
    return total


def _received(cache: Cache, kv_segment, q, now, spec: LogitSpec, sink) -> jax.Array:
    """`received`, of rows that look at all slots, tile by tile."""
    b, t, _, _ = q.shape
    heads, n = cache.k.shape[2], -(-t // TILE)
    more = n * TILE - t if n > 1 else 0
    size = TILE if n > 1 else t

    def tiles(a):  # [B,T,...] -> [N,B,tile,...]; rows of padding have segment 0
        a = jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, n, size, *a.shape[2:]), 1, 0)

    def add(total, tile):
        q, pos, segment = tile
        here = now._replace(pos=pos, segment=segment)
        p = row_weights(q, cache, kv_segment, here, spec, sink)
        return total + by_group(p, heads).sum(3), None

    start = jnp.zeros((b, cache.k.shape[1], heads), jnp.float32)
    given = tuple(map(tiles, (q, now.pos, now.segment)))
    return jax.lax.scan(add, *varying((start, given)))[0]


def last_queries(q, now: TokenPositions, many: int = 1) -> tuple:
    """The last `many` real queries of the sequence that goes on: q [B,many,H,D] and
    where they stand, with segment 0 for what is not there."""
    mine = current(now)
    index = jnp.where(mine, jnp.arange(q.shape[1]), -1)
    last, _ = jax.lax.top_k(index, min(many, q.shape[1]))  # the latest first
    last = last[:, ::-1]  # in order
    at = jnp.maximum(last, 0)
    pos, segment = (jnp.take_along_axis(a, at, 1) for a in (now.pos, now.segment))
    there = now._replace(pos=pos, segment=jnp.where(last >= 0, segment, 0))
    return jnp.take_along_axis(q, at[..., None, None], 1), there
