"""Tree search: the best M of n blocks of keys by halving ranges of them.

A range of blocks is judged by one block that stands for it, so each round costs M
products and not n, and ceil(log2(n / M)) rounds end at single blocks. It finds the best
ones as far as neighbours are alike. Indices only: no gradient flows through it.
Source: Lee et al., 2024, arXiv:2406.09827, as in the authors' first code.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.exact.online import EMPTY

SCORED = 2**18  # products of the rows that are searched at once, over batch and heads


class Tree(NamedTuple):
    """Where each row searches, [B,N] int32: first, the key block that its sequence
    begins with; length, the tokens from there on that are searched; seen, those that
    may be looked at."""

    first: jax.Array
    length: jax.Array
    seen: jax.Array


def search(
    q: jax.Array, k: jax.Array, tree: Tree, found: int, block: int, *,
    center: bool = False,
) -> jax.Array:
    """The blocks of keys that the search finds: [B,N,H,M] int32 in order, M = found, -1
    for none in front; a block may be named twice.

    q [B,N,R,H,D]: the queries that lead the search of each of N rows; k [B,S,K,D] in
    blocks of `block` tokens. center: a range is judged by its middle block, not by its
    first one.
    """
    q, k = (jax.lax.stop_gradient(a) for a in (q, k))
    b, _, asking, h, _ = q.shape
    blocks = -(-k.shape[1] // block)
    rounds = 0  # of the longest row: until M 2^rounds >= n
    while found << rounds < blocks:
        rounds += 1
    one = functools.partial(
        _row, k, found=found, block=block, rounds=rounds, center=center)
    # rows first: [N,B,...]
    rows = jax.tree.map(
        lambda a: jnp.moveaxis(jnp.broadcast_to(a, (b, *a.shape[1:])), 1, 0), tree)
    at_once = max(1, SCORED // (h * found * block * asking))
    chosen = jax.lax.map(
        one, (jnp.moveaxis(q, 1, 0), rows), batch_size=min(at_once, q.shape[1]))
    return jnp.moveaxis(chosen, 0, 1)  # [N,B,H,M] -> [B,N,H,M]


def _row(k, args, *, found: int, block: int, rounds: int, center: bool) -> jax.Array:
    """One row of each batch: q [B,R,H,D] -> [B,H,M]."""
    q, tree = args
    b, _, h, _ = q.shape
    n = (-(-tree.length // block))[:, None, None]  # blocks of the row [B,1,1]
    slot = jnp.arange(found, dtype=jnp.int32)[None, None]
    # start_i = floor(n/M i), up to the next one
    start, stop = n * slot // found, n * (slot + 1) // found
    start, size = (jnp.broadcast_to(a, (b, h, found)) for a in (start, stop - start))

    def score(start, size):
        """The largest q.k of the block that stands for each range, -inf if empty."""
        at = start + size // 2 if center else start
        return jnp.where(size > 0, _score(q, k, at, tree, block), EMPTY)

    best = score(start, size) if rounds and not center else None
    for round in range(rounds):
        half = size // 2
        starts = jnp.concatenate([start, start + half], -1)  # [B,H,2M]
        sizes = jnp.concatenate([half, size - half], -1)
        if best is None:
            scores = score(starts, sizes)
        else:
            # the left half begins with the block that its range began with
            right = score(start + half, size - half)
            scores = jnp.concatenate([jnp.where(half > 0, best, EMPTY), right], -1)
        top, at = jax.lax.top_k(scores, found)
        going = n > found << round  # width n / M / 2^round is above 1
        pick = functools.partial(jnp.take_along_axis, indices=at, axis=-1)
        start = jnp.where(going, pick(starts), start)
        size = jnp.where(going, pick(sizes), size)
        best = None if best is None else jnp.where(going, top, best)
    # rows of at most M blocks take all
    every = jnp.where(slot < n, slot, -1)
    chosen = jnp.where(n <= found, every, start)
    chosen = jnp.where(chosen < 0, -1, chosen + tree.first[:, None, None])
    return jnp.sort(chosen, axis=-1)


def _score(q, k, at, tree: Tree, block: int) -> jax.Array:
    """The largest q.k of blocks at [B,H,m] over all queries and keys: [B,H,m]."""
    b, h, m = at.shape
    inside = jnp.arange(block, dtype=jnp.int32).reshape(1, 1, 1, -1)
    pos = at[..., None] * block + inside  # in the sequence
    token = pos + (tree.first * block)[:, None, None, None]
    heads = jnp.arange(h) // (h // k.shape[2])

    def taken(k, token):  # [S,K,D], [H,m,block] -> [H,m,block,D]
        return k.at[token, heads[:, None, None]].get(mode="clip")

    keys = jax.vmap(taken)(k, token)
    # [B,R,H,D] x [B,H,m,block,D] -> [B,H,R,m,block]
    s = jnp.einsum("brhd,bhmjd->bhrmj", q, keys, preferred_element_type=jnp.float32)
    s = jnp.where((pos < tree.seen[:, None, None, None])[:, :, None], s, EMPTY)
    return s.max((2, 4))
