"""Placing: which layers of a model a policy of a cache stands in, at each budget."""

from __future__ import annotations

import inspect

from attn.softmax import Softmax
from experiments.measure import cache_budgets, head_choice
from experiments.measure.asked import Reader
from experiments.measure.cache_budgets import HEADED
from models.swap import swapped


class LeftOut(Exception):
    """A policy that the layers of a model have no place for, and why."""


def of_policy(
    name: str, reader: Reader, shares: tuple[float, ...], steps: int, facts: int
) -> list:
    """(share, model) of a policy at each share, in the layers of exact attention that
    see everything; of a model without one in all of exact attention, with their
    windows. LeftOut where it cannot stand; steps, facts: of the training of Duo."""
    model = reader.model
    everything = head_choice.exact_layers(model)
    layers = len(everything) or sum(isinstance(a, Softmax) for a in model.attention)
    if not layers or name in HEADED and not everything:
        raise LeftOut("no layer of the model is exact attention that sees everything")
    found = of_heads(name, reader, shares, steps, facts) if name in HEADED else (
        cache_budgets.settings(name, shares, reader.length, layers))
    kind = type(found[0][1][0])
    if model.sinks and "sink" not in inspect.signature(kind.__call__).parameters:
        raise LeftOut(f"the model has sinks, and {kind.__name__} takes none")
    try:
        return [(share, head_choice.placed(model, entries) if everything
                 else swapped(model, entries, None)) for share, entries in found]
    except ValueError as reason:  # it has no place for a softcap or a window
        raise LeftOut(str(reason)) from None


def of_heads(
    name: str, reader: Reader, shares: tuple[float, ...], steps: int, facts: int
) -> list:
    """(share, one attention for each exact layer that sees everything) of Razor or Duo
    at each share, of these layers, with heads that are chosen on the model."""
    known: tuple = ()
    if name == "Razor":
        known = head_choice.razor_scores(reader)
    else:
        known = head_choice.duo_gates(reader, steps, facts),
    return [cache_budgets.headed(name, share, reader.length, known)
            for share in shares]
