"""Ending: what a command says when it cannot go on, and where it can say it.

One sentence on the error stream, whatever happens, and never a traceback: that of an
error of the program goes to a file, which the sentence names.
"""

from __future__ import annotations

import contextlib
import linecache
import math
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
OURS = ("attn", "experiments", "models", "pallas_kernels", "tests")
WRONG_CALL, FAILED, STOPPED = 2, 1, 130  # exit codes


@contextlib.contextmanager
def one_sentence(title: str, reading: bool, trace: bool) -> Iterator[None]:
    """Ends the program with one sentence for any error. reading: a ValueError is about
    the words of the command line. trace: leave errors as they are."""
    try:
        yield
    except KeyboardInterrupt:
        _end(f"{title}: stopped by Ctrl-C", STOPPED)
    except Exception as error:
        if trace:
            raise
        refusal = isinstance(error, (ValueError, NotImplementedError))
        if refusal and (reading or is_ours(error)):
            _end(f"{title}: {error}", WRONG_CALL)
        if isinstance(error, ImportError) and is_ours(error):  # an extra is missing
            _end(f"{title}: {error}", FAILED)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{title}: {where}{error.strerror or error}", FAILED)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            _end(f"{title}: not enough memory ({_first_line(error)}): expected smaller "
                 "sizes", FAILED)
        _end(f"{title}: {type(error).__name__}: {_first_line(error)}{_kept(error)}",
             FAILED)


def is_ours(error: Exception) -> bool:
    """Whether a `raise` of this repository made the error: it is meant for readers.

    jax takes its own frames out of tracebacks, so the last line is looked at as well.
    """
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    path = pathlib.Path(frame.f_code.co_filename).resolve()
    if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in OURS:
        return False
    return linecache.getline(str(path), line).strip().startswith("raise ")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _kept(error: Exception) -> str:
    """Writes the traceback to a file -> the words that say where."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="attn-", suffix=".txt", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return " (--traceback shows where)"
    return f" (an error of the program: its traceback is {file.name})"


def _end(message: str, code: int) -> None:
    say(message)
    raise SystemExit(code)


def say(message: str) -> None:
    """A line on the error stream, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(" ".join(message.split("\n")), file=sys.stderr, flush=True)


class Output:
    """The standard output. Where it is closed or full, the rest goes to the error
    stream, and the program fails once it has ended."""

    def __init__(self):
        self.failed = False
        for stream in (sys.stdout, sys.stderr):
            # letters that a terminal does not have are written as \\u2014
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        if sys.stdout is None:
            self._lost("it is closed")

    def line(self, text: str) -> None:
        """Prints."""
        try:
            print(text, flush=True)
        except (OSError, ValueError) as error:
            self._lost(getattr(error, "strerror", None) or str(error))
            say(text)

    def close(self) -> None:
        """At the end of a program that had its way."""
        if self.failed:
            raise SystemExit(FAILED)

    def _lost(self, why: str) -> None:
        self.failed = True
        say(f"the standard output cannot be written ({why}): what comes goes here")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # else the interpreter would try to empty it once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout = sys.stderr or open(os.devnull, "w")


def numbers(output: Output, title: str, found: dict[str, Any]) -> None:
    """Prints the numbers of a result; ends with code 1 if one of them is none."""
    width = max((len(str(name)) for name in found), default=0)
    for name, value in found.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        output.line(f"{name!s:<{width}}  {text}")
    bad = [name for name, value in found.items()
           if isinstance(value, float) and math.isnan(value)]
    if bad:
        _end(f"{title}: not a number: {', '.join(bad)}", FAILED)
