"""The record of a run: one JSON file, whole at any moment, that the next one goes on.
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

from experiments.training.record import write_whole

NAME = "device.json"
Row = dict[str, Any]


class Record:
    """What is known of a place: `place`, and a row for each case that was done."""

    def __init__(self, folder: pathlib.Path, place: dict[str, Any]):
        """Opens the folder's record. One of another device, other versions or another
        source is kept beside it, under a name of its own."""
        self.path, self.place = folder / NAME, place
        self.rows: dict[str, Row] = {}
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text())
            there, rows = found["place"], found["rows"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path} is damaged: expected what a run wrote, or "
                             "another --folder") from None
        if there == place:
            self.rows = rows
        else:
            self.path.rename(self.path.with_name(f"device-{time.time_ns()}.json"))

    def keep(self, row: Row) -> None:
        """Adds a row, and writes it at once."""
        self.rows[row["name"]] = row
        text = json.dumps({"place": self.place, "rows": self.rows}, indent=1)
        write_whole(self.path, text + "\n")
