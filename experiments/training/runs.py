"""Runs: each has a folder of its own, and what is on disk is never overwritten.

A folder holds what it is a run of, its metrics as JSON lines and its checkpoints. A run
that was stopped goes on when the same command names the folder again.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import shlex
from typing import Any

from experiments.training.checkpoints import Checkpoints
from experiments.training.hosts import agreed, say
from experiments.training.record import Metrics, locked, read_lines, write_whole

__all__ = [
    "Checkpoints", "Metrics", "locked", "new_folder", "open_folder", "read_lines",
    "write_whole",
]
# where, how loud and how far, but not what
ELSEWHERE = ("--mesh", "--fsdp", "--quiet", "--folder")
RECORD = "attn_run.json"  # a folder that has it is a run, not a part of a text
Settings = dict[str, Any]


def new_folder(name: str, root: str = "results") -> pathlib.Path:
    """Makes results/<name>-<date>-<time>, with a number behind it if that is taken."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for n in range(1000):
        folder = pathlib.Path(root) / (f"{name}-{stamp}" + (f"-{n}" if n else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.parent.is_dir():
                continue
            raise ValueError(f"folder {folder} cannot be made: {root} is a file"
                             ) from None
        except OSError as error:
            why = error.strerror
            raise ValueError(f"folder {folder} cannot be made: {why}") from None
        return folder
    raise ValueError(f"folder {root}/{name}-{stamp}: a thousand of these exist")


def open_folder(
    name: str, folder: str | pathlib.Path | None, command: str,
    settings: Settings | None = None,
) -> pathlib.Path:
    """The folder of a run: a new one, or `folder`, which must be empty, absent or from
    the same run. ValueError otherwise. On many hosts the first one opens it for all.

    settings: what the run depends on, a text for each name, or a number for what may
    have been less before (`experiments.cli.identity`). Without them two runs are the
    same if their commands are, but for where and how loud.
    """
    return pathlib.Path(agreed(lambda: str(_opened(name, folder, command, settings))))


def _opened(name, folder, command: str, settings: Settings | None) -> pathlib.Path:
    path = new_folder(name) if folder is None else _made(folder)
    with locked(path, alone=True):  # ends at once if another process runs here
        record = _record(path)
        if record is None:
            if any(file.name[0] != "." for file in path.iterdir()):
                raise ValueError(
                    f"folder={folder} holds other files: expected an empty folder"
                )
        else:
            why = _differs(record, command, settings)
            if why:
                there = str(record.get("command", "")).strip()
                raise ValueError(
                    f"folder={folder} holds another run ({why}; {there}): expected the "
                    "same command, or another folder"
                )
        note = {"command": command.strip(), "settings": settings}
        if note != record:
            write_whole(path / RECORD, json.dumps(note, indent=1) + "\n")
    return path


def _made(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder with this name, which is made if it is not there."""
    try:
        path = pathlib.Path(folder).expanduser()
        str(path).encode()  # a name that is no text could not be written down
        is_file = path.exists() and not path.is_dir()
        if not is_file:
            path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        shown = repr(str(folder))  # it may have letters that cannot be printed
        raise ValueError(f"folder={shown} cannot be made: {why}") from None
    if is_file:
        raise ValueError(f"folder={folder}: this is a file, expected a folder")
    return path


def _record(path: pathlib.Path) -> dict[str, Any] | None:
    """What the run in this folder wrote of itself, None if there is none."""
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"folder={path}: {RECORD} is damaged: expected what the run "
                         "wrote, or another folder")
    return found


def _differs(record: dict, command: str, settings: Settings | None) -> str:
    """In what a run differs from the one of a record; "" if in nothing."""
    old = record.get("settings")
    if not isinstance(old, dict) or settings is None:
        same = _work(str(record.get("command", ""))) == _work(command)
        return "" if same else "its command is another one"
    for name in sorted({*old, *settings}):
        was, now = old.get(name), settings.get(name)
        if isinstance(was, int) and isinstance(now, int):
            if now < was:
                return f"{name}={was} there, {now} here is less"
            if now > was:
                more = (
                    f"what was planned over {was} (warm-up, decay of the rate) is "
                    "planned over them all from here" if name == "steps"
                    else "what is there is kept")
                say(f"{name}={was} becomes {now}: {more}")
        elif was != now:
            return f"{name} is {was} there, {now} here"
    return ""


def _work(command: str) -> list[str]:
    """The words of a command that say what is computed."""
    words = shlex.split(command)
    return [word for word in words if word.partition("=")[0] not in ELSEWHERE]
