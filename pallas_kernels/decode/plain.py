"""Decoding in plain jnp: what a call holds, and the function that the gradient is
taken of."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tile import NEVER, TileSpec

F32 = jnp.float32


class Static(NamedTuple):
    """What is known of one call: H and K heads, T queries, S slots a row of the batch;
    keys lie in pages of `page` slots, `pages` of them a step; bits of k and v. On a
    GPU: a tile, `splits` asked for or 0, how many multiprocessors there are, and
    candidates that the call asks for."""

    form: TileSpec
    heads: int
    key_heads: int
    queries: int
    slots: int
    page: int
    pages: int
    bits: int
    sink: bool
    vmem: int
    interpret: Any
    backend: str = "tpu"
    tile: Any = None
    splits: int = 0
    cores: int = 0
    variant: tuple[str, ...] = ()


class Keys(NamedTuple):
    """What lies beside each slot: [B,S,K] arrays, or [P,page,K] by pages; or None. The
    last axis may be 1: on TPU it is K."""

    pos: Any = None
    segment: Any = None
    bias: Any = None
    k_scale: Any = None
    v_scale: Any = None


class Rows(NamedTuple):
    """Of each query row [B,R]: head (-1: none), position, segment and sink."""

    head: Any
    pos: Any
    segment: Any
    sink: Any


def unpacked(a: jax.Array, bits: int) -> jax.Array:
    """int8 numbers, or pairs of int4, as float32: [..., width]."""
    if bits != 4:
        return a.astype(F32)
    wide = a.astype(jnp.int32)
    # both halves with their signs: an int8 shift would lose the low one's
    return jnp.concatenate([(wide << 28) >> 28, wide >> 4], -1).astype(F32)


def packed(a: jax.Array) -> jax.Array:
    """int4 numbers [..., width] (-8 to 7, any integer type), two a byte: the first half
    of the width in the low half of the bytes."""
    low, high = jnp.split(a.astype(jnp.int32), 2, -1)
    return ((high << 4) | (low & 15)).astype(jnp.int8)


def _gathered(a, table):
    """[P,page,...] -> [B,n*page,...] of each row's pages; a itself without a table."""
    if a is None or table is None:
        return a
    a = a[jnp.maximum(table, 0)]
    return a.reshape(a.shape[0], -1, *a.shape[3:])


def _held(static: Static, lengths, table, beside):
    """Which slots of each key head hold a token [B,S,K|1]."""
    slot = jnp.arange(static.slots, dtype=jnp.int32)[None, :, None]
    held = slot < lengths[:, None]
    if beside.pos is not None:
        held = held & (beside.pos >= 0)
    if beside.segment is not None:
        held = held & (beside.segment > 0)
    if table is not None:
        real = jnp.repeat(table >= 0, static.slots // table.shape[1], 1)  # [B,S]
        held = held & real[..., None]
    return held


def _logits(static: Static, rows, beside, held, q, k):
    """Logits [B,K,G,T,S] in float32, NEVER where hidden."""
    form, heads = static.form, static.key_heads
    (b, t, h, _), s = q.shape, k.shape[1]

    def grouped(a):
        return a.reshape(b, t, heads, -1).transpose(0, 2, 3, 1)[..., None]

    def column(a):
        return a.transpose(0, 2, 1)[:, :, None, None]  # [B,K,1,1,S]

    queries = q.reshape(b, t, heads, h // heads, -1).astype(F32)  # [B,T,K,G,D]
    raw = jnp.einsum("btkgd,bskd->bkgts", queries, k)  # [B,K,G,T,S]
    slot = jnp.arange(s, dtype=jnp.int32)[None, None, None, None]
    j = slot if beside.pos is None else column(beside.pos)
    h_, i = grouped(rows.head), grouped(rows.pos)
    bias = None if beside.bias is None else column(beside.bias)
    logit, _ = form.logits(raw, h_, i, j, bias, 1.0)
    seen = column(held)
    if form.mask is not None:
        seen = seen & form.mask(h_, i, j)
    if beside.segment is not None:
        seen = seen & (grouped(rows.segment) == column(beside.segment))
    return jnp.where(seen, logit, NEVER)


def plain(static: Static, lengths, table, rows, beside, q, k, v):
    """The function in plain jnp, o, m and l: what the gradient is taken of."""
    k, v, *beside = (_gathered(a, table) for a in (k, v, *beside))
    beside = Keys(*beside)
    held = _held(static, lengths, table, beside)

    def kept(a):
        """What stands where no token is may be nan, of which 0 times is nan too."""
        return jnp.where(held[..., None], a.astype(F32), 0)

    if static.bits < 16:
        k = unpacked(k, static.bits) * beside.k_scale[..., None]
        v = unpacked(v, static.bits) * beside.v_scale[..., None]
    k, v = kept(k), kept(v)
    s = _logits(static, rows, beside, held, q, k)
    b, t, h = q.shape[:3]
    sink = rows.sink.reshape(b, t, static.key_heads, -1).transpose(0, 2, 3, 1)
    if static.sink:
        s = jnp.concatenate([s, sink[..., None]], -1)  # a logit without value
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True))  # a constant for the gradient
    p = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))  # no -inf - -inf
    total = p.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    m, l = (a[..., 0].reshape(b, h, t) for a in (top, total))
    p = (p / safe)[..., :-1] if static.sink else p / safe  # without the sink
    o = jnp.einsum("bkgts,bskv->btkgv", p, v)  # [B,T,K,G,V]
    return o.reshape(b, t, h, -1).astype(q.dtype), m, l
