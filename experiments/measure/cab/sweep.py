"""The sweep of CAB: its trainings one by one, each kept, and what they say together."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.cli import config
from experiments.measure.cab.efficiency import costs, dense, efficiency_length
from experiments.measure.cab.index import (
    Indices, index, rank_correlations, ranked
)
from experiments.measure.cab.task import Task
from experiments.measure.shipped import duration
from experiments.training.cells import cell, kept
from experiments.training.loop import NotFinite
from experiments.training.scanned import train
from models.places import Places, allows, in_pattern, placed


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a task, a pattern, an attention and a seed."""

    task: Task
    pattern: str
    attention: Any
    seed: int

    @property
    def places(self) -> Places:
        """Which attention stands where."""
        return placed(self.attention, self.pattern)

    @property
    def name(self) -> str:
        """Of its file: exact attention is the same network in every pattern."""
        which = "exact" if self.places == Places() else (
            f"{self.pattern} {config.format_value(self.attention)}")
        return f"{self.task.name} {which} {self.seed}"

    def make(self) -> dict[str, Any]:
        """Trains and judges -> measures, loss, seconds; or why there are none."""
        clock = time.perf_counter()
        try:
            model = self.task.network(self.places)
            rows = self.task.drawn("train", self.seed)
            done = train(model, self.task.loss, self.task.inputs, rows,
                         self.task.plan(self.seed))
            found: dict[str, Any] = self.task.judged(
                model, done.params, self.task.drawn("valid", self.seed),
                jax.random.key(self.seed + 1))
        except (NotFinite, NotImplementedError, ValueError) as error:
            return {"failed": str(error), "seconds": time.perf_counter() - clock}
        last = done.losses[-max(1, len(done.losses) // 20):]
        return found | {"loss": float(last.mean()),
                        "seconds": time.perf_counter() - clock}


def late(until: float | None) -> bool:
    """Whether a moment of `time.perf_counter` has come; None never does."""
    return until is not None and time.perf_counter() >= until


def trained(runs: list[Run], folder: pathlib.Path, console: Console,
            until: float | None = None) -> list[tuple[Run, dict]]:
    """What each training gives, or has given in this folder; none is begun when it is
    late."""
    found, clock, fresh = [], time.perf_counter(), 0
    for n, one in enumerate(runs, 1):
        known = kept(folder, one.name)
        if known is None and late(until):
            continue
        made = known or cell(folder, one.name, one.make)[0]
        found.append((one, made))
        if known is None:
            fresh += 1
            jax.clear_caches()  # a process may not hold the programs of all networks
            label = " ".join([one.task.name, one.pattern,
                              config.format_value(one.attention)])
            said = made.get("failed") or ", ".join(
                f"{name} {made[name]:.4g}" for name in one.task.measures)
            each = (time.perf_counter() - clock) / fresh
            rest = duration(each * (len(runs) - n))
            console.print(f"{n}/{len(runs)} {label}: {said}; at most {rest} more",
                          markup=False, highlight=False)
    return found


def measured(config_: Any, folder: pathlib.Path, console: Console,
             until: float | None = None) -> dict[str, dict[str, Any]]:
    """By attention the costs of a layer, and those of exact attention as a matrix, or
    why there are none; no measuring is begun when it is late."""
    found: dict[str, dict[str, Any]] = {}
    if not config_.lengths:
        return found
    sizes = config_.lengths, config_.width, config_.heads, config_.repeats
    for attention in config_.attentions:
        label = config.format_value(attention)
        pattern = "NS" if allows(attention, "NS") else "CS"
        if not allows(attention, pattern):
            continue
        for name, one in ((f"matrix {pattern}", dense(pattern)),
                          (label, in_pattern(attention, pattern))):
            if late(until) and kept(folder, f"cost {name}") is None:
                continue
            found[name], known = cell(
                folder, f"cost {name}", lambda: cost(one, *sizes) | {"of": pattern})
            if not known:
                said = found[name].get("failed") or ", ".join(
                    f"{ms:.1f} ms" for ms in found[name]["ms"])
                console.print(f"cost {name}: {said}", markup=False)
    return found


def cost(attention: Any, *sizes: Any) -> dict[str, Any]:
    """The costs of a layer, or why there are none: what cannot read the lengths that
    are measured costs itself alone."""
    try:
        return dict(costs(attention, *sizes))
    except (NotImplementedError, ValueError) as error:
        return {"failed": str(error)}


def compared(config_: Any, found: list[tuple[Run, dict]],
             spent: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Cells and both indices as medians over seeds, rank correlations and lengths.
    An index is among the networks of its seed; of several seeds "index_seeds", by
    pattern and attention, has the own one of each, where all have one, and
    "correlations_seeds", by pair of patterns, each correlation.
    """
    labels = [config.format_value(a) for a in config_.attentions]
    failed = [f"{one.name}: {made['failed']}" for one, made in found
              if "failed" in made]
    failed += [f"cost {name}: {one['failed']}" for name, one in spent.items()
               if "failed" in one]
    cells = medians(found)
    seeds = sorted({one.seed for one, _ in found})
    alone = [medians([(one, made) for one, made in found if one.seed == seed])
             for seed in seeds]
    each = {which: [{p: index(one, p, labels, which) for p in config_.patterns}
                    for one in alone] for which in ("own", "paper")}
    indices = {which: {p: middle([one[p] for one in many]) for p in config_.patterns}
               for which, many in each.items()}
    lengths, done = {}, {n: one for n, one in spent.items() if "failed" not in one}
    for label in labels:
        exact = done.get(f"matrix {done[label]['of']}") if label in done else None
        if exact is not None:
            lengths[label] = {
                what: efficiency_length(config_.lengths, exact[what],
                                        done[label][what], what == "ms")
                for what in ("ms", "mb")}
    rows = [{"task": task, "pattern": pattern, "attention": label} | values
            for (task, pattern, label), values in cells.items()]
    result = {"rows": rows, "own": indices["own"], "paper": indices["paper"],
              "correlations": rank_correlations(indices["own"]), "lengths": lengths,
              "costs": spent, "measured_at": list(config_.lengths), "failed": failed}
    if len(seeds) > 1:
        result["index_seeds"] = {
            p: _all([ranked(one[p]) for one in each["own"]]) for p in config_.patterns}
        result["correlations_seeds"] = _all(list(map(rank_correlations, each["own"])))
    return result


def medians(found: list[tuple[Run, dict]]) -> dict[tuple[str, str, str], dict]:
    """Measures by (network, pattern, attention), the medians of those that did not
    fail."""
    by_key: dict[tuple[str, str, str], list[dict]] = {}
    for one, made in found:
        if "failed" not in made:
            key = one.task.name, one.pattern, config.format_value(one.attention)
            by_key.setdefault(key, []).append(made)
    return {key: {name: float(np.median([one[name] for one in each]))
                  for name in each[0]} for key, each in by_key.items()}


def middle(each: list[Indices]) -> Indices:
    """The medians over the seeds that have a number; None where none has."""
    found: Indices = {}
    for name in dict.fromkeys(name for one in each for name in one):
        rows = [one[name] for one in each if name in one]
        found[name] = {}
        for task in dict.fromkeys(task for row in rows for task in row):
            numbers = [n for row in rows if (n := row.get(task)) is not None]
            found[name][task] = float(np.median(numbers)) if numbers else None
    return found


def _all(each: list[dict[str, float]]) -> dict[str, list[float]]:
    """The values of the names that all have."""
    return {name: [one[name] for one in each] for name in each[0]
            if all(name in one for one in each)}
