"""Checkpoints: the newest states of a run, each checked when it is read.

A checkpoint is a folder named by its step. Orbax writes it under another name and then
renames it, so that a kill leaves no half of one, and beside the arrays lie their
checksums. What cannot be read, or is not what was written, is passed over in one
sentence for the one before, and stays on the disk under another name.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.training.checksum import checksums
from experiments.training.hosts import say
from experiments.training.record import write_whole

LAST = 2**31 - 1  # steps are counted in int32


class Unreadable(Exception):
    """A checkpoint is not what was written; says why."""


class Checkpoints:
    """The newest `keep` checkpoints of the run in `folder`; none for None. Every host
    writes and reads the parts of arrays that its own devices hold."""

    def __init__(self, folder: pathlib.Path | None, keep: int = 2):
        self.run, self.keep = folder, keep
        self.folder = None if folder is None else (folder / "checkpoints").absolute()
        self.writer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    @property
    def steps(self) -> list[int]:
        """The steps that have a folder, oldest first. Nobody has looked inside."""
        if self.folder is None or not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        found = (int(name) for name in names if name.isascii() and name.isdigit())
        there = {step for step in found if 0 < step <= LAST}
        return sorted(n for n in there if (self.folder / str(n)).is_dir())

    @property
    def latest(self) -> int | None:
        """The newest step, None if there is none."""
        return max(self.steps, default=None)

    @property
    def recorded(self) -> dict[str, Any]:
        """What the run says of itself: the newest step that was saved, and its speed.
        """
        if self.run is None:
            return {}
        try:
            found = json.loads((self.run / "progress.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def save(self, step: int, state: Any, **more: Any) -> None:
        """Writes `state`, a pytree of arrays, under `step`, and then that it is there,
        with what `more` says. ValueError, naming the last good one, if the disk does
        not take it."""
        if self.folder is None or step in self.steps:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writer.save(self.folder / str(step), args=ocp.args.Composite(
                default=ocp.args.StandardSave(state),
                checksums=ocp.args.JsonSave(checksums(state)),
            ))
            self._first_host(lambda: self._kept(step, more))
        except Exception as error:  # orbax and tensorstore raise many kinds
            self._first_host(self._without_halves)
            good = [n for n in self.steps if n < step]
            kept = f"the last one is {max(good)}" if good else "there is none before it"
            raise ValueError(
                f"checkpoint {self.folder}/{step} cannot be written "
                f"({_first_line(error)}): {kept}"
            ) from None

    def _kept(self, step: int, more: dict[str, Any]) -> None:
        assert self.folder is not None and self.run is not None
        record = json.dumps({"step": step} | more)
        write_whole(self.run / "progress.json", record + "\n")
        for old in self.steps[: -self.keep]:
            shutil.rmtree(self.folder / str(old))

    def _without_halves(self) -> None:
        assert self.folder is not None
        for half in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(half, ignore_errors=True)

    def resumed(self, like: Any) -> Any:
        """`restore(like)`; None for a run that has saved nothing yet. ValueError for
        one whose record says that it has."""
        if self.latest is not None:
            return self.restore(like)
        done = self.recorded.get("step", 0)
        if done:
            raise ValueError(
                f"folder={self.run}: its record says that step {done} was saved, but "
                "there is no checkpoint: expected the folder `checkpoints`; to start "
                "anew, name another folder"
            )
        return None

    def restore(self, like: Any) -> Any:
        """The newest state that is what was written, of the shapes, dtypes and
        shardings of `like`. ValueError, naming the newest, if none is."""
        assert self.folder is not None
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        bad: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state, why = self._read(step, like), ""
            except Exception as error:  # orbax and tensorstore raise many kinds
                state, why = None, _first_line(error)
            if _on_all_hosts(state is not None):
                self._passed_over(bad, step)
                return state
            bad[step] = why or "another host cannot read it"
        newest, why = next(iter(bad.items()), (None, "there is none"))
        raise ValueError(
            f"checkpoint {self.folder}/{newest} cannot be read ({why}), nor any before "
            "it: expected one that is whole; to start anew, name another folder"
        )

    def _read(self, step: int, like: Any) -> Any:
        assert self.folder is not None
        found = self.writer.restore(self.folder / str(step), args=ocp.args.Composite(
            default=ocp.args.StandardRestore(like),
            checksums=ocp.args.JsonRestore(),
        ))
        state, written = found["default"], found["checksums"]
        here = checksums(state)
        for path, value in here.items():
            if written.get(path) != value:
                raise Unreadable(f"{path} is not what was written")
        holds = int(getattr(state, "step", step))
        if holds != step:
            raise Unreadable(f"it holds step {holds}")
        return state

    def _passed_over(self, bad: dict[int, str], step: int) -> None:
        """Says which checkpoints were not taken, and moves them out of the way."""
        for n, why in bad.items():
            aside = self._first_host(lambda: self._set_aside(n))
            say(f"checkpoint {self.folder}/{n} cannot be read ({why}) and is kept as "
                f"{aside}: going on from step {step}")
        done = self.recorded.get("step", step)
        if done > max(step, *bad, 0):
            say(f"the checkpoint of step {done} is gone from {self.folder}: going on "
                f"from step {step}")

    def _set_aside(self, step: int) -> str:
        assert self.folder is not None
        for n in range(1000):
            name = f"{step}.damaged" + (f"-{n}" if n else "")
            if not (self.folder / name).exists():
                (self.folder / str(step)).rename(self.folder / name)
                return name
        raise ValueError(f"{self.folder}/{step}.damaged: a thousand of these exist")

    def _first_host(self, act: Callable[[], Any]) -> Any:
        """What `act` gives on the first host, which alone does it; all wait."""
        found = act() if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints")
        return found

    def close(self) -> None:
        """Lets go of what writing needed."""
        self.writer.close()


def _on_all_hosts(holds: bool) -> bool:
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.asarray(holds))))


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:160]
    if isinstance(error, Unreadable):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
