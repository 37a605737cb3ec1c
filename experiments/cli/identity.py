"""Identity: what a run depends on, so that another run is told apart from it.

Settings count, and of a text its content; where the text lies, where results go, how
loud a run is and what is done with it afterwards do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.cli.format import format_value

FIXED, GROWS, FREE = "fixed", "grows", "free"


def settings(config: Any) -> dict[str, Any]:
    """Field -> the text of its value, which has to be the same for a run to go on, or a
    number, which may have grown. A text is named by a digest of its content."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = field.metadata.get("run", FIXED)
        if kind == GROWS:
            found[field.name] = int(value)
        elif kind == FIXED:
            text = format_value(_anywhere(value))
            found[field.name] = " ".join([text, *_digests(value)])
    return found


def _anywhere(value: Any) -> Any:
    """`value` without the places that texts in it lie at."""
    if hasattr(type(value), "anywhere"):
        return value.anywhere()
    if isinstance(value, tuple):
        return tuple(map(_anywhere, value))
    changed = {}
    for name, own in _fields(value):
        plain = _anywhere(own)
        if plain is not own and not isinstance(own, tuple):
            changed[name] = plain
    return dataclasses.replace(value, **changed) if changed else value


def _digests(value: Any) -> Iterator[str]:
    if hasattr(type(value), "digest"):
        yield value.digest()
    elif isinstance(value, tuple):
        for one in value:
            yield from _digests(one)
    for _, own in _fields(value):
        yield from _digests(own)


def _fields(value: Any) -> list[tuple[str, Any]]:
    """The fields of a dataset, which may hold another one."""
    if isinstance(value, type) or not hasattr(type(value), "batch"):
        return []
    return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
