"""Torus: an order of the chips of a pod in which each is joined to the next.

A ring's keys go from every shard to the next one. Counted row by row, as arrays are,
the last chip of a row is far from the first of the next; a tour that ends where it
began has only steps of one link. On TPU v5e nothing else is sent beside computing:
libtpu (0.0.52) compiles a permutation between neighbours as one that is begun and
waited for later, and every other as one that is waited for at once.
"""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np


def toured(placed: np.ndarray) -> np.ndarray:
    """Devices [data, seq, model], with those along `seq` in an order in which each is
    one link from the next, the last from the first too where their grid allows it. As
    they are where devices have no coordinates, or do not fill a grid along `seq`."""
    line = placed[0, :, 0]
    if len(line) < 3 or not hasattr(line[0], "coords"):
        return placed
    coords = np.array([_place(d) for d in line])
    order = tour(coords)
    return placed if order is None else placed[:, order]


def tour(coords: np.ndarray) -> np.ndarray | None:
    """An order of points [N, dimensions] that fill a grid, as `toured` says; None if
    they do not fill one."""
    ways = [np.unique(c) for c in coords.T]
    extent = tuple(len(w) for w in ways if len(w) > 1)
    if math.prod(extent) != len(np.unique(coords, axis=0)) or len(coords) != math.prod(
        extent
    ):
        return None
    inner = [np.searchsorted(w, c) for w, c in zip(ways, coords.T) if len(w) > 1]
    rank = {tuple(int(c) for c in point): n for n, point in enumerate(zip(*inner))}
    return np.array([rank[point] for point in _cycle(extent)])


def _cycle(extent: Sequence[int]) -> list[tuple[int, ...]]:
    """All points of a grid, from each to a neighbour and back to the first, if a length
    is even."""
    even = [n for n, length in enumerate(extent) if length % 2 == 0]
    if len(extent) == 1 or not even:
        return _path(extent)
    # to and fro through lines along an even dimension, but for their first point: by
    # these it goes home
    first = even[0]
    rest = _path([length for n, length in enumerate(extent) if n != first])
    there = range(extent[first])
    points = [(a, b) for a in there for b in _way(range(1, len(rest)), a)]
    points += [(a, 0) for a in reversed(there)]
    return [rest[b][:first] + (a,) + rest[b][first:] for a, b in points]


def _path(extent: Sequence[int]) -> list[tuple[int, ...]]:
    """All points of a grid, from each to a neighbour."""
    points: list[tuple[int, ...]] = [()]
    for length in extent:
        points = [
            p + (c,) for n, p in enumerate(points) for c in _way(range(length), n)
        ]
    return points


def _way(line: range, turn: int) -> Sequence[int]:
    return line if turn % 2 == 0 else line[::-1]


def _place(device) -> tuple[int, ...]:
    return (*device.coords, getattr(device, "core_on_chip", 0))
