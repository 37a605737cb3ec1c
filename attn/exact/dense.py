"""Dense softmax attention, for ideas that need the matrix: logits of all pairs, weights
of those that are seen, weighted values. `attend` is exact attention in these steps, in
plain jnp: slower, with memory T S, and with derivatives of every kind.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.dispatch import platform
from attn.contract.shapes import check
from attn.exact.chunked import check_given
from attn.exact.online import EMPTY, OnlineSoftmax, exp_below
from attn.masks import Full, Mask
from pallas_kernels.logits import Dropout, LogitSpec, Where
from pallas_kernels.tile import NEVER, dropout_keep, lse_of, sink_logit

FEW = 64  # rows of queries, T H, that are few


def few(rows: int, dtype: Any) -> bool:
    """Whether T H = `rows` queries are so few that all heads of a CPU share one product
    with the keys as they lie, [S,K D].

    XLA takes a product for each head, before which it copies all keys to [K,S,D], and
    that costs more than the product. With rows that are zero for the keys of other
    heads, one product reads the keys where they are: K times the flops, in the time
    that the bytes take anyway (`experiments.speed`, the pass "decode").
    Heads that a mesh splits outside of `shard_map` would be added up over devices, and
    XLA has no such product of all shapes for 16 bits.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and not mesh.are_all_axes_manual
    wide = jnp.dtype(dtype).itemsize >= 4
    return rows <= FEW and wide and platform() == "cpu" and not split


def logits(q: jax.Array, k: jax.Array, scale: float | None = None) -> jax.Array:
    """scale * q.k as float32 [B,H,T,S]; query head h reads key head h // (H/K)."""
    (b, t, h, d), (s, heads) = q.shape, k.shape[1:3]
    grouped = q.reshape(b, t, heads, -1, d)
    if few(t * h, q.dtype):
        turned = grouped.transpose(0, 4, 2, 3, 1)[:, None]  # [B,1,D,K,G,T]
        own = np.eye(heads, dtype=bool)[None, :, None, :, None, None]
        wide = jnp.where(own, turned, 0)  # [B,K,D,K,G,T]: 0 for keys of other heads
        # [B,S,K D] x [B,K D,H T] -> [B,S,H T]
        x = jnp.einsum(
            "bsf,bfr->bsr", k.reshape(b, s, heads * d),
            wide.reshape(b, heads * d, h * t), preferred_element_type=jnp.float32,
        ).swapaxes(1, 2)
    else:
        # [B,T,K,G,D] x [B,S,K,D] -> [B,K,G,T,S]
        x = jnp.einsum(
            "btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32
        )
    return (x * (d**-0.5 if scale is None else scale)).reshape(b, h, t, s)


def formed(s: jax.Array, spec: LogitSpec, where: Where) -> jax.Array:
    """Logits [B,H,T,S] with the softcap and the score of `spec`, at the positions of
    `where`, whose head [H] is given."""
    if spec.softcap is not None:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    return s if spec.score is None else s + spec.score(*_places(where))


def weights(
    s: jax.Array, seen: jax.Array | None = None, sink: jax.Array | None = None
) -> jax.Array:
    """Softmax of logits [...,S] over the keys that are `seen`; all zero if none is.
    sink [H], of logits [B,H,T,S]: a logit without value."""
    p, _, total = _sums(s, seen, sink)
    return p / jnp.where(total > 0, total, 1)


def _sums(s, seen, sink):
    """exp(s - m) [...,S] of what is seen, m and its sum [...,1], with the sink's."""
    s = s if seen is None else jnp.where(seen, s, NEVER)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True, initial=NEVER))
    own = None if sink is None else sink_logit(sink)[None, :, None, None]
    if own is not None:
        top = jax.lax.stop_gradient(jnp.maximum(top, own))
    # where no key is seen, the least float, and exp(-inf - m) = 0
    top = jnp.maximum(top, EMPTY)
    p = exp_below(s, top)
    total = p.sum(-1, keepdims=True)
    return p, top, total if own is None else total + exp_below(own, top)


def logsumexp(s: jax.Array, seen: jax.Array | None = None) -> jax.Array:
    """log sum_j exp(s_j) of logits [...,S] over the keys that are `seen`, [...];
    -inf if none is."""
    _, top, total = _sums(s, seen, None)
    return lse_of(top, total)[..., 0]


def values(p: jax.Array, v: jax.Array) -> jax.Array:
    """Weights p [B,H,T,S] times v [B,S,K,V] -> [B,T,H,V] in v's dtype."""
    (b, h, t, s), (heads, width) = p.shape, v.shape[2:]
    grouped = p.astype(v.dtype).reshape(b, heads, -1, t, s)  # [B,K,G,T,S]
    if few(t * h, v.dtype):
        # [B,H T,S] x [B,S,K V] -> [B,H T,K V]
        o = jnp.einsum(
            "brs,bsf->brf", grouped.reshape(b, h * t, s),
            v.reshape(b, s, heads * width), preferred_element_type=jnp.float32,
        ).reshape(b, heads, -1, t, heads, width)
        # of each head its own values: [B,G,T,V,K] -> [B,T,K,G,V]
        o = jnp.diagonal(o, axis1=1, axis2=4).transpose(0, 2, 4, 1, 3)
    else:
        # [B,K,G,T,S] x [B,S,K,V] -> [B,T,K,G,V]
        o = jnp.einsum(
            "bkgts,bskv->btkgv", grouped, v, preferred_element_type=jnp.float32
        )
    return o.reshape(b, t, h, width).astype(v.dtype)


def allowed(mask: Mask, where: Where) -> jax.Array:
    """The mask at given positions, as booleans that broadcast to [B,H,T,S].

    A kv_pos [B,S,H] of `where` has one position a head.
    """
    h, i, j = _places(where)
    seen = mask(h, i, j) & (j >= 0)
    if where.q_segment is None or where.kv_segment is None:
        return seen
    own = where.q_segment[:, None, :, None]
    other = where.kv_segment[:, None, None, :]
    return seen & (own == other) & (other > 0)


def _places(where: Where) -> tuple:
    """Heads, query positions and key positions as they broadcast to [B,H,T,S]."""
    # queries along T, keys along S: [B,1,T,1] and [B,1|H,1,S]
    i = where.q_pos[:, None, :, None]
    kv_pos = where.kv_pos[..., None] if where.kv_pos.ndim == 2 else where.kv_pos
    j = jnp.moveaxis(kv_pos, 2, 1)[:, :, None]
    return None if where.head is None else where.head[None, :, None, None], i, j


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
    split_lse: bool = False,
) -> tuple[jax.Array, ...]:
    """Exact attention by the matrix; arguments and results of
    `attn.exact.chunked.attend`."""
    check_given(q, k, where, bias, sink, dropout)
    here = everywhere(where, q, k)
    x = formed(logits(q, k, spec.scale), spec, here)  # [B,H,T,S]
    x = x if bias is None else x + bias.astype(jnp.float32)
    p, m, l = _sums(x, allowed(spec.mask, here), sink)
    m, l = m[..., 0], l[..., 0]  # [B,H,T]
    p = _dropped(p / jnp.where(l > 0, l, 1)[..., None], dropout, here.head)
    return values(p, v), *((m, l) if split_lse else (lse_of(m, l),))


def everywhere(where: Where, q, k) -> Where:
    """`where` with what it leaves open: positions [B|1,T] and [B|1,S], or [B,S,H] of
    slots that differ by head, and the heads' numbers [H]."""
    (t, h), s = q.shape[1:3], k.shape[1]
    q_pos, kv_pos = where.q_pos, where.kv_pos
    if where.counted:
        q_pos = jnp.arange(s - t, s, dtype=jnp.int32)[None] + where.shift
        kv_pos = jnp.arange(s, dtype=jnp.int32)[None]
    elif kv_pos.ndim == 3 and kv_pos.shape[2] > 1:
        kv_pos = jnp.repeat(kv_pos, h // kv_pos.shape[2], 2)
    head = jnp.arange(h, dtype=jnp.int32) if where.head is None else where.head
    return Where(q_pos, kv_pos, where.q_segment, where.kv_segment, head)


def _dropped(p: jax.Array, dropout: Dropout | None, head: jax.Array) -> jax.Array:
    """Weights [B,H,T,S] with those that dropout leaves out at 0."""
    if dropout is None:
        return p
    keep = dropout.keep
    if keep is None and dropout.hashed:
        b, _, t, s = p.shape
        rows = dropout.batch
        rows = jnp.arange(b, dtype=jnp.int32) if rows is None else rows
        keep = dropout_keep(
            dropout.rate, dropout.words, rows[:, None, None, None],
            head[None, :, None, None], jnp.arange(t)[None, None, :, None],
            jnp.arange(s)[None, None, None],
        )
    return p if keep is None else p * keep / (1 - dropout.rate)


def online_softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(Full()),
    where: Where = Where(),
) -> OnlineSoftmax:
    """The online softmax state [B,T,H] of these keys, whose logits are one array.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]. Of `spec` mask and scale count.
    """
    check(q, k, v)
    seen = allowed(spec.mask, everywhere(where, q, k))
    x = jnp.where(seen, logits(q, k, spec.scale), EMPTY)  # [B,H,T,S]
    m = jax.lax.stop_gradient(x.max(-1))  # o does not depend on it
    # where nothing is seen exp(EMPTY - EMPTY) is 1: the mask acts again
    p = jnp.where(seen, exp_below(x, m[..., None]), 0)
    l, acc = p.sum(-1), values(p, v.astype(jnp.float32))
    return OnlineSoftmax(m.swapaxes(1, 2), l.swapaxes(1, 2), acc)
