"""Sharding: sequence parallelism is a mesh axis.

A mesh has the axes `data` (batch), `seq` (tokens) and `model` (heads). Everything that
a shard must know about its place, head numbers, decays, positions and segments, is made
in the global view and handed in by letters, so that no code asks where it is.
"""

from __future__ import annotations

import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

HOME = {"B": "data", "H": "model", "K": "model"}
Axis = str | tuple[str, ...]  # several axes are one, the first the slowest
TILE = 1024  # float32 numbers of a vector register of a TPU


def mesh_of(axis: Axis):
    """The mesh in force. ValueError if there is none or it lacks `axis`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        raise ValueError(
            f"axis={axis!r} but there is no mesh: expected `with jax.set_mesh(mesh):`"
        )
    for name in names_of(axis):
        if name not in mesh.axis_names:
            raise ValueError(
                f"axis={axis!r}: expected one of the mesh's {mesh.axis_names}"
            )
    return mesh


def names_of(axis: Axis) -> tuple[str, ...]:
    """The names of the mesh axes that `axis` stands for."""
    return (axis,) if isinstance(axis, str) else tuple(axis)


def devices_of(axis: Axis | None) -> int:
    """Over how many devices the mesh in force splits `axis`; 1 for None."""
    if axis is None:
        return 1
    mesh = mesh_of(axis)
    return math.prod(mesh.shape[name] for name in names_of(axis))


def spec(letters: str, axis: Axis) -> PartitionSpec:
    """How an array lies on the mesh: "BTHD" -> (data, axis, model, None)."""
    names = mesh_of(axis).axis_names
    # letters without a home (D, V, E, ...) are whole on every device
    homes = {c: a for c, a in HOME.items() if a in names} | {"T": axis, "S": axis}
    return PartitionSpec(*(homes.get(c) for c in letters))


def home(letter: str, length: int, axis: Axis | None) -> str:
    """`letter` where the mesh can split so many, `.` where every device has them all.
    """
    if axis is None:
        return letter
    devices = mesh_of(axis).shape.get(HOME.get(letter, ""), 1)
    return "." if length % devices else letter


def check_groups(heads: int, axis: Axis | None) -> None:
    """Raises ValueError if the mesh cannot split so many key heads, where each has a
    group of query heads that belong together."""
    if home("K", heads, axis) == ".":
        raise ValueError(
            f"K={heads} key heads, whose groups choose together, cannot be split over "
            "the mesh axis 'model': expected a multiple of its devices"
        )


def over_mesh(f: Callable, letters: str, axis: Axis | None) -> Callable:
    """`f` on the shards of its arguments; `f` itself when `axis` is None.

    letters: "BTHD BSKD -> BTHV": one word an argument (None arguments and pytrees of
    one form are allowed), `.` for an axis that every device holds whole; several
    results are several words behind the arrow. ValueError if a length is not divisible.
    """
    if axis is None:
        return f
    mesh_of(axis)  # raises before anything is traced
    ins, outs = (side.split() for side in letters.split(" -> "))
    out_specs = tuple(spec(word, axis) for word in outs)

    def sharded(*arrays: Any):
        for word, array in zip(ins, arrays, strict=True):
            _check_divisible(word, array, axis)
        in_specs = tuple(spec(word, axis) for word in ins)
        return jax.shard_map(
            f,
            in_specs=in_specs,
            out_specs=out_specs if len(outs) > 1 else out_specs[0],
            check_vma=False,  # custom gradients and kernels do not say what varies
        )(*(_laid(a, where) for a, where in zip(arrays, in_specs)))

    return sharded


def _laid(tree: Any, where: PartitionSpec) -> Any:
    """Arrays that lie as `where` says, of a mesh whose types say how arrays lie."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return tree

    def lay(a):
        return jax.sharding.reshard(a, PartitionSpec(*where[:a.ndim]))

    return jax.tree.map(lay, tree)


def _check_divisible(word: str, array: Any, axis: Axis) -> None:
    for leaf in jax.tree.leaves(array):
        for letter, size, name in zip(word, leaf.shape, spec(word, axis)):
            if size % (devices := devices_of(name)):
                raise ValueError(
                    f"{letter}={size} cannot be split over the {devices} "
                    f"devices of mesh axis {name!r}: expected a multiple"
                )


def gather(a: Any, axis: Axis | None, dim: int = 1) -> Any:
    """Every shard's part of `a` along `dim`, in order; `a` itself without an axis."""
    if axis is None or a is None:
        return a
    return jax.lax.all_gather(a, axis, axis=dim, tiled=True)


def stacked(tree: Any, axis: Axis) -> Any:
    """Every shard's arrays, in order [W,...], by one all-gather: they travel as one
    array of float32, which holds the halves of int32 exactly."""
    leaves, form = jax.tree.flatten(tree)
    if len(leaves) == 1 and leaves[0].dtype == jnp.float32:
        return jax.tree.unflatten(form, [jax.lax.all_gather(leaves[0], axis)])
    # one message instead of one a leaf
    flat = [part.reshape(-1) for a in leaves for part in _floats(a)]
    # rows of whole tiles: others are not gathered on TPU, but added up in zeros
    flat.append(jnp.zeros((-sum(a.size for a in flat) % TILE,), jnp.float32))
    found = jax.lax.all_gather(jnp.concatenate(flat), axis)
    parts, at = [], 0
    for a in leaves:
        halves = []
        for _ in _floats(a):
            # [W,size] -> [W,...]
            halves.append(found[:, at:at + a.size].reshape(-1, *a.shape))
            at += a.size
        parts.append(_restored(halves, a.dtype))
    return jax.tree.unflatten(form, parts)


def _floats(a: jax.Array) -> tuple[jax.Array, ...]:
    if jnp.issubdtype(a.dtype, jnp.integer):
        # each half is below 2^16, and float32 counts to 2^24
        a = a.astype(jnp.int32)
        return (a >> 16).astype(jnp.float32), (a & 0xFFFF).astype(jnp.float32)
    return (a.astype(jnp.float32),)


def _restored(halves: list, dtype) -> jax.Array:
    if len(halves) == 1:
        return halves[0].astype(dtype)
    high, low = (a.astype(jnp.int32) for a in halves)
    return ((high << 16) | low).astype(dtype)


def splits(axis: Axis | None, length: int) -> Axis | None:
    """`axis` if it can split `length` tokens. None if not, and for a single token: such
    a step is made in the global view."""
    return None if length == 1 or length % devices_of(axis) else axis


def spread_heads(
    a: jax.Array, heads: int, axis: Axis | None, swapped: Axis | None = None
) -> jax.Array:
    """k or v [B,S,K,.] repeated, if K is too small for the mesh, to as few heads as its
    axis `model`, and the one that heads are `swapped` over, can split; heads is H."""
    if axis is None:
        return a
    model = mesh_of(axis).shape.get("model", 1)
    devices = model * devices_of(swapped)
    if a.shape[2] % devices == 0:
        return a
    # the fewest copies: K r heads that divide H and that the devices divide
    repeat = next(
        (r for r in range(1, heads // a.shape[2] + 1)
         if heads % (a.shape[2] * r) == 0 and (a.shape[2] * r) % devices == 0),
        None,
    )
    if repeat is None:
        beside = f" and the {devices // model} of {swapped!r}" if swapped else ""
        raise ValueError(
            f"H={heads} heads cannot be split over the {model} devices of mesh axis "
            f"'model'{beside}: expected a multiple"
        )
    return jnp.repeat(a, repeat, axis=2)  # [B,S,K,.] -> [B,S,K r,.]
