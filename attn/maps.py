"""Maps: what is read off weights of attention and off features that are compared.

Functions of weights p [B,n,m,S] (n heads, m query rows, S keys) take rows by tiles, as
`attn.contract.view.Rows(of=argmax)` hands them over, so that of a long text no map is
made: along axis 2 they give a row each, or, those that sum over rows, one a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def argmax(p: jax.Array) -> jax.Array:
    """[B,n,m] int32: the key with the greatest weight of each row, of equals the first;
    -1 for a row that sees nothing."""
    return jnp.where(p.max(-1) > 0, p.argmax(-1), -1).astype(jnp.int32)


def top(p: jax.Array, k: int) -> jax.Array:
    """[B,n,m,k] int32: the k keys with the greatest weights, -1 where there are fewer.
    ValueError for more than there are keys."""
    if not 1 <= k <= p.shape[-1]:
        raise ValueError(f"k={k}: expected 1 to {p.shape[-1]}, the number of keys")
    found, at = jax.lax.top_k(p, k)
    return jnp.where(found > 0, at, -1).astype(jnp.int32)


def entropy(p: jax.Array) -> jax.Array:
    """[B,n,m] nats of each row: 0 for one key, log S for all alike."""
    logs = jnp.log(jnp.where(p > 0, p, 1))  # 0 log 0 = 0, with a gradient
    return -(p * logs).sum(-1)


def column_sums(p: jax.Array) -> jax.Array:
    """[B,n,1,S]: what each key gets from the rows of a tile together."""
    return p.sum(2, keepdims=True)


def received(p: jax.Array, seen: jax.Array) -> jax.Array:
    """[B,n,S]: the mean weight that a key gets from the rows that see it.

    p [B,n,m,S]; seen, booleans that broadcast to it. 0 for a key that no row sees.
    (Yu et al., 2024, arXiv:2406.15765: a_h(t), with 1/(N-t) for a causal map.)
    """
    count = jnp.broadcast_to(seen, p.shape).sum(2)
    return p.sum(2) / jnp.maximum(count, 1)


def at_distance(p: jax.Array, distance: int, rows: jax.Array) -> jax.Array:
    """[B,n]: the mean weight of the key `distance` tokens before, over the rows [R] of
    a square map p [B,n,T,T]."""
    return p[:, :, rows, rows - distance].mean(-1)


def overlap(p: jax.Array, other: jax.Array) -> jax.Array:
    """[B,n,m]: the weight that two maps share, sum_s min(p, p'), 1 for equal ones."""
    return jnp.minimum(p, other).sum(-1)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """[...,N,M]: the cosine of each vector of a [...,N,E] with each of b [...,M,E]; 0
    for a vector of zeros."""
    # [...,N,E] x [...,M,E] -> [...,N,M]
    return jnp.einsum("...ne,...me->...nm", unit(a), unit(b))


def unit(a: jax.Array) -> jax.Array:
    """Vectors [...,E] of length 1, zeros as they are."""
    square = (a * a).sum(-1, keepdims=True)
    # a root whose gradient at 0 is a number
    return a * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def spread_out(x: jax.Array, clusters: int) -> jax.Array:
    """[clusters,E]: vectors of x [N,E] that are far from each other: the first, then
    always the one whose greatest cosine with those taken is the least."""
    x = unit(x)

    def take(nearest, _):
        at = nearest.argmin()
        # [N,E] [E]: cosines with the one that is taken
        return jnp.maximum(nearest, x @ x[at]), x[at]

    # a cosine below all others: of equals the first is taken
    nearest = jnp.full(x.shape[:1], -2.0, x.dtype)
    return jax.lax.scan(take, nearest, None, clusters)[1]


def cluster(
    x: jax.Array, clusters: int, *, steps: int = 20
) -> tuple[jax.Array, jax.Array]:
    """Spherical k-means (Dhillon & Modha, 2001): the cluster [N] int32 of each vector
    of x [N,E], and the centres [clusters,E], of length 1. It begins with
    `spread_out`, so that it is the same every time. ValueError for more clusters than
    vectors."""
    if not 1 <= clusters <= x.shape[0]:
        raise ValueError(f"clusters={clusters}: expected 1 to {x.shape[0]}, the number "
                         "of vectors")
    x = unit(x)

    def step(centres, _):
        # [N,E] [E,clusters]: each vector goes to the centre of the greatest cosine
        own = jax.nn.one_hot((x @ centres.T).argmax(-1), clusters, dtype=x.dtype)
        sums = own.T @ x  # [clusters,N] [N,E]
        # an empty cluster stays where it is
        return jnp.where(own.sum(0)[:, None] > 0, unit(sums), centres), None

    centres, _ = jax.lax.scan(step, spread_out(x, clusters), None, steps)
    # [N,E] [E,clusters]
    return (x @ centres.T).argmax(-1).astype(jnp.int32), centres
