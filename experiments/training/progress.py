"""Progress: the loss and the speed on the error stream, while a run goes on.

A terminal gets a bar. Where a bar cannot move (a file, a notebook, a log of a
scheduler) a line comes every few seconds, which is all that such a place can show.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PAUSE = 10.0  # seconds between two lines
Show = Callable[[int, float, float], None]


@contextlib.contextmanager
def progress(label: str, steps: int, done: int, quiet: bool) -> Iterator[Show]:
    """Gives a function (step, loss, tokens a second) that tells of a step."""
    if quiet or sys.stderr is None:
        yield lambda step, value, rate: None
    elif sys.stderr.isatty() and not notebook():
        with _bar(label, steps, done) as show:
            yield show
    else:
        yield _lines(label, steps)


def notebook() -> bool:
    """Whether this runs in a notebook, whose error stream says that it is a terminal.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "Terminal" not in type(shell).__name__ if shell is not None else False


def _note(value: float, rate: float) -> str:
    return f"loss {value:.3f}, {rate:,.0f} tok/s"


def _lines(label: str, steps: int) -> Show:
    """A line at once, one every few seconds, and one at the end."""
    last = -PAUSE

    def show(step: int, value: float, rate: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PAUSE or step == steps:
            last = now
            with contextlib.suppress(OSError):  # a log that is full stops no run
                print(f"{label} {step}/{steps} steps: {_note(value, rate)}",
                      file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def _bar(label: str, steps: int, done: int) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/"),
        TextColumn("{task.total} steps"), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=steps, completed=done, note="compiling")

        def show(step: int, value: float, rate: float) -> None:
            bar.update(task, completed=step, note=_note(value, rate))

        yield show
