"""All cases of a place, those first that say most."""

from __future__ import annotations

import importlib

from experiments.measure.device import (
    best_tiles, cached, candidates, crossing, exact, exact_fast, layers, memories,
    recurrent, suite, torch_peers
)
from experiments.measure.device.case import Case
from experiments.measure.device.place import Place

SOURCES = (exact.right_cases, recurrent.cases, cached.cases, memories.cases,
           exact_fast.cases, candidates.cases, layers.cases, torch_peers.cases,
           crossing.cases, suite.cases, best_tiles.cases)


def cases(place: Place, extra: str | None = None) -> dict[str, Case]:
    """By name, in the order in which they are run; those of a module `extra` first."""
    sources = [source for source in SOURCES]
    if extra:
        sources = [importlib.import_module(extra).cases]
    found = [case for source in sources for case in source(place)]
    names = [case.name for case in found]
    assert len({*names}) == len(names), "two cases have one name"
    return {case.name: case for case in sorted(found, key=lambda case: case.tier)}
