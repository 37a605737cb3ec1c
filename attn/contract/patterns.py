"""Patterns: which of the four ways to attend an attention has, as it is set.

Keys come from the queries' own tokens (self) or from another sequence (cross), and what
a query gets may depend on queries behind it or not (noncausal, causal):

    NS noncausal self    CS causal self    NC noncausal cross    CC causal cross

Of a context all tokens are seen, in CC too: there causal says that no query has a part
in what an earlier one gets. Nothing is stored twice: the answer follows from what the
contract knows, `causal` or the mask, `crosses`, `mixes` and `of_context`. An attention
counts as causal by what it reads; where the choice of that follows later tokens, its
`ahead` says so (`ACT`, `Seer`, `Routing`, `FlexPrefill`).

Source: Comprehensive Attention Benchmarking (Zhang et al., 2022) arXiv:2210.07661.
"""

from __future__ import annotations

from typing import Any

from attn.contract.attention import said

PATTERNS = ("NS", "CS", "NC", "CC")


def ordered(attention: Any) -> bool:
    """Whether no token sees a later one of its own sequence, as it is set."""
    visible = getattr(attention, "visible", None)  # of exact attention
    return bool(said(attention, "causal") if visible is None else visible.causal)


def of_context(attention: Any) -> Any | None:
    """The attention as it reads a context, all of it; None for one that does not."""
    if not said(attention, "crosses"):
        return None
    if hasattr(attention, "of_context"):
        try:
            attention = attention.of_context()
        except ValueError:  # it has no form that sees all keys
            return None
    return None if ordered(attention) else attention


def patterns(attention: Any) -> tuple[str, ...]:
    """What it supports as it is set, some of `PATTERNS`, in their order."""
    found = {"CS" if ordered(attention) else "NS"}
    reads = of_context(attention)
    if reads is not None:
        found |= {"NC"} if said(reads, "mixes") else {"NC", "CC"}
    return tuple(name for name in PATTERNS if name in found)
