"""Progress: a bar on the error stream, with the loss and the speed."""

from __future__ import annotations

import contextlib
import importlib.util

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(label: str, steps: int, done: int, quiet: bool):
    """Gives a function (step, loss, tokens a second) that moves the bar."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/"),
        TextColumn("{task.total} steps"), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    # in a notebook rich needs widgets to draw a bar, else it writes the last line
    widgets = None if importlib.util.find_spec("ipywidgets") else False
    console = Console(stderr=True, force_jupyter=widgets)
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(label, total=steps, completed=done, note="compiling")

        def show(step: int, value: float, rate: float) -> None:
            note = f"loss {value:.3f}, {rate:,.0f} tok/s"
            bar.update(task, completed=step, note=note)

        yield show
