"""Compressed blocks: short blocks of tokens as one token each, and what they point at.

Overlapping blocks of l tokens, one every d tokens, become a key and a value each, by a
network of the tokens side by side. How a query's weights on them lie says which of the
longer blocks of l' tokens it had better read as they are. Lengths are multiples of d,
and a sequence begins at a multiple of l' (`attn/sparse/block_grid.py`).

Source: Yuan et al., 2025, arXiv:2502.11089, equations 7 to 12.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.exact.dense import weights
from attn.sparse import by_block


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
    """How blocks are chosen: top_k of `block` tokens, `parts` strides, each, where
    compressed ones have `overlap` strides; the `first` blocks and the `local` last ones
    in any case. scale: of q.k."""

    block: int
    top_k: int
    parts: int
    overlap: int
    first: int
    local: int
    scale: float


def compressor(
    param: Callable, length: int, hidden: int | None, name: str, like: Any
) -> Compressor:
    """phi of blocks of `length` tokens like those in [B,T,K,X], of parameters that
    `param` of a linen module makes: positions of deviation 0.02, layers that change no
    variance. hidden: R, None for X."""
    init = nn.initializers.variance_scaling(
        1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=(0,))
    heads, width = like.shape[2:]
    hidden = hidden or width
    return Compressor(
        param(f"{name}_position", nn.initializers.normal(0.02), (heads, length, width)),
        param(f"{name}_in", init, (heads, length * width, hidden)),
        param(f"{name}_out", init, (heads, hidden, width)))


def compress(a: jax.Array, phi: Compressor, stride: int) -> jax.Array:
    """Tokens a [B,S,K,X], S a multiple of `stride` -> [B,S/stride,K,X'] float32: block
    i is of the l tokens from i * stride on; 0 where there are none."""
    b, s, heads, width = a.shape
    n, length = s // stride, phi.position.shape[1]
    # the first layer stride by stride, so that tokens are not copied l / d times
    into = phi.into.reshape(heads, length // stride, stride, width, -1)
    strides = a.astype(jnp.float32).reshape(b, n, stride, heads, width)
    # stride n as part p of a block: [B,n,d,K,X] x [K,l/d,d,X,R] -> [l/d,B,n,K,R]
    found = jnp.einsum("bndkx,kpdxr->pbnkr", strides, into)
    parts = found.shape[0]
    found = jnp.pad(found, ((0, 0), (0, 0), (0, parts - 1), (0, 0), (0, 0)))
    # block i holds the strides i, i + 1, ..., as its parts 0, 1, ...
    total = sum(found[p, :, p:p + n] for p in range(parts))
    # the positions' own share, the same for all blocks: [K,R]
    bias = jnp.einsum(
        "kpdx,kpdxr->kr", phi.position.reshape(into.shape[:-1]), into)
    # [B,n,K,R] x [K,R,X'] -> [B,n,K,X']
    return jnp.einsum("bnkr,krx->bnkx", jax.nn.gelu(total + bias[None, None]), phi.out)


def compressed(
    phi: tuple, k: jax.Array, v: jax.Array, pos, segment, length: int, stride: int
) -> Compressed:
    """The compressed blocks of tokens on a grid: k, v [B,S,K,.] at pos and segment
    [B|1,S]. phi: of keys, and of values or None."""
    of_k, of_v = phi
    vals = None if of_v is None else compress(v, of_v, stride)
    return Compressed(
        compress(k, of_k, stride), vals, *inside(pos, segment, length, stride))


def inside(pos, segment, length: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """last and segment [B|1,N] of compressed blocks, of slots at pos and segment
    [B|1,S]: those that lie in one sequence."""
    n = pos.shape[1] // stride
    # a block lies in one sequence where its first and last token do
    begin = segment[:, ::stride]
    ends = jnp.pad(segment, ((0, 0), (0, length)))[:, length - 1::stride][:, :n]
    there = (begin > 0) & (begin == ends)
    last = jnp.where(there, pos[:, ::stride] + (length - 1), -1)
    return last, jnp.where(there, begin, 0)


def readings(
    q: jax.Array, rows: tuple, _, k: jax.Array, v: jax.Array, columns: tuple,
    head: jax.Array, *, choice: Choice, fine: bool, aligned: bool, **how: Any,
) -> jax.Array:
    """What query blocks q [B,N,I,H,D] get from compressed blocks, if these have values,
    and, if `fine`, from the blocks that they choose: [B,N,I,H,c V], side by side.

    rows: pos, segment, first, own [B|1,N,I] as `read` has them; columns: the compressed
    blocks, of all key heads, and kv_pos, kv_segment [B|1,S] of k, v [B,S,K,.]; head
    [H]: the global numbers of the heads that are here. aligned, how: of `by_block`.
    """
    b, n, size, h, d = q.shape
    found, kv_pos, kv_segment = columns
    group = h // k.shape[2]
    mine = head[::group] // group  # the key heads that are here
    found = found._replace(
        k=found.k[:, :, mine], v=None if found.v is None else found.v[:, :, mine])

    @jax.checkpoint
    def coarse(args):
        q, pos, segment, first, own = args
        return read(q, pos, segment, first, own, found, choice)

    o, chosen = jax.lax.map(
        coarse, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, *rows)))
    results = [] if o is None else [jnp.moveaxis(o, 0, 1)]
    if fine:
        # [N,B,K,I,n] -> [B,K,N I,n]
        chosen = chosen.transpose(1, 2, 0, 3, 4)
        chosen = chosen.reshape(b, k.shape[2], n * size, -1)
        pos, own = (rows[i].reshape(-1, n * size) for i in (0, 3))
        # the own block, which is among them, is read up to the token itself
        chosen = jnp.where(chosen == own[:, None, :, None], -1, chosen)
        o = by_block.read(
            q.reshape(b, n * size, h, d), k, v, chosen, pos, own, kv_pos, kv_segment,
            rows=n, aligned=aligned, block=choice.block, head=head, **how)
        results.append(o.reshape(b, n, size, h, -1))
    return jnp.concatenate(results, -1)


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
        # [B,K,G,I,N] x [B,N,K,V] -> [B,I,K,G,V]
        o = jnp.einsum("bkgin,bnkv->bikgv", p, found.v).reshape(b, size, h, -1)
    # equation 10: one choice for all heads that share keys
    shared = jax.lax.stop_gradient(p).sum(2)
    return o, best(block_scores(shared, choice), first, own, choice)


def block_scores(p: jax.Array, choice: Choice) -> jax.Array:
    """Equation 9: weights of compressed blocks p [...,N] -> of the blocks [...,N/parts]
    of which they hold strides, as often as they do."""
    n = p.shape[-1]
    behind = [(0, 0)] * (p.ndim - 1)
    # stride s is held by the compressed blocks s, s - 1, ..., s - overlap + 1
    strides = p
    for back in range(1, choice.overlap):
        strides = strides + jnp.pad(p, behind + [(back, 0)])[..., :n]
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
