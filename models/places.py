"""Places: which attention stands at which of the four ways to attend in a network.

A network with an encoder and a decoder attends in up to four ways, which are the
patterns of Comprehensive Attention Benchmarking (Zhang et al., 2022) arXiv:2210.07661
(`attn/contract/patterns.py`): its encoder NS, its decoder CS (or NS, where all of its
answer is written at once), and from decoder to encoder CC (or NC). The benchmark puts
an attention into the places of one pattern and leaves exact attention in the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from attn.contract.patterns import PATTERNS, patterns
from attn.masks import Full
from attn.softmax import Softmax
from models.stack import check_layers, unbound


@dataclasses.dataclass(frozen=True)
class Places:
    """An attention for each pattern; exact attention where nothing is said. Plain data,
    which flax neither binds nor names."""

    NS: Any = Softmax(mask=Full())
    CS: Any = Softmax()
    NC: Any = Softmax()
    CC: Any = Softmax()

    def at(self, pattern: str) -> Any:
        """The attention of a pattern, unbound."""
        return unbound(getattr(self, pattern))


def placed(attention: Any, pattern: str) -> Places:
    """Exact attention everywhere but at the places of `pattern`. ValueError as
    `in_pattern`."""
    return Places(**{pattern: in_pattern(attention, pattern)})


def in_pattern(attention: Any, pattern: str) -> Any:
    """The attention, set so that it has the pattern: as it is, or with the other
    `causal`, or without an order where it has been given no mask. ValueError for one
    that has no such setting, and for a pattern that is none of `PATTERNS`."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r}: expected one of {PATTERNS}")
    check_layers("attention", (attention,))
    for changes in ({}, {"causal": True}, {"causal": False}, {"mask": Full()}):
        known = {f.name for f in dataclasses.fields(attention)}
        chosen = getattr(attention, "mask", None) is not None
        if not changes.keys() <= known or (chosen and "mask" in changes):
            continue  # a mask that was chosen is not taken away
        with contextlib.suppress(ValueError):  # it is not made so
            one = _changed(attention, changes)
            if pattern in patterns(one):
                return one
    raise ValueError(f"{type(attention).__name__} cannot be set to {pattern}: expected "
                     "an attention that `python -m attn` lists with this pattern")


def allows(attention: Any, pattern: str) -> bool:
    """Whether it can be set so that it has the pattern."""
    with contextlib.suppress(ValueError):
        return bool(in_pattern(attention, pattern))
    return False


def _changed(attention: Any, changes: dict[str, Any]) -> Any:
    if hasattr(attention, "clone"):  # a linen module
        return attention.clone(parent=None, **changes)
    return dataclasses.replace(attention, **changes)
