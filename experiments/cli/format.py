"""Format: the text of a value, which `experiments.cli.parse` reads back.

Only fields that differ from their default are shown, a mask as its expression, and a
tuple that repeats as `(A, B) * 2` where that is shorter.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np

from experiments.cli.fields import default, required, written_fields

# of the mask classes that have a symbol: the symbol and how tightly it binds
SYMBOLS = {"Or": (" | ", 1), "And": (" & ", 2)}
NOT, ATOM = 3, 4


def format_value(value: Any) -> str:
    """The text of a value: parse(format_value(value)) == value.

    Raises ValueError for what has no text: arrays, functions, objects of other classes.
    """
    if isinstance(value, np.generic) and type(value.item()) in (bool, int, float, str):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return repr(value)
    if isinstance(value, pathlib.Path):
        return repr(str(value))
    if type(value) is tuple:
        return _tuple([format_value(v) for v in value])
    if type(value) is list:
        return "[" + ", ".join(map(format_value, value)) + "]"
    if type(value) is dict:
        items = (f"{format_value(k)}: {format_value(v)}" for k, v in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, type):
        return _type(value)
    if dataclasses.is_dataclass(value):
        return _mask(value)[0]
    kind = type(value).__name__
    raise ValueError(f"{value!r} of type {kind} cannot be written in a config")


def _type(value: type) -> str:
    if dataclasses.is_dataclass(value):
        return value.__name__
    if isinstance(getattr(value, "dtype", None), np.dtype) or issubclass(
        value, np.generic
    ):
        return f"jnp.{np.dtype(value).name}"
    raise ValueError(f"{value.__name__} cannot be written in a config: expected a "
                     "dataclass or an element type of jnp")


def _tuple(items: list[str]) -> str:
    """The shortest of: all items, a period repeated, runs of equal items added up."""
    forms = [_items(items), *_sum(items)]
    n = len(items)
    for period in range(1, n // 2 + 1):
        if n % period == 0 and items == items[:period] * (n // period):
            part = items[:period]
            inner = [_items(part), *(f"({text})" for text in _sum(part))]
            forms.append(f"{min(inner, key=len)} * {n // period}")
            break
    return min(forms, key=len)


def _items(items: list[str]) -> str:
    return "(" + ", ".join(items) + ("," if len(items) == 1 else "") + ")"


def _sum(items: list[str]) -> list[str]:
    """`(A,) * 3 + (B, C)`, if there are runs of equal items, and other items too."""
    parts: list[str] = []
    single: list[str] = []
    for item, run in [(k, len(list(g))) for k, g in itertools.groupby(items)]:
        if run == 1:
            single.append(item)
            continue
        parts += [_items(single)] * bool(single) + [f"({item},) * {run}"]
        single = []
    parts += [_items(single)] * bool(single)
    return [" + ".join(parts)] if len(parts) > 1 else []


def _mask(value: Any) -> tuple[str, int]:
    """A dataclass's text, and how tightly its outermost symbol binds."""
    name = type(value).__name__ if type(value).__module__ == "attn.masks" else ""
    if name in SYMBOLS:
        symbol, level = SYMBOLS[name]
        left, right = _bind(value.a, level), _bind(value.b, level + 1)
        return left + symbol + right, level
    if name == "Not":
        return "~" + _bind(value.a, NOT), NOT
    return _fields(value), ATOM


def _bind(value: Any, level: int) -> str:
    text, own = _mask(value)
    return text if own >= level else f"({text})"


def _fields(value: Any) -> str:
    shown = []
    every = written_fields(type(value))
    # a single value that must be given goes without its name: Window(256), Sink(4)
    must = [f for f in every if required(f)]
    first = must[0].name if must and must == every[:1] and not every[0].kw_only else ""
    for field in every:
        own = getattr(value, field.name)
        if required(field) or not same(own, default(field)):
            name = "" if field.name == first else f"{field.name}="
            shown.append(name + format_value(own))
    return f"{type(value).__name__}({', '.join(shown)})"


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal and of the same type: 1 is not True."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(np.all(a == b))
