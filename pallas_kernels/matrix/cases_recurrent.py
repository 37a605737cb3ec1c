"""Cases of the recurrent kernels: the shapes for which they are compiled."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from pallas_kernels import tables
from pallas_kernels.linear.api import linear
from pallas_kernels.matrix.case import (
    BF16, F32, Case, TripCounts, struct, with_gradients
)
from pallas_kernels.scan.api import scan


def recurrence(target, *, backend, backward, t, d, h=16, k=None, decay="head",
               dtype=BF16, packed=False):
    """linear, forward or forward and backward; o in the type of q."""
    arrays = [struct(1, t, n, d, dtype=dtype) for n in (h, k or h, k or h)]
    shapes = {"head": (h,), "token": (1, t, h), "channel": (1, t, h, d)}
    if decay in shapes:
        arrays.append(struct(*shapes[decay], dtype=F32))
    segments = [struct(1, t, dtype=jnp.int32)] if packed else [None]
    shape = tables.Shape(t, t, d, d, jnp.dtype(dtype).itemsize)
    trips = {}
    for way in ("forward", "backward") if backend == "tpu" else ():
        block = tables.chunks(target.kind, f"linear_{'backward' if backward else way}",
                              shape, decay == "channel").block
        steps = h * -(-t // block)
        trips[f"linear_{way}"] = TripCounts((steps,), h, steps)

    def f(segments, *args):
        return linear(*args, segment=segments[0], dtype=dtype, backend=backend)[1]

    if not backward:
        forward = {n: c for n, c in trips.items() if "forward" in n}
        return f, (segments, *arrays), forward

    def both(segments, args, do):
        return with_gradients(lambda *a: f(segments, *a))(args, do)

    return both, (segments, arrays, struct(1, t, h, d, dtype=dtype)), trips


def prefixes(target, *, backend, backward, t=8192, h=8, k=8, v=64, dtype=BF16,
             packed=False):
    """scan: softmax over every prefix."""
    args = struct(1, t, h, dtype=F32), struct(1, t, k, v, dtype=dtype)
    state = tuple(struct(1, h, *width, dtype=F32) for width in ((), (), (v,)))
    segments = [struct(1, t, dtype=jnp.int32)] if packed else []

    def f(segments, s, v, *state):
        return scan(s, v, state, segment=segments[0] if segments else None, dtype=dtype,
                    backend=backend)

    trips = {}
    if backend == "tpu":
        shape = tables.Shape(t, t, v, v, jnp.dtype(dtype).itemsize)
        steps = h * -(-t // tables.chunks(target.kind, "scan", shape).chunk)
        trips = {"scan": TripCounts((steps,), steps, steps)}
    if not backward:
        return f, (segments, *args, *state), trips

    def both(segments, args, cotangent):
        return with_gradients(lambda *a: f(segments, *a))(args, cotangent)

    do = struct(1, t, h, v, dtype=dtype)
    return both, (segments, (*args, *state), (state, do)), trips


LINEAR: dict[str, dict[str, Any]] = {
    "head T8192 D128 H16": {"t": 8192, "d": 128},
    "token T8192 D128 H16": {"t": 8192, "d": 128, "decay": "token"},
    "channel T8192 D128 H16": {"t": 8192, "d": 128, "decay": "channel"},
    "none T8192 D128 H16": {"t": 8192, "d": 128, "decay": "none"},
    "head T8192 D64 H16": {"t": 8192, "d": 64},
    "channel T8192 D64 H16": {"t": 8192, "d": 64, "decay": "channel"},
    "token T8192 D256 H16": {"t": 8192, "d": 256, "decay": "token"},
    "channel T8192 D256 H16": {"t": 8192, "d": 256, "decay": "channel"},
    "packed T4096 D128 H8 K2": {"t": 4096, "d": 128, "h": 8, "k": 2, "packed": True},
    "packed channel T4096 D128 H8 K2": {
        "t": 4096, "d": 128, "h": 8, "k": 2, "decay": "channel", "packed": True},
    "odd T1000 D24 H4 float32": {
        "t": 1000, "d": 24, "h": 4, "decay": "token", "dtype": F32},
    "odd channel T1000 D24 H4 float32": {
        "t": 1000, "d": 24, "h": 4, "decay": "channel", "dtype": F32},
}
NEAR_DUPLICATES = (
    "token T8192", "none T8192", "T8192 D64", "T8192 D256", "packed T4096")
SCAN: dict[str, dict[str, Any]] = {
    "T8192 V64 H8": {},
    "T8192 V256 H8": {"v": 256},
    "T8192 V128 H16 K4 packed": {"v": 128, "h": 16, "k": 4, "packed": True},
    "odd T1000 V24 H4 float32": {"t": 1000, "v": 24, "h": 4, "k": 4, "dtype": F32},
}


def recurrent(backend: str, way: str, label: str) -> dict[str, Case]:
    """The cases of a backend; way: "forward" or "backward"."""
    found: dict[str, Case] = {}
    for kernel, build, table in (("linear", recurrence, LINEAR),
                                 ("scan", prefixes, SCAN)):
        for name, options in table.items():
            build_it = functools.partial(
                build, backend=backend, backward=way == "backward", **options)
            near = kernel == "linear" and any(part in name for part in NEAR_DUPLICATES)
            found[f"{kernel} {way}{label} {name}"] = Case(build_it, near_duplicate=near)
    return found
