"""Record: what a run writes of itself, whole at any moment, and by whom.

Files are written beside their place and moved there, so that a kill or a full disk
leaves the old content or the new one. A folder that is in use is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from typing import Any, Iterator

from experiments.training.hosts import agreed, say

HELD: dict[pathlib.Path, int] = {}  # folders that this process has locked, how often


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file at once: beside its place, then moved there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path | None, alone: bool = False) -> Iterator[None]:
    """While it lasts, no other process can lock `folder`; a process that dies lets go.
    ValueError, naming who has it, if it is taken. On many hosts, which all have to
    call this, the first one locks it for all; `alone`: this host asks no other."""
    files: list[Any] = []
    if folder is not None:
        path = folder.resolve()
        if alone:
            _locked(path, files)
        else:
            agreed(lambda: _locked(path, files))
    try:
        yield
    finally:
        if files:
            HELD[path] -= 1
            for file in filter(None, files):
                file.close()


def _locked(path: pathlib.Path, files: list) -> str:
    """Locks `path` and puts the file that holds the lock into `files`: None if this
    process has it already."""
    if HELD.get(path, 0):
        HELD[path] += 1
        files.append(None)
        return ""
    file = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
    except BlockingIOError:
        assert file is not None
        file.seek(0)
        who = file.read(200) or "another process"
        file.close()
        raise ValueError(f"folder={path} is in use by {who}: expected a folder of its "
                         "own for each run, or to wait") from None
    except OSError as error:
        if file is None:
            raise ValueError(f"folder={path}: {error.strerror}: expected one that can "
                             "be written") from None
        say(f"folder={path} cannot be locked here ({error.strerror}): expected no "
            "other run in it")
    HELD[path] = 1
    files.append(file)
    return ""


class Metrics:
    """Metrics as JSON lines, one object a line, each with its `step`."""

    def __init__(self, path: pathlib.Path | None, step: int = 0):
        self.path, self.rows = path, []
        if path is not None and path.exists():
            # what was written after the checkpoint will be written again
            found = read_lines(path)
            self.rows = [row for row in found if row["step"] <= step]
            if found and not step:
                say(f"{path} has rows up to step {found[-1]['step']}, but nothing was "
                    "saved: starting anew")
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            if text != path.read_text(encoding="utf-8", errors="replace"):
                write_whole(path, text)

    def add(self, **row: Any) -> None:
        """Appends one line and keeps it."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. A last line cut short by a kill is left out; so is
    any other that is damaged, which is said."""
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif row is not None and n < len(lines):
            say(f"line {n} of {path} is damaged and left out")
    return rows
