"""Tensors: how what stands in a file becomes parameters, and back.

An `Entry` is a group of tensors that belongs to a group of parameters: most are one to
one; a fused projection is one tensor of several kernels, experts are many of one. Files
keep a matrix as [out,in], flax as [in...,out...], so a kernel [E,H,D] is the transpose
of a file's [H D,E]. Nothing is rounded: what is written is what was read.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, NamedTuple, Sequence

import jax.numpy as jnp
import numpy as np

Shapes = Sequence[tuple[int, ...]]


class Entry(NamedTuple):
    """names: of the tensors; paths: of the parameters, with slashes.

    read(arrays, shapes): the parameters of these shapes; an array is read from the file
    when its index is asked for. write(arrays): the tensors, of jax arrays. fits:
    whether the shapes of a file's tensors will do where they are not those that `write`
    gives. optional: a file that has none of them will do.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    read: Callable[[Sequence[np.ndarray], Shapes], list[np.ndarray]]
    write: Callable[[Sequence[Any]], list[Any]]
    fits: Callable[[Shapes, Shapes], bool] | None = None
    optional: bool = False


def fused(
    name: str, paths: Sequence[str], inputs: int = 1, groups: int = 1,
    transposed: bool = True,
) -> Entry:
    """One matrix [out,in] that holds the outputs of several kernels: of each of
    `groups` groups first those of the first kernel, and so on. inputs: how many axes of
    a kernel are inputs, 0 for biases. transposed=False: the matrix is [in,out]."""
    return Entry(
        (name,), tuple(paths),
        functools.partial(_split, inputs, groups, transposed),
        functools.partial(_joined, inputs, groups, transposed),
    )


def _split(inputs, groups, transposed, arrays, shapes) -> list[np.ndarray]:
    a = arrays[0]
    a = a if transposed or not inputs else a.T  # [out,in]
    sizes = [math.prod(shape[inputs:]) // groups for shape in shapes]
    a = a.reshape(groups, sum(sizes), -1)  # [groups,outputs of a group,in]
    parts = np.split(a, np.cumsum(sizes)[:-1], 1)
    return [part.reshape(-1, part.shape[-1]).T.reshape(shape)
            for part, shape in zip(parts, shapes)]


def _joined(inputs, groups, transposed, arrays) -> list[Any]:
    rows = []
    for a in arrays:
        flat = a.reshape(math.prod(a.shape[:inputs]), -1).T  # [out,in]
        rows.append(flat.reshape(groups, -1, flat.shape[1]))
    whole = jnp.concatenate(rows, 1).reshape(-1, rows[0].shape[2])
    if not inputs:
        return [whole.reshape(-1)]
    return [whole if transposed else whole.T]


def kernel(name: str, path: str, inputs: int = 1, transposed: bool = True) -> Entry:
    """The matrix `name` [out,in] of the kernel `path` [in...,out...]."""
    return fused(name, [path], inputs, 1, transposed)


def linear(
    name: str, path: str, inputs: int = 1, bias: bool = False, transposed: bool = True
) -> list[Entry]:
    """A projection: its weight, and its bias if it has one."""
    weight = kernel(f"{name}.weight", f"{path}/kernel", inputs, transposed)
    return [weight] + ([flat(f"{name}.bias", f"{path}/bias")] if bias else [])


def flat(name: str, path: str, shape: tuple[int, ...] = (-1,)) -> Entry:
    """The same numbers in another shape; `shape`: that of the file's tensor."""
    return Entry((name,), (path,), _reshaped,
                 functools.partial(_shaped, shape))


def _reshaped(arrays, shapes) -> list[np.ndarray]:
    return [arrays[0].reshape(shapes[0])]


def _shaped(shape, arrays) -> list[Any]:
    return [arrays[0].reshape(shape)]


def same(name: str, path: str) -> Entry:
    """A tensor that is a parameter as it stands."""
    return Entry((name,), (path,), _kept, _unchanged)


def _kept(arrays, shapes) -> list[np.ndarray]:
    return [arrays[0]]


def _unchanged(arrays) -> list[Any]:
    return list(arrays)


def norm(name: str, path: str, bias: bool = False) -> list[Entry]:
    """A norm's scale, over one axis or two, and its bias if it has one."""
    scale = flat(f"{name}.weight", f"{path}/scale")
    return [scale] + ([flat(f"{name}.bias", f"{path}/bias")] if bias else [])


def stacked(names: Sequence[str], path: str) -> Entry:
    """Matrices [out,in], one an expert, as one kernel [N,in,out]."""
    return Entry(tuple(names), (path,), _stack, _unstack)


def _stack(arrays, shapes) -> list[np.ndarray]:
    first = arrays[0]
    whole = np.empty(shapes[0], first.dtype)
    for n in range(len(whole)):  # one expert at a time
        whole[n] = (arrays[n] if n else first).T
    return [whole]


def _unstack(arrays) -> list[Any]:
    return [arrays[0][n].T for n in range(arrays[0].shape[0])]


def alternating(name: str, paths: Sequence[str]) -> Entry:
    """One tensor [...,2F] whose last axis has the channels of two parameters [...,F] in
    turns."""
    return Entry((name,), tuple(paths), _unzip, _zip)


def _unzip(arrays, shapes) -> list[np.ndarray]:
    a = arrays[0]
    return [a[..., 0::2], a[..., 1::2]]


def _zip(arrays) -> list[Any]:
    a = jnp.stack(list(arrays), -1)  # [...,F,2]
    return [a.reshape(*a.shape[:-2], -1)]
