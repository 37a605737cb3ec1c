"""Provenance: what a result was made by, when, and of what."""

from __future__ import annotations

import datetime
import pathlib
import subprocess
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]


def provenance(command: str, seeds: list[int]) -> dict[str, Any]:
    """command, seeds, date, commit, jax and device, as plain text and numbers."""
    return {
        "command": command, "seeds": seeds,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": commit(), "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s)",
    }


def commit() -> str:
    """The commit that is checked out, with + if files differ from it; "unknown" where
    there is none."""
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True,
            timeout=20, check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def sentence(found: dict[str, Any]) -> str:
    """The same in words."""
    seeds = found["seeds"]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else (
        f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}"
    )
    return (f"{which}; {found['date']}; commit {found['commit']}; jax {found['jax']}; "
            f"{found['device']}")
