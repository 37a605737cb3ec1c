"""Placement: which device keeps which part of a model's parameters.

A mesh has the axes `data`, `seq` and `model`. Tensor parallelism (Shoeybi et al., 2019)
arXiv:1909.08053 splits heads, hidden channels and the vocabulary over `model`. What is
left of a matrix is split over all other devices, those along the tokens too, as in ZeRO
(Rajbhandari et al., 2019) arXiv:1910.02054, and gathered where a layer needs it.

Rules go by the end of a parameter's path and by its shape, so the moments of an
optimiser, which end in the same path, lie where their parameters do.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from typing import Any, Iterator

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from attn.contract.attention import Attention, noisy
from attn.layers import Layer
from attn.parallel.sharding import Axis

# letters of the axes of a parameter, by the end of its path: H heads, F channels within
# a layer, N ids of the vocabulary or experts are split over `model`; E, D, R (a rank),
# T (tokens) and W (taps) are not. These are the parameters of networks; those of
# attentions and layers stand in their classes, as `parameter_axes`
RULES = {
    "embed/embedding": "NE", "head/kernel": "EN", "head/bias": "N",
    "mlp/gate/kernel": "EF", "mlp/up/kernel": "EF", "mlp/out/kernel": "FE",
    "mlp/shared/gate/kernel": "EF", "mlp/shared/up/kernel": "EF",
    "mlp/shared/out/kernel": "FE",
    # whole experts; what is left of them may be split over other devices
    "mlp/experts/gate_kernel": "NEE", "mlp/experts/up_kernel": "NEE",
    "mlp/experts/out_kernel": "NEE", "mlp/experts/*_bias": "NE",
    "channels_*/[vu]/kernel": "EF", "channels_*/out/kernel": "FE",
}
SPLIT = "HFN"
SMALL = 1024  # a matrix with fewer numbers is not worth a message


def specs(tree: Any, mesh: Any, fsdp: bool = True) -> Any:
    """The PartitionSpec of every leaf of `tree`, parameters or what is shaped like
    them; leaves need a shape only. mesh: concrete or abstract. fsdp: split over `data`
    and `seq` too, not over `model` alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: spec(_name(path), a.shape, mesh, fsdp), tree
    )


def spec(name: str, shape: tuple[int, ...], mesh: Any, fsdp: bool = True):
    """Where the parameter `name`, a path with slashes, lies.

    With fsdp the largest axis that is left and can be split is split over the mesh axes
    that are left. Vectors and matrices below `SMALL` numbers stay whole.
    """
    homes: list = list(tensor_spec(name, shape, mesh))
    homes += [None] * (len(shape) - len(homes))  # trailing None was trimmed
    if not fsdp or len(shape) < 2 or math.prod(shape) < SMALL:
        return _trimmed(homes)
    for axes in _groups(mesh, taken="model" in homes):
        devices = math.prod(mesh.shape[name] for name in axes)
        free = [n for n, home in enumerate(homes)
                if home is None and shape[n] % devices == 0]
        if free:
            # of those that are left, the longest
            at = max(free, key=lambda n: shape[n])
            homes[at] = axes if len(axes) > 1 else axes[0]
            break
    return _trimmed(homes)


def tensor_spec(name: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """How the parameter `name` lies while its layer computes: over `model` alone.

    Whole if the axis that `model` would split is not a multiple: heads of k and v that
    are fewer than the devices, which every device then computes and takes its own from.
    """
    devices, letters = mesh.shape.get("model", 1), letters_of(name, shape)
    if letters is None or devices == 1:
        return PartitionSpec()
    return _trimmed([
        "model" if letter in SPLIT and size % devices == 0 else None
        for letter, size in zip(letters, shape)
    ])


def letters_of(name: str, shape: tuple[int, ...]) -> str | None:
    """The axes of the parameter `name`, None if no class says them."""
    for pattern, letters in rules():
        if len(letters) == len(shape) and fnmatch.fnmatch(f"/{name}", f"*/{pattern}"):
            return letters
    return None


def rules() -> Iterator[tuple[str, str]]:
    """(end of a path, letters) of all that is imported: `RULES`, then what layers say,
    and what attentions say, whose parameters lie in their layer under `attention`."""
    yield from RULES.items()
    for cls in _subclasses(Layer):
        yield from cls.parameter_axes.items()
    for cls in _subclasses(Attention):
        for pattern, letters in cls.parameter_axes.items():
            yield f"attention/{pattern}", letters


def _subclasses(cls: Any) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def table(tree: Any, mesh: Any, fsdp: bool = True) -> str:
    """A line for each leaf of `tree`: name, shape, spec, bytes a device; and the sum.

    >>> print(table(jax.eval_shape(model.init, key, tokens), mesh))
    """
    rows = [("parameter", "shape", "over", "bytes a device")]
    total = 0
    for path, a in jax.tree_util.tree_leaves_with_path(tree):
        where = spec(_name(path), a.shape, mesh, fsdp)
        size = device_bytes(a, where, mesh)
        total += size
        shape = "x".join(map(str, a.shape)) or "-"
        rows.append((_name(path), shape, _written(where), f"{size:,}"))
    rows.append(("sum", "", "", f"{total:,}"))
    wide = [max(len(row[n]) for row in rows) for n in range(4)]
    return "\n".join(
        f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:<{wide[2]}}  {d:>{wide[3]}}"
        for a, b, c, d in rows
    )


def device_bytes(a: Any, where: PartitionSpec, mesh: Any) -> int:
    """Bytes of `a`, an array or its shape, that one device of the mesh holds."""
    parts = math.prod(mesh.shape[name] for name in _names(where))
    return a.size * a.dtype.itemsize // parts


def lay(x: jax.Array, letters: str) -> jax.Array:
    """`x` itself, laid on the mesh in force: "BTE" is over data, seq and not at all;
    N, the ids of a vocabulary, is over model. Axes that are no multiple, and everything
    where there is no mesh, are left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return x
    homes = {"B": "data", "T": "seq", "N": "model", "H": "model", "F": "model"}
    free = PartitionSpec.UNCONSTRAINED

    def where(letter, size):
        if letter not in homes:
            return None
        # of an axis that the mesh lacks: size % (size + 1) is never 0
        fits = size % mesh.shape.get(homes[letter], size + 1) == 0
        return homes[letter] if fits else free

    homes_of = [where(*pair) for pair in zip(letters, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*homes_of))


def over(model: Any, axis: Axis, strict: bool = True) -> Any:
    """`model` with the tokens of every attention split over the mesh axis `axis`, but
    for attentions that name an axis themselves. A `Layer` without an attention, such as
    a short convolution, is left to the compiler. NotImplementedError for an attention
    that has no `axis`, unless not `strict`: then it, and one that drops weights, stays.
    """
    if "attention" not in getattr(model, "__dataclass_fields__", {}):
        return model
    found = model.attention
    many = isinstance(found, (tuple, list))
    new = tuple(_split(a, axis, strict) for a in (found if many else (found,)))
    return _replaced(model, attention=new if many else new[0])


def _split(attention: Any, axis: Axis, strict: bool) -> Any:
    if isinstance(attention, Layer):
        return over(attention, axis, strict)
    has = hasattr(attention, "axis")
    if strict and not has:
        raise NotImplementedError(
            f"{type(attention).__name__} cannot be split over mesh axis {axis!r}: "
            "expected an attention with a field `axis`, or one device along it"
        )
    if not has or attention.axis is not None or noisy(attention) and not strict:
        return attention
    return _replaced(attention, axis=axis)


def _replaced(value: Any, **fields: Any) -> Any:
    if isinstance(value, nn.Module):
        return value.clone(**fields)
    return dataclasses.replace(value, **fields)


def _groups(mesh: Any, taken: bool) -> list[tuple[str, ...]]:
    """The sets of mesh axes that may hold a parameter, the most devices first."""
    names = [n for n in mesh.axis_names
             if mesh.shape[n] > 1 and not (taken and n == "model")]
    found = [group for size in range(1, len(names) + 1)
             for group in itertools.combinations(names, size)]
    return sorted(found, key=lambda g: -math.prod(mesh.shape[n] for n in g))


def _name(path: tuple) -> str:
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
        for key in path
    )


def _names(where: PartitionSpec) -> list[str]:
    homes = [home for home in where if home is not None]
    return [n for home in homes for n in (home if isinstance(home, tuple) else (home,))]


def _trimmed(homes: list) -> PartitionSpec:
    while homes and homes[-1] is None:
        homes = homes[:-1]
    return PartitionSpec(*homes)


def _written(where: PartitionSpec) -> str:
    names = ("-" if home is None else home if isinstance(home, str) else "+".join(home)
             for home in where)
    return ", ".join(names) or "whole"
