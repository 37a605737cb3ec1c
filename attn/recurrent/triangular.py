"""Triangular: a triangular system, by products of matrices.

The tokens of a chunk of the delta rule depend on each other in their order, which is a
system (I + A) u = b with A strictly lower triangular. Small blocks of the inverse are
solved row by row, all at once, and then merged; the solution is then refined, which
takes its rounding away.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 16  # rows of a triangular system that are solved one after the other


@jax.custom_jvp
def inverse(a: jax.Array) -> jax.Array:
    """(I + a)^-1 for a strictly lower triangular a [...,c,c]: blocks of 16 rows by
    substitution, which are then merged, two and two, by products."""
    c = a.shape[-1]
    size = BLOCK
    while size < c:
        size *= 2
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, size - c)] * 2)
    return _merged(a)[..., :c, :c]


def _merged(a: jax.Array) -> jax.Array:
    half = a.shape[-1] // 2
    if half < BLOCK:
        return _substituted(a)
    both = jnp.stack([a[..., :half, :half], a[..., half:, half:]])
    first, last = _merged(both)
    # inverse of [[P,0],[R,Q]]: below the diagonal -Q^-1 R P^-1
    corner = -last @ (a[..., half:, :half] @ first)
    above = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([above, jnp.concatenate([corner, last], -1)], -2)


def _substituted(a: jax.Array) -> jax.Array:
    x = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    for j in range(a.shape[-1] - 1):  # row j is done: take it out of those below
        x = x - a[..., j:j + 1] * x[..., j:j + 1, :]
    return x


@inverse.defjvp
def _(primals, tangents):
    x = inverse(*primals)
    return x, -x @ tangents[0] @ x  # d(M^-1) = -M^-1 dM M^-1, for M = I + a


@jax.custom_jvp
def solve(beta: jax.Array, a: tuple, right: jax.Array) -> jax.Array:
    """u [...,c,X] of (I + beta A) u = beta right, A the sum of the two strictly lower
    triangular a [...,c,c], of which the second is small; beta [...,c,1], right
    [...,c,X]."""
    return _solved(beta, a, right)[1]


def _solved(beta, a, right) -> tuple[jax.Array, jax.Array]:
    """(I + beta A)^-1 and u."""
    coarse, fine = a
    x = inverse(beta * (coarse + fine))
    u = x @ (beta * right)  # [c,c] [c,X]
    for _ in range(1 if coarse.shape[-1] <= 2 * BLOCK else 2):
        # what u leaves of the equation, solved again
        u = u + x @ (beta * ((right - coarse @ u) - fine @ u) - u)
    return x, u


@solve.defjvp
def _(primals, tangents):
    (beta, a, right), (dbeta, da, dright) = primals, tangents
    x, u = _solved(beta, a, right)
    # du = M^-1 (dbeta (right - A u) + beta (dright - dA u)), for M = I + beta A
    a, da = sum(a), sum(da)
    return u, x @ (dbeta * (right - a @ u) + beta * (dright - da @ u))
