"""Cells: a sweep as many small results, each in a file of its own.

What a run has finished stays in its folder, so that the same command goes on where it
was killed.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from experiments.training.record import write_whole


def slug(text: str) -> str:
    """A text as the name of a file: its letters and digits, and of what is long or has
    others a digest."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")[:60]
    if plain == text:
        return text
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def kept(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
    """What the folder has of a cell; None for nothing, or what is damaged."""
    try:
        found = json.loads(_path(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def cell(folder: pathlib.Path, name: str, make: Callable[[], dict[str, Any]]
         ) -> tuple[dict[str, Any], bool]:
    """(what `make` gives, whether it was there already): plain numbers and texts, kept
    as folder/cells/NAME.json."""
    found = kept(folder, name)
    if found is not None:
        return found, True
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = make()
    write_whole(path, json.dumps(made, indent=1) + "\n")
    return made, False


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "cells" / f"{slug(name)}.json"
