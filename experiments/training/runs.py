"""Runs: each has a folder of its own, and what is on disk is never overwritten.

A folder holds the command that made it, its metrics as JSON lines and its checkpoints.
A run that was stopped goes on when the same command names the folder again.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import shlex
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.training.hosts import agreed

ELSEWHERE = ("--mesh", "--fsdp", "--quiet")  # where and how loud, but not what


def new_folder(name: str, root: str = "results") -> pathlib.Path:
    """Makes results/<name>-<date>-<time>, with a number behind it if that is taken."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for n in range(1000):
        folder = pathlib.Path(root) / (f"{name}-{stamp}" + (f"-{n}" if n else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            why = error.strerror
            raise ValueError(f"folder {folder} cannot be made: {why}") from None
        return folder
    raise ValueError(f"folder {root}/{name}-{stamp}: a thousand of these exist")


def open_folder(name: str, folder: str | None, command: str) -> pathlib.Path:
    """The folder of a run: a new one, or `folder`, which must be empty, absent or from
    the same command, on whatever mesh. ValueError otherwise. On many hosts the first
    one opens it for all."""
    return pathlib.Path(agreed(lambda: str(_opened(name, folder, command))))


def _opened(name: str, folder: str | None, command: str) -> pathlib.Path:
    path = new_folder(name) if folder is None else pathlib.Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder={folder}: this is a file, expected a folder")
    path.mkdir(parents=True, exist_ok=True)
    note = path / "command.txt"
    if note.exists():
        if _work(note.read_text()) != _work(command):
            raise ValueError(
                f"folder={folder} holds another run ({note.read_text().strip()}): "
                "expected the same command, or another folder"
            )
    elif any(path.iterdir()):
        raise ValueError(f"folder={folder} holds other files: expected an empty folder")
    else:
        note.write_text(command.strip() + "\n")
    return path


def _work(command: str) -> list[str]:
    """The words of a command that say what is computed."""
    words = shlex.split(command)
    return [word for word in words if word.partition("=")[0] not in ELSEWHERE]


class Metrics:
    """Metrics as JSON lines, one object a line, each with its `step`."""

    def __init__(self, path: pathlib.Path | None, step: int = 0):
        self.path, self.rows = path, []
        if path is not None and path.exists():
            # what was written after the checkpoint will be written again
            self.rows = [row for row in read_lines(path) if row["step"] <= step]
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, **row: Any) -> None:
        """Appends one line and keeps it."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Checkpoints:
    """The newest checkpoints of a run: plain arrays, written by orbax under a temporary
    name and then renamed, so that a kill leaves no half of one under a step's name.
    Every host writes and reads the parts of arrays that its own devices hold."""

    def __init__(self, folder: pathlib.Path | None, keep: int = 2):
        self.folder = None if folder is None else (folder / "checkpoints").absolute()
        self.manager = None
        if self.folder is not None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            )
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The newest step, None if there is none."""
        return None if self.manager is None else self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes `state`, a pytree of arrays, under `step`."""
        if self.manager is not None and step != self.latest:
            self.manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any:
        """The newest state, of the shapes, dtypes and shardings of `like`. ValueError,
        naming the checkpoint, if it cannot be read."""
        assert self.manager is not None
        step = self.latest
        try:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            return self.manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # orbax and tensorstore raise many kinds
            older = [n for n in self.manager.all_steps() if n != step]
            then = f"go on from step {max(older)}" if older else "start anew"
            reason = str(error).strip().splitlines()[0][:160] if str(error) else ""
            raise ValueError(
                f"checkpoint {self.folder}/{step} cannot be read "
                f"({type(error).__name__}: {reason}): remove that folder to {then}"
            ) from None

    def close(self) -> None:
        """Waits for what is being written."""
        if self.manager is not None:
            self.manager.close()
