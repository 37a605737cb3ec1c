"""Block scores: how weights of a few queries become blocks that all are to read.

Sources: Lai et al., 2025, arXiv:2502.20766, and the code that its authors published.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def diagonals(a: jax.Array) -> jax.Array:
    """The sums [...,S] along the diagonals of a [...,I,S]: entry j is of the one that
    ends at column j in the last row, sum_i a[i, j - (I - 1 - i)]."""
    *lead, rows, s = a.shape
    # rows of S + I numbers, read again as rows of one less: row i begins i further on
    wide = jnp.pad(a[..., ::-1, :], [(0, 0)] * len(lead) + [(0, 0), (0, rows)])
    flat = wide.reshape(*lead, rows * (s + rows))[..., :rows * (s + rows - 1)]
    return flat.reshape(*lead, rows, s + rows - 1)[..., :s].sum(-2)


def count_to(p: jax.Array, share: float) -> jax.Array:
    """How many of p [...,S], the largest first, sum to no more than `share`."""
    ordered = jnp.sort(p, axis=-1, descending=True)
    return (jnp.cumsum(ordered, -1) <= share).sum(-1).astype(jnp.int32)


def best_sum(p: jax.Array, share: float) -> jax.Array:
    """Which of p [...,S] bool are the largest that sum to no more than `share`."""
    order = jnp.argsort(-p, axis=-1, stable=True)
    inside = jnp.cumsum(jnp.take_along_axis(p, order, -1), -1) <= share
    # back from the order of size
    return jnp.take_along_axis(inside, jnp.argsort(order, axis=-1), -1)


def best(p: jax.Array, most: jax.Array) -> jax.Array:
    """Which of p [...,n] bool are the `most` [...] largest, the first of equals."""
    order = jnp.argsort(-p, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < most[..., None]


def named(at: jax.Array, n: int) -> jax.Array:
    """Which of n numbers at [...,m] names: [...,n] bool."""
    mark = lambda at: jnp.zeros((n,), bool).at[at].set(True, mode="drop")
    for _ in at.shape[:-1]:
        mark = jax.vmap(mark)
    return mark(at)


def union(columns: jax.Array, ends: jax.Array) -> jax.Array:
    """Pairs of blocks [...,n,n] bool, none of the future, in a chosen column [...,n] or
    on a chosen diagonal [...,n], numbered by the column at which it ends."""
    n = columns.shape[-1]
    far = jnp.arange(n)[:, None] - jnp.arange(n)[None]  # how far a key block is behind
    # a pair on the diagonal `far` below the main one ends at column n - 1 - far
    on = ends[..., jnp.clip(n - 1 - far, 0, n - 1)]
    past = (far >= 0).reshape((1,) * (columns.ndim - 1) + far.shape)
    return past & (columns[..., None, :] | on)


def by_pair(columns: jax.Array, ends: jax.Array) -> jax.Array:
    """The sum of what its column and its diagonal have, for each pair [...,n,n]."""
    n = columns.shape[-1]
    far = jnp.arange(n)[:, None] - jnp.arange(n)[None]
    # [...,1,n] + [...,n,n]
    return columns[..., None, :] + ends[..., jnp.clip(n - 1 - far, 0, n - 1)]


def summed(p: jax.Array, block: int) -> jax.Array:
    """The sums [...,n] over blocks of p [...,S]; the last one may be shorter."""
    s = p.shape[-1]
    p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -s % block)])
    return p.reshape(*p.shape[:-1], -1, block).sum(-1)


def mean_keys(k: jax.Array, block: int) -> jax.Array:
    """The means [B,n,K,D] float32 over blocks of k [B,S,K,D], of the tokens there."""
    b, s, heads, d = k.shape
    n = -(-s // block)
    k = jnp.pad(k.astype(jnp.float32), ((0, 0), (0, n * block - s), (0, 0), (0, 0)))
    sums = k.reshape(b, n, block, heads, d).sum(2)  # [B,n,K,D]
    there = jnp.minimum(s - jnp.arange(n) * block, block).astype(jnp.float32)
    return sums / there[None, :, None, None]


def root_divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    """The square root of the Jensen-Shannon divergence of a and b [...,n], in nats;
    0 log 0 is 0."""
    m = (a + b) / 2

    def kl(p):
        some = p > 0
        ratio = jnp.where(some, p, 1) / jnp.where(some, m, 1)
        return (p * jnp.log(ratio)).sum(-1)

    # of equals rounding may leave less than 0
    return jnp.sqrt(jnp.maximum((kl(a) + kl(b)) / 2, 0))
