"""Explicit meshes: what an attention does on a mesh whose types say how arrays lie.

On a mesh with explicit axes, which is what `jax.make_mesh` gives, the type of an array
says how it is split, and jax refuses what leaves that open, such as a loop whose carry
begins with zeros. An attention leaves it to the compiler: inside, the axes are
automatic. Its output lies as its queries do, and a state as the one that came in.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable

import jax
from jax.sharding import AxisType, PartitionSpec


def laid(tree: Any) -> bool:
    """Whether an array of `tree` is split over explicit axes of the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return False
    arrays = (a for a in jax.tree.leaves(tree) if isinstance(a, jax.Array))
    return any(name is not None for a in arrays for name in spec_of(a))


def spec_of(a: Any) -> PartitionSpec:
    """How the type of an array says that it lies."""
    return getattr(jax.typeof(a).sharding, "spec", PartitionSpec())


def on_automatic_axes(method: Callable) -> Callable:
    """`method(self, [state,] q, k, v, ...)` -> o or (state, o) of an attention, inside
    of which the axes of the mesh are automatic."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def automatic(self, *args, **named):
        if not laid((args, named)):
            return method(self, *args, **named)
        given = signature.bind(self, *args, **named).arguments
        q, v = spec_of(given["q"]), spec_of(given["v"])
        where: Any = PartitionSpec(*[*q, *[None] * 3][:3], *v[3:])
        if "state" in given:
            where = jax.tree.map(spec_of, given["state"]), where
        # only arrays are handed over: the rest stays what it is
        leaves, form = jax.tree.flatten((args, named))
        at = [n for n, a in enumerate(leaves) if isinstance(a, jax.Array)]
        arrays = [leaves[n] for n in at]
        call, variables = _call(self, method)

        def f(variables, *arrays):
            found = dict(zip(at, arrays))
            both = [found.get(n, a) for n, a in enumerate(leaves)]
            args, named = jax.tree.unflatten(form, both)
            return call(variables, *args, **named)

        if variables is None:  # parameters are made here: of no mesh
            arrays = [jax.sharding.reshard(a, PartitionSpec()) for a in arrays]
            return jax.sharding.reshard(f(None, *arrays), where)
        return jax.sharding.auto_axes(f, out_sharding=where)(variables, *arrays)

    return automatic


def _call(self: Any, method: Callable) -> tuple[Callable, Any]:
    """The method as a function of (variables, ...), and the variables of a linen
    module, which have to be handed over as well; None while they are made."""
    if getattr(self, "scope", None) is None:
        return lambda _, *args, **named: method(self, *args, **named), {}
    if self.is_initializing():
        return lambda _, *args, **named: method(self, *args, **named), None
    module, variables = alone(self)
    name = method.__name__

    def call(variables, *args, **named):
        return module.apply(variables, *args, **named, method=name)

    return call, variables


def alone(module: Any) -> tuple[Any, Any]:
    """A linen module that is part of no other, and its variables."""
    return module.clone(parent=None, name=None), module.variables
