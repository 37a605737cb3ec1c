"""The pool: children that run cases side by side, of which any may crash or hang.

Compiling is most of the time and needs no device, so as many processes as there are
cores to spare take the next case each; what runs on the device takes turns. That has to
be processes: Mosaic GPU's compiler works under one lock a process, and what it makes is
not in an executable that jax serializes or keeps in its persistent cache (there the
kernel's module stands, which is compiled when the executable is loaded; read in jax's
jaxlib/mosaic/gpu/custom_call.cc), so that no process could compile for another.
"""

from __future__ import annotations

import json
import os
import pathlib
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable

CHILD = "experiments.measure.device.child"
MOST = 10  # processes that share a GPU's memory
START = 90.0  # seconds until a child has to have loaded
Row = dict[str, Any]
ROOT = pathlib.Path(__file__).resolve().parents[3]


def environment(platform: str, many: int) -> dict[str, str]:
    """What a child's libraries read: shares of a GPU's memory, or devices of a CPU for
    the warpgroups that are interpreted."""
    own = dict(os.environ)
    # a child is a module of this checkout, wherever the command was called
    own["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), own.get("PYTHONPATH"))))
    if platform == "gpu":
        own.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        own.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.92 / many:.3f}")
        own.setdefault("JAX_PLATFORMS", "cuda,cpu")
    if platform == "cpu":
        own["JAX_PLATFORMS"] = "cpu"
        flags = own.get("XLA_FLAGS", "")
        if "host_platform_device_count" not in flags:
            flags += " --xla_force_host_platform_device_count=8"
        if "backend_optimization" not in flags:
            flags += " --xla_backend_optimization_level=0"
        own["XLA_FLAGS"] = flags
    return own


def size(platform: str) -> int:
    """How many children work at once; a TPU serves one process."""
    cores = len(os.sched_getaffinity(0))
    return 1 if platform == "tpu" else max(min(cores - 2, MOST), 2)


class Child:
    """A process that serves cases one by one."""

    def __init__(self, folder: pathlib.Path, words: list[str], environ: dict[str, str],
                 number: int):
        self.log = folder / f"child-{number}.log"
        with self.log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", CHILD, str(folder), *words], env=environ,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True)
        self.fresh, self._rest = True, b""

    def ask(self, name: str) -> None:
        """Hands it a case."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()

    def answer(self, seconds: float, deadline: float) -> Row | None:
        """The next row; None if the process ends. TimeoutError at the deadline, or if
        it computes, or holds the device, for so many seconds; waiting for the device is
        free."""
        until = min(time.monotonic() + seconds, deadline)
        while (row := self._line(until)) is not None and "now" in row:
            waits = row["now"] == "waits"
            until = deadline if waits else min(time.monotonic() + seconds, deadline)
        return row

    def _line(self, until: float) -> Row | None:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not waiting.select(max(until - time.monotonic(), 0)):
                    raise TimeoutError
                part = os.read(self.process.stdout.fileno(), 2**16)
                if not part:
                    return None
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        self.fresh = False
        return json.loads(line)

    def end(self) -> int:
        """Ends it, and whatever it has started -> its status."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for stream in (self.process.stdin, self.process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass
        return self.process.wait()

    def last_words(self) -> str:
        """The end of what it has printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " ".join((lines or [""])[-1].split())[:160]


def listed(folder: pathlib.Path, words: list[str], platform: str) -> Row:
    """The place and the names of its cases, as a child finds them."""
    child = Child(folder, [*words, "--list"], environment(platform, 1), 0)
    try:
        found = child.answer(START, time.monotonic() + START)
    except TimeoutError:
        found = None
    child.end()
    if found is None:
        raise RuntimeError(f"the device does not answer: {child.last_words()}")
    return found


def serve(folder: pathlib.Path, todo: list[Row], words: list[str], platform: str,
          deadline: float, keep: Callable[[Row], None]) -> None:
    """Runs the cases in their order until all are done or the time (monotonic) is up;
    keep(row) is called with each as soon as it is there, from one thread at a time."""
    many = min(size(platform), len(todo))
    environ, lock = environment(platform, max(many, 1)), threading.Lock()
    groups: dict[str, queue.SimpleQueue] = {}
    for case in todo:
        groups.setdefault(case["group"], queue.SimpleQueue()).put(case)

    def work(number: int) -> None:
        for group in groups.values():
            child: Child | None = None
            while time.monotonic() < deadline:
                try:
                    case = group.get_nowait()
                except queue.Empty:
                    break
                child = child or Child(folder, words, environ, number)
                row = attempt(child, case, deadline)
                if row is None:  # the time is up: the case was not done
                    break
                with lock:
                    keep(row)
                if row["state"] in ("failed", "crashed", "hung"):
                    child.end()
                    child = None
            if child is not None:
                child.end()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, many + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def attempt(child: Child, case: Row, deadline: float) -> Row | None:
    """A case's row, or that it crashed or hung; None if the time was up."""
    limit = case["seconds"] + (START if child.fresh else 0)
    name, clock = case["name"], time.monotonic()
    try:
        child.ask(name)
        row = child.answer(limit, deadline)
    except TimeoutError:
        if time.monotonic() >= deadline:
            return None
        return {"name": name, "state": "hung",
                "why": f"no answer in {time.monotonic() - clock:.0f} s"}
    except OSError:  # it had died before it was asked
        row = None
    if row is None:
        why = child.last_words()
        return {"name": name, "state": "crashed",
                "why": f"its process ended with {child.end()}: {why}"}
    return row
