"""The record of the compile matrix, matrix.json, with its page; and what is worse than
it."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from typing import Any

from pallas_kernels.matrix.metrics import GROWS
from pallas_kernels.matrix.report import page

HERE = pathlib.Path(__file__).parents[1]
RECORD, PAGE = HERE / "matrix.json", HERE / "MATRIX.md"
SLACK = 1.05  # how much more of anything a check allows
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "tokamax")


def read() -> dict[str, Any]:
    """The record, as it is kept."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"cases": {}}


def write(found: dict[str, Any]) -> None:
    """Writes matrix.json and MATRIX.md."""
    there = {d.name for d in importlib.metadata.distributions()}
    versions = {n: importlib.metadata.version(n) for n in PACKAGES if n in there}
    new = {"versions": versions, "cases": dict(sorted(found.items()))}
    RECORD.write_text(json.dumps(new, indent=1) + "\n")
    PAGE.write_text(page(new))


def worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What got worse from one record to the next, a line each; peers may change."""
    lines = []
    for name, before in old.items():
        after = new.get(name)
        if after is None or before.get("peer"):
            continue
        for kind in ("error", "refused"):
            if kind in after and kind not in before:
                lines.append(f"{name}: {kind}: {after[kind]}")
        for kernel, was in before.get("kernels", {}).items():
            now = after.get("kernels", {}).get(kernel)
            # Mosaic GPU leaves nothing of a kernel that an earlier case had compiled
            gone = now is None and "kernels" in after
            if gone and not {"mosaic", "blackwell"} & set(name.split()):
                lines.append(f"{name}: {kernel}: is no longer there")
            for figure in GROWS if now else ():
                # a figure that was 0 may not appear
                if now.get(figure, 0) > was.get(figure, 0) * SLACK:
                    lines.append(f"{name}: {kernel}: {figure} {was.get(figure, 0)} -> "
                                 f"{now[figure]}")
    return lines


def unrecorded(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Errors of cases that the record does not have, a line each."""
    return [f"{name}: error: {found['error']}" for name, found in new.items()
            if name not in old and "error" in found and not found.get("peer")]
