"""Which trainings CAB asks for, and in which order."""

from __future__ import annotations

from typing import Any

from experiments.measure import seeds
from experiments.measure.cab.sweep import Run
from experiments.measure.cab.task import Task
from models.places import allows, in_pattern


def grid(config_: Any) -> tuple[list[Run], list[str]]:
    """The trainings, seed by seed, and what a task refuses, in sentences."""
    runs, refused = [], []
    for one in seeds.each(config_):
        for task, pattern in asked(config_):
            for attention in config_.attentions:
                if not allows(attention, pattern):
                    continue
                try:
                    if pattern == "CS":
                        task.check(in_pattern(attention, pattern))
                except ValueError as error:
                    refused.append(str(error))
                    continue
                runs.append(Run(task, pattern, attention, one.seed))
    return runs, list(dict.fromkeys(refused))


def asked(config_: Any) -> list[tuple[Task, str]]:
    """Tasks and patterns: a task of each pattern before the second one of any, so that
    what there is time for says something of all patterns."""
    ranks: dict[str, list[Task]] = {pattern: [] for pattern in config_.patterns}
    for task in config_.suite:
        for pattern in task.patterns:
            if pattern in ranks:
                ranks[pattern].append(task)
    most = max(map(len, ranks.values()))
    return [(each[n], pattern) for n in range(most) for pattern, each in ranks.items()
            if n < len(each)]
