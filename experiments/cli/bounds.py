"""Bounds: which numbers a field of a Config takes, as its `option` says."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from experiments.cli.fields import hints

STEPS = 2**31 - 1  # steps of a training are counted in int32


def check_bounds(config: Any) -> None:
    """ValueError unless every number of a config is within the bounds of its field."""
    cls: Any = type(config)
    known = hints(cls)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        check_number(field, value, known.get(field.name, Any), field.name)


def check_number(field: dataclasses.Field, value: Any, hint: Any, where: str) -> None:
    """ValueError unless the value of a field, a number or several in a tuple, is within
    its bounds: `least` and `most` of whole numbers, `above` of any."""
    least, most, above = (field.metadata.get(n) for n in ("least", "most", "above"))
    for one in value if isinstance(value, tuple) else (value,):
        if one is None:
            continue
        if above is not None and not above < one < math.inf:
            raise ValueError(f"{where}={value}: expected a finite number above {above}")
        if least is None or not _is_whole(hint):
            continue
        if not least <= one <= (math.inf if most is None else most):
            end = "" if most is None else f", at most {most}"
            raise ValueError(f"{where}={value}: expected {least} or more{end}")


def options(hint: Any) -> tuple:
    """The types that a value may have."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_whole(hint: Any) -> bool:
    """Whether a field takes whole numbers alone, one or a tuple of them, or None."""
    many = typing.get_origin(hint) is tuple
    kinds = {*typing.get_args(hint)} - {...} if many else {*options(hint)}
    return kinds <= {int, type(None)}
