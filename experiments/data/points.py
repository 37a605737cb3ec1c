"""Points in the unit square, and what is asked of them: their convex hull, Delaunay's
triangles, the shortest tour (Vinyals et al., 2015, arXiv:1506.03134).

Indices count from 1, in the order of the points; 0 ends an answer. Hulls and triangles
are scipy's, tours are exact up to 10 points (Held and Karp, 1962) and beyond that the
best of all nearest-neighbour starts after 2-opt, which the figures then say.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import spatial

from experiments.data.dataset import Batch, Dataset

TASKS = "hull", "delaunay", "tsp"
DIRECTIONS = "plane", "index"
EXACT = 10  # points up to which a tour is exact


def hull(points: np.ndarray) -> np.ndarray:
    """The hull of points [n,2], counter-clockwise from its lowest index on."""
    found = spatial.ConvexHull(points).vertices
    return np.roll(found, -int(found.argmin())) + 1


def area(corners: np.ndarray) -> float:
    """The area of a simple polygon [m,2]."""
    x, y = corners.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def simple(corners: np.ndarray) -> bool:
    """Whether no two sides of a polygon [m,2] cross: those that are no neighbours."""
    m = len(corners)
    if m < 3:
        return False
    sides = [(corners[i], corners[(i + 1) % m]) for i in range(m)]
    return not any(
        _cross(*sides[i], *sides[j]) for i in range(m) for j in range(i + 2, m)
        if (i, j) != (0, m - 1))


def _turn(a, b, c) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _cross(a, b, c, d) -> bool:
    return _turn(a, b, c) * _turn(a, b, d) < 0 and _turn(c, d, a) * _turn(c, d, b) < 0


def delaunay(points: np.ndarray) -> np.ndarray:
    """Delaunay's triangles [m,3] of points [n,2]: each in rising order, all in the
    order of their incenters, x before y."""
    found = np.sort(spatial.Delaunay(points).simplices, 1)
    corners = points[found]  # [m,3,2]
    # the side that faces a corner is its weight
    sides = np.linalg.norm(
        np.roll(corners, -1, 1) - np.roll(corners, -2, 1), axis=2, keepdims=True)
    center = (sides * corners).sum(1) / sides.sum(1)
    return found[np.lexsort(center.T[::-1])] + 1


def held_karp(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [B] and shortest tours [B,n] of points [B,n,2]: from point 1 on, in the
    direction whose second index is below the last one."""
    b, n, _ = points.shape
    far = distances(points)
    if n < 3:
        order = np.tile(np.arange(1, n + 1), (b, 1))
        return length(points, order), order
    m = n - 1  # point 1 is no part of the sets
    best = np.full((b, 1 << m, m), np.inf)
    came = np.zeros((b, 1 << m, m), int)
    for j in range(m):
        best[:, 1 << j, j] = far[:, 0, j + 1]
    for many in range(1, 1 << m):
        for j in range(m):
            rest = many ^ (1 << j)
            if not many >> j & 1 or not rest:
                continue
            # over the point before j, of the rest
            total = best[:, rest] + far[:, 1:, j + 1]
            came[:, many, j] = total.argmin(1)
            best[:, many, j] = total.min(1)
    total = best[:, -1] + far[:, 1:, 0]
    rows, backwards = np.arange(b), [total.argmin(1)]
    left = np.full(b, (1 << m) - 1)
    for _ in range(m - 1):
        before = came[rows, left, backwards[-1]]
        left = left ^ (1 << backwards[-1])
        backwards.append(before)
    tour = np.stack([np.zeros(b, int), *(a + 1 for a in reversed(backwards))], 1) + 1
    return length(points, one_way(tour)), one_way(tour)


def one_way(tour: np.ndarray) -> np.ndarray:
    """Tours [B,n] in the direction whose second index is below the last one."""
    other = np.concatenate([tour[:, :1], tour[:, :0:-1]], 1)
    return np.where(tour[:, 1:2] < tour[:, -1:], tour, other)


def leftwards(points: np.ndarray, tour: np.ndarray) -> np.ndarray:
    """A closed tour [n] of points [n,2] counter-clockwise, from its first point on. The
    shortest tours cross nowhere, so they have one such direction."""
    x, y = points[tour - 1].T
    twice = x @ np.roll(y, -1) - y @ np.roll(x, -1)  # its area, above 0 to the left
    return tour if twice >= 0 else np.append(tour[:1], tour[:0:-1])


def distances(points: np.ndarray) -> np.ndarray:
    """[...,n,n] of points [...,n,2]."""
    return np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1)


def length(points: np.ndarray, tour: np.ndarray) -> np.ndarray:
    """Lengths [B] of closed tours [B,n] of indices from 1."""
    at = np.take_along_axis(points, tour[..., None] - 1, 1)
    return np.linalg.norm(at - np.roll(at, -1, 1), axis=2).sum(1)


def two_opt(points: np.ndarray) -> np.ndarray:
    """A short tour [n] of points [n,2]: the best of all nearest-neighbour starts, parts
    of which are turned round as long as that makes it shorter."""
    far, n = distances(points), len(points)
    found = min((_improved(_nearest(far, start), far) for start in range(n)),
                key=lambda tour: far[tour, np.roll(tour, -1)].sum())
    found = np.roll(found, -int(np.argmin(found)))[None] + 1
    return one_way(found)[0]


def _nearest(far: np.ndarray, start: int) -> np.ndarray:
    tour, left = [start], set(range(len(far))) - {start}
    while left:
        tour.append(min(left, key=lambda j: far[tour[-1], j]))
        left.remove(tour[-1])
    return np.array(tour)


def _improved(tour: np.ndarray, far: np.ndarray) -> np.ndarray:
    n, better = len(tour), True
    while better:
        better = False
        for i in range(n - 1):
            for j in range(i + 2, n if i else n - 1):
                a, b, c, d = tour[i], tour[i + 1], tour[j], tour[(j + 1) % n]
                if far[a, c] + far[b, d] < far[a, b] + far[c, d] - 1e-12:
                    tour[i + 1:j + 1] = tour[i + 1:j + 1][::-1].copy()
                    better = True
    return tour


def steps_of(task: str, n: int) -> int:
    """The most steps of an answer for n points, its end included."""
    # a hull and a tour are closed; there are 2 n - 2 triangles less one for each corner
    # of the hull, which are three or more
    return 3 * (2 * n - 5) + 1 if task == "delaunay" else n + 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points(Dataset):
    """Lists of `least` to `length` points and the answers of `task`: points [B,n,2]
    float32 uniform in the unit square, there [B,n] bool, targets [B,steps] int32, -1
    behind the end 0. A hull and a tour end with their first point again.

    direction: of tours; "plane" is counter-clockwise, as hulls are; "index" has the
    second index below the last one, which says nothing of where the points lie.
    """

    length: int = 10
    least: int = 5
    task: str = "hull"
    direction: str = "plane"

    def __post_init__(self):
        super().__post_init__()
        self.require("task", self.task in TASKS, f"one of {TASKS}")
        self.require("direction", self.direction in DIRECTIONS, f"one of {DIRECTIONS}")
        self.require("least", 3 <= self.least <= self.length,
                     f"3 or more, at most length={self.length}")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        counts = rng.integers(self.least, self.length + 1, size)
        points = rng.uniform(size=(size, self.length, 2)).astype(np.float32)
        there = np.arange(self.length) < counts[:, None]
        targets = np.full((size, steps_of(self.task, self.length)), -1, np.int32)
        for row, answer in zip(targets, self.answers(points, counts)):
            row[:len(answer) + 1] = [*answer, 0]
        points = np.where(there[..., None], points, 0)
        return {"points": points, "there": there, "targets": targets}

    def answers(self, points: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """The indices of each row."""
        own = [p[:n].astype(np.float64) for p, n in zip(points, counts)]
        if self.task == "delaunay":
            return [delaunay(one).reshape(-1) for one in own]
        found = [hull(one) for one in own] if self.task == "hull" else tours(own)
        if self.task == "tsp" and self.direction == "plane":
            found = [leftwards(one, tour) for one, tour in zip(own, found)]
        return [np.append(one, one[0]) for one in found]


def tours(rows: list[np.ndarray]) -> list[np.ndarray]:
    """A tour of each of the rows [n,2], those of one length together."""
    found: dict[int, np.ndarray] = {}
    for n in {len(one) for one in rows}:
        at = [i for i, one in enumerate(rows) if len(one) == n]
        if n > EXACT:
            found |= {i: two_opt(rows[i]) for i in at}
            continue
        found |= dict(zip(at, held_karp(np.stack([rows[i] for i in at]))[1]))
    return [found[i] for i in range(len(rows))]
