"""Pointing: how good answers are that are indices of points: hulls, tours, triangles
(the measures of Vinyals et al., 2015, arXiv:1506.03134).

`lists` is a batch of `experiments.data.points.Points`, answers are [B,steps] indices
from 1, 0 at the end and behind it.
"""

from __future__ import annotations

import numpy as np

from experiments.data import points as data


def of_hull(lists: dict, answers: np.ndarray) -> dict[str, float]:
    """accuracy, area and failed of hulls [B,steps]."""
    right, areas, failed = [], [], 0
    for points, targets, answer in zip(lists["points"], lists["targets"], answers):
        want, have = (_polygon(a) for a in (targets, answer))
        right.append(_same(want, have))
        if not data.simple(points[have - 1]):
            failed += 1
            continue
        areas.append(data.area(points[have - 1]) / data.area(points[want - 1]))
    area = float(np.mean(areas)) if areas else 0.0
    return {"accuracy": float(np.mean(right)), "area": area,
            "failed": failed / len(answers)}


def _polygon(indices: np.ndarray) -> np.ndarray:
    """The corners of an answer, without the end and the first one's return."""
    found = indices[indices > 0]
    return found[:-1] if len(found) > 1 and found[-1] == found[0] else found


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two polygons are one, begun anywhere and in either direction."""
    if len(a) != len(b):
        return False
    return any((np.roll(way, n) == a).all() for way in (b, b[::-1])
               for n in range(len(b)))


def of_tsp(lists: dict, answers: np.ndarray) -> dict[str, float]:
    """length of tours [B,steps], optimal (of 2-opt beyond 10 points), random: of the
    points as they come."""
    points = lists["points"].astype(np.float64)
    n = points.shape[1]
    own, best = answers[:, :n], lists["targets"][:, :n]
    straight = np.tile(np.arange(1, n + 1), (len(points), 1))
    return {name: float(data.length(points, tour).mean()) for name, tour in (
        ("length", own), ("optimal", best), ("random", straight))}


def of_delaunay(lists: dict, answers: np.ndarray) -> dict[str, float]:
    """accuracy and covered of triangles [B,steps]."""
    right, covered = [], []
    for targets, answer in zip(lists["targets"], answers):
        want, have = (_triples(a) for a in (targets, answer))
        right.append(want == have)
        covered.append(len(want & have) / len(want))
    return {"accuracy": float(np.mean(right)), "covered": float(np.mean(covered))}


def _triples(indices: np.ndarray) -> set[tuple[int, ...]]:
    found = indices[indices > 0]
    return {tuple(sorted(map(int, one)))
            for one in found[:len(found) // 3 * 3].reshape(-1, 3)}


SCORES = {"hull": of_hull, "tsp": of_tsp, "delaunay": of_delaunay}
