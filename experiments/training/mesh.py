"""Mesh: the devices of a run, along `data`, `seq` and `model`, and what lies on them.

The same program runs on one device, on the devices of one host and on many hosts:
every array is global, and every host makes the parts that its own devices hold.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.training import torus
from models import placement

AXES = ("data", "seq", "model")
Sizes = tuple[int, int, int]


def make(sizes: Sizes) -> Mesh:
    """The mesh of the first devices there are, `arranged`. ValueError if there are too
    few, or if devices of many hosts would be left out."""
    wanted, there = math.prod(sizes), jax.device_count()
    if wanted > there:
        raise ValueError(f"mesh={sizes} needs {wanted} devices: there are {there}; "
                         "expected sizes whose product is at most that")
    if wanted < there and jax.process_count() > 1:
        raise ValueError(
            f"mesh={sizes} has {wanted} devices: expected all {there} of the "
            f"{jax.process_count()} hosts"
        )
    return arranged(sizes, jax.devices()[:wanted])


def arranged(sizes: Sizes, devices: Any) -> Mesh:
    """These devices, which need not be there, as a mesh. Neighbours along `model`, then
    `seq`, are near each other, and along `seq` each is joined to the next; `data` goes
    over the slow links between slices of pods. ValueError if it cannot."""
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        placed = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    elif sizes[0] % slices:
        raise ValueError(f"mesh={sizes}: data={sizes[0]}: expected a multiple of the "
                         f"{slices} slices of the pod")
    else:
        near = (sizes[0] // slices, *sizes[1:])
        placed = mesh_utils.create_hybrid_device_mesh(
            near, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(torus.toured(placed), AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def in_force(sizes: Sizes):
    """The mesh of these sizes, in force; None, and nothing in force, for one device."""
    if tuple(sizes) == (1, 1, 1) and jax.process_count() == 1:
        yield None
        return
    mesh = make(sizes)
    with jax.set_mesh(mesh):
        yield mesh


def spread(model: Any, sizes: Sizes) -> Any:
    """`model` as a mesh of these sizes needs it: every attention that names no axis of
    its own gets "seq". Where tokens are not split, an attention that cannot have an
    axis, or that drops weights, is left to the compiler. NotImplementedError for one
    that cannot be split."""
    if max(sizes) == 1:
        return model
    return placement.over(model, "seq", strict=sizes[1] > 1)


def rows(array: Any) -> PartitionSpec:
    """How an array of a batch lies: [B,T] over data and seq, others over data."""
    return PartitionSpec(*("data", "seq")[: 1 + (np.ndim(array) == 2)])


def put(batch: Any, mesh: Mesh | None) -> Any:
    """A batch on the mesh. Every host has the whole batch, which is a pure function of
    the step, and copies to its devices only the rows and tokens that they hold."""
    if mesh is None:
        return batch

    def one(a):
        a = np.asarray(a)
        where = NamedSharding(mesh, rows(a))
        return jax.make_array_from_callback(a.shape, where, lambda index: a[index])

    return jax.tree.map(one, batch)


def check(sizes: Sizes, accumulate: int, batch: Any) -> None:
    """ValueError unless every array of a batch, or its shape, can be split."""
    data, seq, _ = sizes
    for name, a in batch.items():
        if a.shape[0] % (data * accumulate):
            parts = f" times accumulate={accumulate}" if accumulate > 1 else ""
            raise ValueError(
                f"batch={a.shape[0]}: expected a multiple of data={data} of "
                f"mesh={tuple(sizes)}{parts}"
            )
        if np.ndim(a) == 2 and a.shape[1] % seq:
            raise ValueError(
                f"length={a.shape[1]} of {name}: expected a multiple of seq={seq} of "
                f"mesh={tuple(sizes)}"
            )


def constrain(tree: Any, fsdp: bool) -> Any:
    """Parameters, or what is shaped like them, laid by `placement` on the mesh in
    force; `tree` itself without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, placement.specs(tree, mesh, fsdp))


def abstract(tree: Any, mesh: Mesh | None, fsdp: bool) -> Any:
    """The shapes of a tree of parameters, each with where it lies."""
    if mesh is None:
        where = jax.tree.map(lambda a: _alone(), tree)
    else:
        where = jax.tree.map(
            lambda s: NamedSharding(mesh, s), placement.specs(tree, mesh, fsdp),
            is_leaf=lambda s: isinstance(s, PartitionSpec),
        )
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where
    )


def whole(tree: Any) -> Any:
    """A copy of `tree` on one device of every host, for what is too small to share."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_put(tree, jax.local_devices()[0])


def sizes_of(mesh: Mesh) -> Sizes:
    """The sizes of data, seq and model of any mesh; 1 where it lacks one."""
    data, seq, model = (mesh.shape.get(name, 1) for name in AXES)
    return data, seq, model


def shapes(batch: Any, mesh: Mesh | None) -> Any:
    """The shapes of a batch, each with where it lies."""
    def one(a):
        where = _alone() if mesh is None else NamedSharding(mesh, rows(a))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    return jax.tree.map(one, batch)


def _alone() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
