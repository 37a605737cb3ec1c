"""The compositional index: one number of measures whose units differ.

Each score is measured in deviations sigma from the mean mu of the methods compared,
better ones being positive; a task is the mean of its measures, the index the mean of
its tasks. mu and sigma are constants that are frozen with a benchmark.

Source: Comprehensive Attention Benchmarking (Zhang et al., 2022) arXiv:2210.07661.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np


def compositional_index(
    scores: np.ndarray, mu: np.ndarray, sigma: np.ndarray, sign: np.ndarray,
    tasks: Sequence[Sequence[int]],
) -> tuple[np.ndarray, float]:
    """(a number a task, the index) of scores [n], with mu and sigma [n]; sign [n]: 1
    where more is better, else -1; tasks: the measures of each by their number."""
    shapes = {a.shape for a in (scores, mu, sigma, sign)}
    if len(shapes) > 1 or not (sigma > 0).all():
        raise ValueError(
            f"scores, mu, sigma and sign have shapes {sorted(shapes)}, least sigma "
            f"{sigma.min()}: expected one shape and deviations above 0"
        )
    z = sign * (scores - mu) / sigma
    by_task = np.array([z[list(task)].mean() for task in tasks])
    return by_task, float(by_task.mean())
