"""Compressed blocks: short blocks of tokens as one token each, and what they point at.

Overlapping blocks of l tokens, one every d tokens, become a key and a value each, by a
network of the tokens side by side. How a query's weights on them lie says which of the
longer blocks of l' tokens it had better read as they are. Lengths are multiples of d,
and a sequence begins at a multiple of l' (`attn/sparse/block_grid.py`).

Source: Yuan et al., 2025, arXiv:2502.11089, equations 7 to 12.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.dense import weights


class Compressor(NamedTuple):
    """phi, float32: position [K,l,X], added to the tokens of a block; into [K,l X,R]
    and out [K,R,X'], around a gelu."""

    position: jax.Array
    into: jax.Array
    out: jax.Array


class Compressed(NamedTuple):
    """Compressed blocks: k [B,N,K,D], v [B,N,K,V] float32, or None; last [B|1,N]: the
    position of the last token, -1 for what is no block; segment [B|1,N], 0 there."""

    k: jax.Array
    v: jax.Array | None
    last: jax.Array
    segment: jax.Array


class Choice(NamedTuple):
    """How blocks are chosen: top_k of `parts` strides each, where compressed ones have
    `overlap` strides; the `first` blocks and the `local` last ones in any case. scale:
    of q.k."""

    top_k: int
    parts: int
    overlap: int
    first: int
    local: int
    scale: float


def compress(a: jax.Array, phi: Compressor, stride: int) -> jax.Array:
    """Tokens a [B,S,K,X], S a multiple of `stride` -> [B,S/stride,K,X'] float32: block
    i is of the l tokens from i * stride on; 0 where there are none."""
    b, s, heads, width = a.shape
    n, length = s // stride, phi.position.shape[1]
    # the first layer stride by stride, so that tokens are not copied l / d times
    into = phi.into.reshape(heads, length // stride, stride, width, -1)
    strides = a.astype(jnp.float32).reshape(b, n, stride, heads, width)
    found = jnp.einsum("bndkx,kpdxr->pbnkr", strides, into)
    parts = found.shape[0]
    found = jnp.pad(found, ((0, 0), (0, 0), (0, parts - 1), (0, 0), (0, 0)))
    total = sum(found[p, :, p:p + n] for p in range(parts))
    bias = jnp.einsum(
        "kpdx,kpdxr->kr", phi.position.reshape(into.shape[:-1]), into)
    return jnp.einsum("bnkr,krx->bnkx", jax.nn.gelu(total + bias[None, None]), phi.out)


def inside(pos, segment, length: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """last and segment [B|1,N] of compressed blocks, of slots at pos and segment
    [B|1,S]: those that lie in one sequence."""
    n = pos.shape[1] // stride
    begin = segment[:, ::stride]
    ends = jnp.pad(segment, ((0, 0), (0, length)))[:, length - 1::stride][:, :n]
    there = (begin > 0) & (begin == ends)
    last = jnp.where(there, pos[:, ::stride] + (length - 1), -1)
    return last, jnp.where(there, begin, 0)


def read(
    q: jax.Array, pos, segment, first, own, found: Compressed, choice: Choice
) -> tuple[jax.Array | None, jax.Array]:
    """What queries q [B,I,H,D] get from compressed blocks [B,I,H,V] float32, None for
    blocks without values, and the blocks [B,K,I,n] that each group of heads is to read,
    -1 for none.

    pos, segment [B|1,I]; first, own [B|1,I]: the first block of the query's sequence,
    and the one that it is in, -1 for what is no token.
    """
    b, size, h, d = q.shape
    heads = found.k.shape[2]
    queries = q.astype(jnp.float32).reshape(b, size, heads, h // heads, d)
    # [B,I,K,G,D] x [B,N,K,D] -> [B,K,G,I,N]
    s = jnp.einsum("bikgd,bnkd->bkgin", queries, found.k) * choice.scale
    last, of = found.last[:, None], found.segment[:, None]
    seen = (last >= 0) & (last <= pos[..., None]) & (of == segment[..., None])
    p = weights(s, seen[:, None, None])  # equation 8; 0 where nothing is seen
    o = None
    if found.v is not None:
        o = jnp.einsum("bkgin,bnkv->bikgv", p, found.v).reshape(b, size, h, -1)
    # equation 10: one choice for all heads that share keys
    shared = jax.lax.stop_gradient(p).sum(2)
    return o, best(by_block(shared, choice), first, own, choice)


def by_block(p: jax.Array, choice: Choice) -> jax.Array:
    """Equation 9: weights of compressed blocks p [...,N] -> of the blocks [...,N/parts]
    of which they hold strides, as often as they do."""
    n = p.shape[-1]
    behind = [(0, 0)] * (p.ndim - 1)
    # stride s is held by the compressed blocks s, s - 1, ..., s - overlap + 1
    strides = sum(
        jnp.pad(p, behind + [(back, 0)])[..., :n] for back in range(choice.overlap))
    return strides.reshape(*p.shape[:-1], -1, choice.parts).sum(-1)


def best(scores: jax.Array, first, own, choice: Choice) -> jax.Array:
    """Equation 11: the top_k blocks [B,K,I,n] of scores [B,K,I,M], -1 for none."""
    number = jnp.arange(scores.shape[-1], dtype=jnp.int32).reshape(1, 1, 1, -1)
    first, own = (a[:, None, :, None] for a in (first, own))
    sure = (number < first + choice.first) | (number > own - choice.local)
    scores = jnp.where(sure, jnp.inf, scores)
    scores = jnp.where((number >= first) & (number <= own), scores, -jnp.inf)
    top, found = jax.lax.top_k(scores, min(choice.top_k, scores.shape[-1]))
    return jnp.where(top > -jnp.inf, found, -1).astype(jnp.int32)
