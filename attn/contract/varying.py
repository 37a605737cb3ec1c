"""Varying: over which axes of a user's own `shard_map` arrays differ.

Inside `jax.shard_map` with check_vma=True, its default, the type of an array says over
which mesh axes its shards differ. A constant differs over none, and a loop whose carry
begins with one but ends with something made of the shards is refused by jax, and so is
a gradient rule whose arguments differ over other axes than their gradients do.
"""

from __future__ import annotations

from typing import Any

import jax


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
