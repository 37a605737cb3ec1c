"""Fields: what an attention is made of, held against what is declared, in one way.

A field that is out of range, of another type or an array would show itself late, as a
message of something else, or never. `check_fields(self, ...)` in `__post_init__` says
it in one sentence.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attn.contract.dispatch import DENSE, IMPLEMENTATIONS

# what fields of these names are in every attention
LEAST = {"chunk": 1}
SHARES = ("dropout",)  # in [0, 1)
NOT_ZERO = ("scale",)
NOTHING: Mapping = {}


def check_fields(
    owner: Any,
    *,
    least: Mapping[str, float] = NOTHING,
    above: Mapping[str, float] = NOTHING,
    choices: Mapping[str, tuple] = NOTHING,
    infinite: tuple[str, ...] = (),
) -> None:
    """Raises ValueError for a field that is not what its class declares.

    Types are those of the annotations: int, float, bool, str, Mask, None. least, above:
    {field: bound}; choices: {field: what it may be}; infinite: fields that may be. None
    is held against nothing but its type.
    """
    name = type(owner).__name__
    for field in dataclasses.fields(owner):
        if field.name in ("parent", "name"):  # of a linen module
            continue
        value = getattr(owner, field.name)
        _check_type(f"{name}: {field.name}", str(field.type), value)
        if value is None or isinstance(value, bool):
            continue
        # infinity may be allowed, a NaN never is
        if isinstance(value, numbers.Real):
            finite = math.isfinite(value) or field.name in infinite
            _refuse(finite and value == value, name, field.name, value,
                    "a finite number")
        if field.name in NOT_ZERO:
            _refuse(value != 0, name, field.name, value,
                    "a number other than 0, or None")
        if field.name in SHARES:
            _refuse(0 <= value < 1, name, field.name, value, "in [0, 1)")
    for key, bound in {**LEAST, **least}.items():
        given: Any = getattr(owner, key, None)
        _refuse(given is None or given >= bound, name, key, given, f"{bound} or more")
    for key, bound in above.items():
        value = getattr(owner, key)
        _refuse(value is None or value > bound, name, key, value, f"above {bound}")
    known = dict(choices)
    if getattr(owner, "implementation", None) not in (*IMPLEMENTATIONS, DENSE):
        known["implementation"] = IMPLEMENTATIONS
    for key, allowed in known.items():
        value = getattr(owner, key)
        _refuse(value in allowed, name, key, repr(value), f"one of {allowed}")


def _refuse(right: bool, name: str, field: str, value: Any, expected: str) -> None:
    if not right:
        raise ValueError(f"{name}: {field}={value}: expected {expected}")


def _check_type(what: str, declared: str, value: Any) -> None:
    """Raises ValueError unless the value is of the declared type, as far as that is one
    of those that are known here."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{what} is traced, but fields are static: there is no gradient by one; "
            "multiply q by a factor, or add a bias, instead"
        )
    words = [word.strip() for word in declared.split("|")]
    if "Mask" in words:
        _check_mask(what, value, "None" in words)
        return
    if hasattr(value, "shape") and len(value.shape) > 0:
        raise ValueError(
            f"{what} is an array of shape {tuple(value.shape)}: expected {declared}. "
            "Attentions are made first and called then: "
            f"{what.partition(':')[0]}()(q, k, v)"
        )
    known = {"int": _whole, "float": _real, "bool": _truth, "str": _text}
    if not all(word in known or word == "None" for word in words):
        return
    fits = (word == "None" and value is None or word in known and known[word](value)
            for word in words)
    if not any(fits):
        raise ValueError(f"{what}={value!r}: expected {declared}")


def _check_mask(what: str, value: Any, optional: bool) -> None:
    # told by what it can say: masks stand beside this file, not below it
    said = hasattr(value, "bounds") and hasattr(value, "reach")
    if said and not isinstance(value, type) or value is None and optional:
        return
    if said:
        raise ValueError(f"{what}={value.__name__}: expected {value.__name__}(...)")
    if hasattr(value, "shape"):
        raise ValueError(
            f"{what} is an array of shape {tuple(value.shape)}: expected a Mask, which "
            "is a predicate on positions. Booleans are given to the call, "
            f"{what.partition(':')[0]}()(q, k, v, mask=array)"
        )
    raise ValueError(
        f"{what}={value!r}: expected a Mask, such as Causal() & Window(256)"
    )


def _whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not _truth(value)


def _real(value) -> bool:
    return isinstance(value, (float, np.floating)) or _whole(value)


def _truth(value) -> bool:
    return isinstance(value, (bool, np.bool_))


def _text(value) -> bool:
    return isinstance(value, str)
