"""A case: one thing that is proved or timed on a device, in a process that may die."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import pathlib
import time
from typing import Any, Callable, Iterator, NamedTuple

import jax
import jax.numpy as jnp

from experiments.measure import timing
from experiments.measure.device.place import Place

Row = dict[str, Any]
ROUNDS, WARM = 7, 2
LIMIT = 120.0  # seconds of a case, if it says nothing else
BF16, F32 = jnp.bfloat16, jnp.float32


class Case(NamedTuple):
    """name: its first word is what it is ("right", "fast", "candidate", "layer",
    "suite" or "tiles"), the rest of what; run: makes its row; tier: 0 is one case of
    each kernel, higher ones are depth; seconds: after which it hangs; group: the
    packages that its process loads, "jax" or "torch"."""

    name: str
    run: Callable[[Bench], Row]
    tier: int = 1
    seconds: float = LIMIT
    group: str = "jax"


class Wrong(Exception):
    """What a case computed is not what it should be."""


class Bench:
    """What a case runs on. Programs compile beside those of other processes; what runs
    on the device runs alone, under a lock that all processes of a run share."""

    def __init__(self, place: Place, folder: pathlib.Path,
                 tell: Callable[[str], None] = lambda word: None):
        self.place = place
        self._lock, self._tell = folder / ".device", tell

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts, no other process of this run uses the device. Whoever watches
        this process is told, as a wait for others is nobody's fault."""
        with self._lock.open("a") as file:
            self._tell("waits")
            fcntl.flock(file, fcntl.LOCK_EX)
            self._tell("holds")
            yield
        self._tell("works")

    def compiled(self, f: Callable, *args: Any, reference: bool = False,
                 **options: Any) -> tuple[Callable, float]:
        """(f compiled for these arguments, seconds of that). reference: its speed is of
        no interest, so that the compiler times nothing on the device."""
        clock = time.perf_counter()
        lowered = jax.jit(f, **options).lower(*args)
        quick = reference and self.place.platform == "gpu"
        told: dict[str, Any] | None = {"xla_gpu_autotune_level": 0} if quick else None
        done = lowered.compile(told)
        return done, time.perf_counter() - clock

    @functools.cached_property
    def ceilings(self) -> tuple[float, float]:
        """Flops a second of a large product of bfloat16, bytes a second of a large
        copy, read and written together, both of iid normal numbers."""
        n, size = (512, 2**20) if self.place.tiny else (8192, 2**29)
        a, b, x = (jax.random.normal(jax.random.key(i), shape, BF16)
                   for i, shape in enumerate(((n, n), (n, n), (size,))))
        product = functools.partial(jax.jit(lambda a, b: a @ b), a, b)
        copy = functools.partial(jax.jit(lambda x: x + 1), x)
        with self.alone():
            spent = timed({"product": product, "copy": copy})
        best = {name: min(times) for name, times in spent.items()}
        return 2 * n**3 / best["product"], 2 * x.nbytes / best["copy"]


def timed(calls: dict[str, Callable], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of a call of each, one after the other in every round."""
    for call in calls.values():
        for _ in range(WARM):
            jax.block_until_ready(call())
    times = {name: timing.repeats(call) for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            spent[name].append(timing.seconds(call, times[name]))
    return spent


def normal(n: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    """iid normal numbers, the n-th of their kind."""
    return jax.random.normal(jax.random.key(n), shape).astype(dtype)


def structs(args: Any) -> Any:
    """The shapes of arrays, to compile for."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
