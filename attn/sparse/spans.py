"""Spans: the past of a token as regions of 1, 2, 4, ... tokens, one a bit of its place.

    i = 13 = 8 + 4 + 1:  [0, 8), [8, 12), [12, 13), and the token itself

Spans are the aligned blocks of 2^l tokens, and a token at position i reads the one
before its own wherever bit l of i is set. There are O(T) of them, and each token reads
at most log2(T) + 1.

Source: Ren et al., 2021, arXiv:2107.05768, section 4.2 (Logsparse); the logsparse
pattern is of Li et al., 2019, arXiv:1907.00235.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.dense import weights
from attn.sparse.regions import pooled


def levels(t: int) -> int:
    """How many sizes of spans T tokens have: floor(log2(T - 1)) + 1."""
    return max(t - 1, 0).bit_length()


def attend(q, k, v, pos: jax.Array, scale: float) -> jax.Array:
    """All tokens at once, in rows where every sequence begins at a multiple of the
    power of two that is no less than its length: o [B,T,H,V] float32.

    q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], pos [B,T] in the sequence.
    """
    b, t, h, d = q.shape
    group = h // k.shape[2]
    high = levels(t)
    size = max(2**high, 1)

    def fill(a):
        return jnp.pad(a, [(0, 0), (0, size - t)] + [(0, 0)] * (a.ndim - 2))

    q, k, v, pos = (fill(a) for a in (q, k, v, pos))
    qf, kf, vf = (a.astype(jnp.float32) for a in (q, k, v))
    own_k, own_v = (jnp.repeat(a, group, 2) for a in (kf, vf))
    logits = [(qf * own_k).sum(-1) * scale]  # of the token itself [B,T,H]
    values = []
    for level in range(high):
        span = 2**level
        pairs = (b, size // (2 * span), 2, span)
        # the first span of each pair is read by the second: [B,n,2,2^level,H|K,.]
        q2, k2, v2 = (a.reshape(*pairs, *a.shape[2:]) for a in (qf, kf, vf))
        # of one token its own value: [B,n,K,D], [B,n,H,V]
        span_k, span_v = k2[:, :, 0, 0], jnp.repeat(v2[:, :, 0, 0], group, 2)
        if level:
            span_k, span_v = pooled(q2[:, :, 0], k2[:, :, 0], v2[:, :, 0], scale)
        span_k = jnp.repeat(span_k, group, 2)
        # [B,n,j,H,D] x [B,n,H,D] -> [B,n,j,H]
        s = jnp.einsum("bnjhd,bnhd->bnjh", q2[:, :, 1], span_k)
        s = jnp.pad(s[:, :, None] * scale, ((0, 0),) * 2 + ((1, 0),) + ((0, 0),) * 2)
        logits.append(s.reshape(b, size, h))
        values.append(span_v)
    s = jnp.stack(logits, -1)  # [B,T,H,1+levels]
    # a token at pos reads a span of 2^n tokens for each bit n of pos that is set
    reads = (pos[..., None] >> jnp.arange(high)[None, None]) & 1
    reads = jnp.concatenate([jnp.ones_like(pos[..., None]), reads], -1) > 0
    p = weights(s, reads[:, :, None])
    o = p[..., :1] * own_v
    for level, span_v in enumerate(values):
        own = p[..., level + 1].reshape(b, span_v.shape[1], 2, 2**level, h)[:, :, 1]
        found = own[..., None] * span_v[:, :, None]  # [B,n,j,H,V]
        found = jnp.pad(found[:, :, None], ((0, 0),) * 2 + ((1, 0),) + ((0, 0),) * 3)
        o = o + found.reshape(b, size, h, -1)
    return o[:, :t]


def apart(pos: jax.Array, segment: jax.Array) -> tuple[jax.Array, int]:
    """Where tokens of packed rows [B,T] stand in longer ones in which every sequence
    begins at a multiple of a power of two, as `attend` wants them: places [B,T], and
    the length. Padding stands nowhere, at the length.

    A sequence of n tokens behind r others begins at 4 r, up to a multiple of 2^k, n <=
    2^k < 2 n: it ends before 4 (r + n), where the next one may begin.
    """
    b, t = pos.shape
    real = segment > 0
    # tokens in front of it in the row, and how many its sequence has
    before = jnp.cumsum(real, 1, dtype=jnp.int32) - 1 - pos
    length = jax.vmap(lambda ids, n: jnp.zeros((t + 1,), jnp.int32).at[ids].max(n))(
        segment, pos + 1)
    length = jnp.take_along_axis(length, segment, 1)
    power = jnp.ones_like(length)
    for _ in range(levels(t)):
        power = jnp.where(power < length, 2 * power, power)
    start = -(-4 * before // power) * power
    return jnp.where(real, start + pos, 4 * t), 4 * t


class Counter(NamedTuple):
    """A stream's spans, those of the bits of its length: q [B,L,H,D], k [B,L,K,D], v
    [B,L,H,V] float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def step(counter: Counter, k, v, q, pos, real, scale: float):
    """One token q [B,H,D] at pos [B] -> the counter after it, o [B,H,V] float32.

    k [B,C,K,D], v [B,C,K,V]: all tokens of the sequence at their positions, this one
    too. real [B]: it is no padding.
    """
    b, h = q.shape[:2]
    group, high = h // k.shape[2], counter.q.shape[1]
    own_k, own_v = (  # [B,K,.]
        jnp.take_along_axis(
            a, jnp.clip(pos, 0, a.shape[1] - 1)[:, None, None, None], 1
        )[:, 0].astype(jnp.float32) for a in (k, v))
    q = q.astype(jnp.float32)
    bits = (pos[:, None] >> jnp.arange(high)[None]) & 1 > 0  # [B,L]
    # the token itself before the spans: [B,1+L,K,D] for each query head
    keys = jnp.repeat(jnp.concatenate([own_k[:, None], counter.k], 1), group, 2)
    s = jnp.einsum("bhd,blhd->bhl", q, keys)  # [B,H,1+L]
    seen = jnp.concatenate([jnp.ones_like(bits[:, :1]), bits], 1)
    p = weights(s * scale, seen[:, None])
    # [B,H,L] x [B,L,H,V] -> [B,H,V]
    near = p[..., :1] * jnp.repeat(own_v, group, 1)
    o = near + jnp.einsum("bhl,blhv->bhv", p[..., 1:], counter.v)
    # the spans of the bits that are set, from the lowest on, become one with the token
    top_q, top_k, carry = q, own_k, jnp.ones_like(real)
    rank = jnp.zeros_like(pos)
    for level in range(high):
        carry = carry & bits[:, level]
        rank = rank + carry.astype(rank.dtype)
        top_q, top_k = (
            jnp.where(carry[:, None, None], jnp.maximum(top, held[:, level]), top)
            for top, held in ((top_q, counter.q), (top_k, counter.k)))
    new_v = _value(k, v, top_q, pos, rank, high, scale)
    here = (jnp.arange(high)[None] == rank[:, None]) & real[:, None]
    return Counter(*(
        jnp.where(here[..., None, None], new[:, None], held)
        for held, new in zip(counter, (top_q, top_k, new_v)))), o


def _value(k, v, q, pos, rank, high: int, scale: float) -> jax.Array:
    """What q [B,H,D] finds in the last 2^rank tokens up to pos: [B,H,V]. As many tokens
    are read as the largest rank of the batch asks for."""
    group, slots = q.shape[1] // k.shape[2], k.shape[1]

    def reading(level: int):
        def read(_):
            back = jnp.arange(2**level)[None]
            index = jnp.clip(pos[:, None] - back, 0, slots - 1)
            there = back < 2**jnp.minimum(rank, level)[:, None]
            near = (jnp.take_along_axis(a, index[..., None, None], 1) for a in (k, v))
            keys, vals = (
                jnp.repeat(a, group, 2).astype(jnp.float32) for a in near)
            p = weights(
                # [B,H,D] x [B,2^level,H,D] -> [B,H,2^level]
                jnp.einsum("bhd,bjhd->bhj", q, keys) * scale, there[:, None])
            return jnp.einsum("bhj,bjhv->bhv", p, vals)

        return read

    # a memory's last token ends a span that nothing reads
    most = jnp.minimum(rank.max(), high - 1)
    return jax.lax.switch(most, [reading(n) for n in range(high)], None)
