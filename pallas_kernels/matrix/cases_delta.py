"""Cases of the delta rule: shapes and options that are compiled for every target."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tables
from pallas_kernels.delta.api import delta
from pallas_kernels.delta.chunk import CHUNK
from pallas_kernels.matrix.case import TripCounts

BF16, F32 = jnp.bfloat16, jnp.float32
DELTA: dict[str, dict[str, Any]] = {
    "gated T8192 D128 H16": {"t": 8192, "d": 128},
    "T8192 D128 H16": {"t": 8192, "d": 128, "gated": False},
    "gated T8192 D128 H64 K16": {"t": 8192, "d": 128, "h": 64, "k": 16},
    "gated T8192 D64 H16": {"t": 8192, "d": 64},
    "gated T4096 D256 V256 H4": {"t": 4096, "d": 256, "h": 4},
    "packed gated T4096 D128 H4": {"t": 4096, "d": 128, "h": 4, "packed": True},
    "odd gated T1000 D24 V40 H4 float32": {
        "t": 1000, "d": 24, "v": 40, "h": 4, "dtype": F32},
    "one token gated T1 D128 H16": {"t": 1, "d": 128},
    "channel T8192 D128 H16": {"t": 8192, "d": 128, "channels": True},
    "packed channel T4096 D128 H4": {
        "t": 4096, "d": 128, "h": 4, "packed": True, "channels": True},
    "channel T4096 D256 V256 H4": {"t": 4096, "d": 256, "h": 4, "channels": True},
    "odd channel T1000 D24 V40 H4 float32": {
        "t": 1000, "d": 24, "v": 40, "h": 4, "dtype": F32, "channels": True},
}


def rule(target, *, backend, backward, t, d, v=None, h=16, k=None, gated=True,
         channels=False, packed=False, dtype=BF16):
    """delta, forward or forward and backward; k: heads of queries and keys; gated: a
    decay a token and head, or, with `channels`, of each channel of the key."""
    struct = jax.ShapeDtypeStruct
    narrow = struct((1, t, k or h, d), dtype)
    given = {"q": narrow, "k": narrow,
             "v": struct((1, t, h, v or d), dtype), "beta": struct((1, t, h), F32)}
    if gated:
        given["log_decay"] = struct((1, t, h, d) if channels else (1, t, h), F32)
    segments = {"segment": struct((1, t), jnp.int32)} if packed else {}
    steps = 0
    if backend == "tpu":
        shape = tables.Shape(t, t, d, v or d, jnp.dtype(dtype).itemsize)
        many = tables.chunks(target.kind, "delta", shape).chunks
        steps = h * -(-t // (many * CHUNK))
    trips = {f"delta_{way}": TripCounts((steps,), h, steps)
             for way in ("forward", "backward")[:1 + backward] if backend == "tpu"}

    def f(given, segments):
        return delta(**given, **segments, backend=backend)[1]

    if not backward:
        return f, (given, segments), trips

    def both(given, segments, do):
        return jax.vjp(lambda given: f(given, segments), given)[1](do)

    return both, (given, segments, given["v"]), trips


def work(t, d, v=None, h=16, backward=False, **options) -> float:
    """Flops of the recurrence itself, token by token: S' is read by k and by q and
    written once; a backward pass counts as 2.5 of it, as for exact attention."""
    return 6 * t * d * (v or d) * h * (3.5 if backward else 1)
