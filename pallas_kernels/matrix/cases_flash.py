"""Cases of flash attention: the shapes and options for which it is compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pallas_kernels import tables
from pallas_kernels.flash.api import flash
from pallas_kernels.logits import LogitSpec, Where
from pallas_kernels.matrix.case import BF16, F32, TripCounts, struct, with_gradients
from pallas_kernels.schedule import FULL, MASKED, Tiling, block_mask
from pallas_kernels.tile_patterns import LANES, shrink_to_fit, tile_patterns


@dataclasses.dataclass(frozen=True)
class Causal:
    """A causal mask, all that this package knows of masks."""

    def __call__(self, h, i, j):
        return j <= i

    def bounds(self, i, j):
        return j[0] <= i[1], j[1] <= i[0]


@dataclasses.dataclass(frozen=True)
class Window(Causal):
    """Causal, and at most `left` tokens back."""

    left: int = 1024

    def __call__(self, h, i, j):
        return (j <= i) & (i - j <= self.left)

    def bounds(self, i, j):
        some, every = super().bounds(i, j)
        return some & (i[0] - j[1] <= self.left), every & (i[1] - j[0] <= self.left)


# matrix products per logit of a kernel, as wide as keys and as values
PRODUCTS = {
    "flash_forward": {"": (1, 1)},
    "flash_backward": {"_keys": (2, 2), "_queries": (2, 1), "_bias": (1, 1),
                       "": (3, 2)},
}


def products(logits: float, d: int, v: int, kernel: str) -> dict[str, float]:
    """Flops of the products of so many logits, as `TripCounts` has them; matrix units
    take widths in whole lanes."""
    d, v = (-(-n // LANES) * LANES for n in (d, v))
    return {end: 2 * logits * (keys * d + values * v)
            for end, (keys, values) in PRODUCTS[kernel].items()}


def passes(device: str, t, d, v, h, mask, itemsize=2, packed=False,
           matrix=False) -> dict[str, TripCounts]:
    """Trips of the flash kernels, in the order of their programs; segments of `packed`
    sequences are taken to hide nothing."""
    trips = {}
    shape = tables.Shape(t, t, d, v, itemsize, matrix)
    for kernel in ("flash_forward", "flash_backward"):
        found = tables.tile(device, kernel, shape)
        tiling = Tiling(t, t, found.block_q, found.block_kv, 0)
        tiling = shrink_to_fit(mask, tiling, found.block_kv_compute, max(d, v), packed,
                               kernel == "flash_backward")
        table = block_mask(mask, tiling)
        ask = jnp.asarray(table)[None] if packed else None
        patterns, codes, _ = tile_patterns(
            mask, tiling, found.block_kv_compute, table, ask)
        whole = tiling.rows * tiling.columns
        kinds = [(MASKED, whole)] * patterns.masked
        kinds += [(MASKED + 1 + n, sum(part.area for part in parts))
                  for n, parts in enumerate(patterns.partial)]
        kinds += [(FULL, whole)] * patterns.whole
        counts = [h * int((codes == kind).sum()) for kind, _ in kinds]
        logits = sum(n * area for n, (_, area) in zip(counts, kinds))
        lines = h * table.shape[kernel == "flash_backward"]
        trips[kernel] = TripCounts(tuple(counts), lines, sum(counts),
                                   products(logits, d, v, kernel))
    return trips


def attention(target, *, backend, backward, t, d, h=8, k=8, v=None, mask=Causal(),
              dtype=BF16, extra=()):
    """flash, forward or forward and backward; extra: names of optional arrays."""
    v = v or d
    arrays = [struct(1, t, n, width, dtype=dtype) for n, width in
              ((h, d), (k, d), (k, v))]
    given = {"sink": struct(h, dtype=F32), "bias": struct(1, h, t, t, dtype=dtype)}
    arrays += [given[n] for n in given if n in extra]
    segments = [struct(1, t, dtype=jnp.int32)] if "packed" in extra else []
    softcap = 30.0 if "softcap" in extra else None

    def f(segments, q, k, v, *more):
        options = dict(zip([n for n in given if n in extra], more))
        segment = segments[0] if segments else None
        where = Where(q_segment=segment, kv_segment=segment)
        return flash(q, k, v, LogitSpec(mask, softcap=softcap), where,
                     backend=backend, **options)

    trips = {}
    if backend == "tpu":
        size = jnp.dtype(dtype).itemsize
        trips = passes(target.kind, t, d, v, h, mask, size, bool(segments),
                       "bias" in extra)
    if not backward:
        forward = {n: c for n, c in trips.items() if "forward" in n}
        return f, (segments, *arrays), forward

    def both(segments, args, do):
        return with_gradients(lambda *a: f(segments, *a)[0])(args, do)

    return both, (segments, arrays, struct(1, t, h, v, dtype=dtype)), trips


def work(t, d, v=None, h=8, causal=True, backward=False) -> float:
    """Flops by the field's convention: of a forward pass, or of it and the backward
    one, which counts as 2.5 of it."""
    return (2 * h * t * t * (d + (v or d)) / (2 if causal else 1)
            * (3.5 if backward else 1))


FLASH: dict[str, dict[str, Any]] = {
    "causal T8192 D128 H16": {"t": 8192, "d": 128, "h": 16, "k": 16},
    "causal T8192 D64 H8": {"t": 8192, "d": 64},
    "causal T8192 D256 H8": {"t": 8192, "d": 256},
    "causal T4096 D192 V128 H8": {"t": 4096, "d": 192, "v": 128},
    "causal T12288 D256 H1": {"t": 12288, "d": 256, "h": 1, "k": 1},
    "causal T24576 D128 H1": {"t": 24576, "d": 128, "h": 1, "k": 1},
    "full T8192 D128 H8": {"t": 8192, "d": 128, "mask": None},
    "grouped T4096 D128 H8 K2 window sinks softcap": {
        "t": 4096, "d": 128, "k": 2, "mask": Window(), "extra": ("sink", "softcap")},
    "packed T4096 D128 H4": {"t": 4096, "d": 128, "h": 4, "k": 4, "extra": ("packed",)},
    "bias T2048 D32 H4": {"t": 2048, "d": 32, "h": 4, "k": 4, "extra": ("bias",)},
    "odd T1000 D24 H4 float32": {"t": 1000, "d": 24, "h": 4, "k": 4, "dtype": F32},
}
