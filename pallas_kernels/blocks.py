"""Attention to chosen key blocks, forward and backward, as a kernel.

Each block of queries attends to the key blocks that an index array names; what it names
is data, so nothing is known before the run. The forward pass and dq fetch the chosen
blocks of a query block; dk and dv come from the inverse lists, which query blocks chose
a key block, so that no sum depends on an order of arrival. Work and traffic grow with
the number of blocks chosen.

Sources: the index form of block-sparse attention in Dao et al., 2022, arXiv:2205.14135;
the online softmax is that of `pallas_kernels/flash.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, blocks_tpu, tables
from pallas_kernels.flash import DTYPES, WIDEST, check_elementwise, check_tpu
from pallas_kernels.tile import LOG2E, LOW, Form

LISTED = 2**17  # entries of the lists of one head that fit beside the scalar unit


class Static(NamedTuple):
    """What is known of one call: `heads` share what they chose, in query blocks of
    `size`; keys in blocks of `block`, `s` of them real."""

    form: Form
    block: int
    size: int
    s: int
    heads: int
    vmem: int
    interpret: Any


class Side(NamedTuple):
    """chosen [B,C,N,n] with C = H / heads; rows [B,C,N,3,R]: position, run and head of
    each query row; info [B,S/block,2,block]: position and run of keys, or None."""

    chosen: Any
    rows: Any
    info: Any


def blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chosen: jax.Array,
    *,
    mask: Any = None,
    block: int,
    head: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    kv_pos: jax.Array | None = None,
    q_run: jax.Array | None = None,
    kv_run: jax.Array | None = None,
    scale: float | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to chosen blocks -> o [B,T,H,V] in v's dtype, lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; chosen [B,H|K,N,n] int32: key blocks of
    `block` tokens for each of N blocks of ceil(T/N) queries, -1 for none; one that is
    named twice counts twice. The mask acts inside blocks, on positions 0, 1, ... or
    q_pos [B,T] and kv_pos [B,S] (-1: an empty slot); q_run and kv_run: a token sees its
    own run, and run 0 is padding. Raises Refused for what the kernel does not do.
    """
    b, t, h, d = q.shape
    s, n = k.shape[1], chosen.shape[2]
    _check(q, k, v, chosen, mask)
    check_tpu(q, interpret)
    size, heads = -(-t // n), h // chosen.shape[1]
    count = lambda m: jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32), (b, m))
    head = jnp.arange(h, dtype=jnp.int32) if head is None else head
    q_pos = count(t) if q_pos is None else q_pos
    rows = [_rows(jnp.broadcast_to(a[..., None], (b, t, h)), n, heads)
            for a in (q_pos, jnp.ones_like(q_pos) if q_run is None else q_run)]
    rows.append(_rows(jnp.broadcast_to(head, (b, t, h)), n, heads))
    info = None
    if kv_pos is not None or kv_run is not None:
        given = count(s) if kv_pos is None else kv_pos
        runs = jnp.ones_like(given) if kv_run is None else kv_run
        fill = lambda a, value: jnp.pad(a, ((0, 0), (0, -s % block)),
                                        constant_values=value).reshape(b, -1, block)
        info = jnp.stack([fill(given, -1), fill(runs, 0)], 2).astype(jnp.int32)
    static = Static(
        Form(mask, d**-0.5 if scale is None else scale), block, size, s, heads,
        tables.vmem(tables.device_kind()), interpret,
    )
    side = Side(chosen.astype(jnp.int32), jnp.stack(rows, 3).astype(jnp.int32), info)
    return _blocks(static, side, q, k, v)


def _check(q, k, v, chosen, mask) -> None:
    """Raises Refused for what the kernel does not do."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise Refused(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of "
                      "bfloat16, float16, float32 for all three")
    for name, n in (("D", q.shape[3]), ("V", v.shape[3])):
        if n > WIDEST:
            raise Refused(f"{name}={n}: at most {WIDEST}")
    entries = chosen[0].size // k.shape[2]
    if entries > LISTED:
        raise Refused(f"{entries} chosen blocks a key head: at most {LISTED}")
    check_elementwise("mask", mask)


def _rows(a, n: int, heads: int):
    """[B,T,H,...] -> [B,C,N,R,...]: the rows of each query block, R = heads * size."""
    b, t, h = a.shape[:3]
    size = -(-t // n)
    a = jnp.pad(a, [(0, 0), (0, n * size - t)] + [(0, 0)] * (a.ndim - 2))
    a = a.reshape(b, n, size, h // heads, heads, *a.shape[3:])
    order = (0, 3, 1, 4, 2, *range(5, a.ndim))
    return a.transpose(order).reshape(b, h // heads, n, heads * size, *a.shape[5:])


def _unrows(a, t: int, heads: int):
    """[B,C,N,R,...] -> [B,T,H,...]: the inverse of `_rows`."""
    b, c, n, r = a.shape[:4]
    a = a.reshape(b, c, n, heads, r // heads, *a.shape[4:])
    order = (0, 2, 4, 1, 3, *range(5, a.ndim))
    return a.transpose(order).reshape(b, -1, c * heads, *a.shape[5:])[:, :t]


def _keys(a, block: int):
    """k or v [B,S,K,X] -> [B,K,S/block,block,X]."""
    b, s, heads, width = a.shape
    a = jnp.pad(a, ((0, 0), (0, -s % block), (0, 0), (0, 0)))
    return a.transpose(0, 2, 1, 3).reshape(b, heads, -1, block, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(static: Static, side: Side, q, k, v):
    return _ahead(static, side, q, k, v)[0]


def _ahead(static: Static, side: Side, q, k, v):
    t, n = q.shape[1], side.chosen.shape[2]
    o, lse = blocks_tpu.forward(
        static, side, _rows(q, n, static.heads), _keys(k, static.block),
        _keys(v, static.block),
    )
    o, lse = (_unrows(a, t, static.heads) for a in (o, lse))
    lse = lse.transpose(0, 2, 1)
    return (o, lse), (side, q, k, v, o, lse)


def _back(static: Static, saved, cotangents):
    side, q, k, v, o, lse = saved
    do, dlse = cotangents
    (b, t, h), n = q.shape[:3], side.chosen.shape[2]
    # d(lse) enters exactly where delta leaves
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1)
    delta = delta - dlse.transpose(0, 2, 1)
    # rows that see nothing, or only fill a block, get weights 2^(s - 1e30) = 0
    base = jnp.where(jnp.isfinite(lse), lse * LOG2E, -LOW).transpose(0, 2, 1)
    base = _rows(jnp.where(jnp.isfinite(base), base, -LOW), n, static.heads)
    real = _rows(jnp.ones((b, t, h), bool), n, static.heads)
    parts = jnp.stack(
        [jnp.where(real, base, -LOW), _rows(delta, n, static.heads)], 3
    )
    args = (_rows(q, n, static.heads), _keys(k, static.block), _keys(v, static.block),
            parts, _rows(do.astype(v.dtype), n, static.heads))
    dq = _unrows(blocks_tpu.queries_backward(static, side, *args), t, static.heads)
    lists = inverse(side.chosen, k.shape[2], -(-static.s // static.block))
    grads = blocks_tpu.keys_backward(static, side, lists, *args)
    back = lambda a: a.reshape(b, k.shape[2], -1, a.shape[-1])[:, :, :static.s]
    dk, dv = (back(a).transpose(0, 2, 1, 3) for a in grads)
    return None, dq, dk, dv


def inverse(chosen: jax.Array, heads: int, many: int):
    """Which query blocks chose each key block: entries [B,K,E] and first [B,K,many+1].

    chosen [B,C,N,n] -> an entry is the number c * N + n of a query block among those of
    a key head's C/K; key block j has the entries first[j] to first[j + 1], in order.
    """
    b, c, n, each = chosen.shape
    flat = chosen.reshape(b, heads, -1)
    where = jnp.where((flat >= 0) & (flat < many), flat, many)
    order = jnp.argsort(where, axis=-1, stable=True)
    ordered = jnp.take_along_axis(where, order, -1)
    edges = jnp.arange(many + 1, dtype=jnp.int32)
    first = jax.vmap(jax.vmap(lambda a: jnp.searchsorted(a, edges)))(ordered)
    return (order // each).astype(jnp.int32), first.astype(jnp.int32)


_blocks.defvjp(_ahead, _back)
