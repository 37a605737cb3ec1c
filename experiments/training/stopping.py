"""Stopping: a run that is asked to end keeps what it has done.

Ctrl-C, and the SIGTERM by which schedulers take a machine back, let the present step
end and its checkpoint be written; only a second Ctrl-C ends at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import Any, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.training.hosts import say

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stop:
    """Whether a run has been asked to end, and by what."""

    def __init__(self):
        self.signal: int | None = None

    def asked(self, step: int) -> bool:
        """Whether to end now that `step` steps are done. On many hosts, which all ask
        at each step, jax lets all of them end at the same one."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = signal.SIGTERM
        return self.signal is not None

    def end(self, step: int, kept: bool) -> None:
        """Ends the program as the signal would have."""
        where = f"the checkpoint of step {step} is kept" if kept else (
            f"{step} steps are lost, as there is no folder"
        )
        say(f"stopped by {NAMES[signal.Signals(self.signal or 0)]}: {where}")
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        say(f"{NAMES[signal.Signals(number)]}: stopping after this step")


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """While it lasts, signals are noted. They are left alone in a thread that is not
    the main one, and on many hosts, where jax listens to SIGTERM."""
    stop, before = Stop(), {}
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
        before = {number: signal.signal(number, stop._note) for number in NAMES}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Whether `minutes` have gone by since it last said so; never for None. On many
    hosts the first one's time counts: all have to ask at the same steps."""

    def __init__(self, minutes: float | None):
        self.minutes, self.since = minutes, time.monotonic()

    def rings(self) -> bool:
        """Asks."""
        if self.minutes is None:
            return False
        late = time.monotonic() - self.since >= 60 * self.minutes
        if jax.process_count() > 1:
            late = bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
        if late:
            self.since = time.monotonic()
        return late
