"""The index of CAB: cells of measures as one number a task and one a pattern.

mu and sigma are either the benchmark's frozen constants (of its own data and networks,
so that a number with them says little here but what unit it is in) or those of the
attentions that were compared, exact attention among them: three or more, as one alone
is its own mean, and of two one is at +1 and the other at -1 whatever was measured.

Source: Comprehensive Attention Benchmarking (Zhang et al., 2022) arXiv:2210.07661; the
constants are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attn.contract.patterns import PATTERNS
from experiments.measure.cab.suite import FULL, TASKS
from experiments.measure.compositional import compositional_index

Cells = Mapping[tuple[str, str, str], Mapping[str, float]]
Indices = dict[str, dict[str, float | None]]  # by attention
BY_NAME = {task.name: task for task in FULL}
LEAST = {"own": 3, "paper": 1}  # attentions that a measure needs, by reference
# of each pattern the benchmark's mu and sigma, in the order of `measures`
PAPER: dict[str, tuple[list[float], list[float]]] = {
    "NS": ([3.4245, 1.97429, 4.06947, 2.19021, 34.88667, 6.79333, 31.96889, 23.208,
            0.6758, 36.292],
           [0.06832, 0.0361768, 0.09422, 0.03866, 1.39697, 1.41078, 1.31499, 0.27499,
            0.01557, 62.30827]),
    "CS": ([4.08325, 2.20085, 32.9575, 6.0925, 30.2575, 22.26],
           [0.04529, 0.01372, 1.92754, 0.41007, 1.61951, 8.29944]),
    "NC": ([7.7025, 0.24775, 0.7625, 1.18933, 0.80625, 0.47575, 0.511, 0.62025,
            0.58075],
           [0.64789, 0.03366, 0.03906, 0.05615, 0.02193, 0.01057, 0.00601, 0.18948,
            0.10312]),
    "CC": ([5.5037, 2.6278, 31.35, 5.26, 28.8],
           [1.29239, 0.42726, 3.77103, 1.26028, 3.28638]),
}


def measures(pattern: str) -> dict[str, list[tuple[str, str]]]:
    """Of a pattern each task's measures, as (network, measure), in the order of the
    authors' code."""
    found = {}
    for name, networks in TASKS.items():
        own = [(net, one) for net in networks if pattern in BY_NAME[net].patterns
               for one in BY_NAME[net].measures]
        if own:
            found[name] = own
    return found


def index(cells: Cells, pattern: str, attentions: list[str],
          reference: str = "own") -> Indices:
    """Attention -> {task: number, "index": their mean}, of tasks whose measures all are
    there; the index is that of the tasks that all of these attentions have, None where
    they share none. cells: measures by (network, pattern, attention). reference: "own",
    of all attentions that have the measure, three or more, or "paper"."""
    everything = [pair for own in measures(pattern).values() for pair in own]
    # [attentions, measures], nan for what was not run
    table = np.array([[_value(cells, net, pattern, one, name) for net, name
                       in everything] for one in attentions], float)
    sign = np.array([BY_NAME[net].measures[name] for net, name in everything], float)
    there = (~np.isnan(table)).sum(0)  # how many have the measure
    if reference == "paper":
        mu, sigma = (np.array(a) for a in PAPER[pattern])
    else:
        mu, sigma = _moments(table)
    found: Indices = {}
    for one, row in zip(attentions, table):
        groups, names, at = [], [], 0
        for task, own in measures(pattern).items():
            group = [*range(at, at + len(own))]
            group = [n for n in group if there[n] >= LEAST[reference]]
            at += len(own)
            if group and not np.isnan(row[group]).any():
                groups.append(group)
                names.append(task)
        if groups:
            by_task, _ = compositional_index(
                np.nan_to_num(row), np.nan_to_num(mu), sigma, sign, groups)
            found[one] = dict(zip(names, by_task.tolist()))
    shared = [task for task in measures(pattern)
              if all(task in each for each in found.values())]
    for each in found.values():  # means of other tasks could not be compared
        each["index"] = float(np.mean([each[task] for task in shared])
                              ) if shared else None
    return found


def _value(cells: Cells, net: str, pattern: str, one: str, name: str) -> float:
    return float(cells.get((net, pattern, one), {}).get(name, np.nan))


def _moments(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations of columns over what is there; a deviation of 1 where all
    are alike, so that their numbers are 0."""
    there = ~np.isnan(table)
    many = np.maximum(there.sum(0), 1)
    mu = np.where(there, table, 0).sum(0) / many
    square = np.where(there, table - mu[None], 0) ** 2
    sigma = np.sqrt(square.sum(0) / many)
    return mu, np.where(sigma > 1e-12, sigma, 1.0)


def ranked(each: Indices) -> dict[str, float]:
    """Of a pattern the index by attention, of those that have one."""
    return {one: own["index"] for one, own in each.items() if own["index"] is not None}


def rank_correlations(indices: Mapping[str, Indices]) -> dict[str, float]:
    """Spearman's, of the attentions that have an index in both of two patterns, three
    or more: "NS CS" -> a number in -1..1. indices: by pattern and attention."""
    found = {}
    for n, one in enumerate(PATTERNS):
        for other in PATTERNS[n + 1:]:
            a, b = (ranked(indices.get(p, {})) for p in (one, other))
            shared = [name for name in a if name in b]
            if len(shared) >= 3:
                ranks: Any = [np.argsort(np.argsort([i[name] for name in shared]))
                              for i in (a, b)]
                found[f"{one} {other}"] = float(np.corrcoef(*ranks)[0, 1])
    return found
