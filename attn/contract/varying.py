"""Varying: over which axes of a user's own `shard_map` arrays differ.

Inside `jax.shard_map` with check_vma=True, its default, the type of an array says over
which mesh axes its shards differ. A constant differs over none, and a loop whose carry
begins with one but ends with something made of the shards is refused by jax, and so is
a gradient rule whose arguments differ over other axes than their gradients do.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def axes_of(tree: Any) -> frozenset:
    """The mesh axes over which some array of `tree` differs between shards; none
    outside of a `shard_map` that checks them."""
    found = (jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(tree))
    return frozenset().union(*found)


def varying(tree: Any, *like: Any) -> Any:
    """`tree`, each array marked as different over all axes over which one of `tree` or
    of `like` is: what a loop begins with, or the arguments of a gradient rule."""
    axes = axes_of((tree, like))

    def mark(a):
        more = tuple(sorted(axes - axes_of(a)))
        # its transpose is the sum over these axes
        return jax.lax.pcast(a, more, to="varying") if more else a

    return jax.tree.map(mark, tree) if axes else tree


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """The error function. jax 0.12's own derivative of it is refused in a `shard_map`
    that checks what varies."""
    return jax.lax.erf(x)


@erf.defjvp
def _erf_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return erf(x), 2 / math.sqrt(math.pi) * jnp.exp(-x * x) * dx


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), exact, with Phi the normal distribution up to x."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))
