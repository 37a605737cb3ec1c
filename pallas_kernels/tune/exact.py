"""What `python -m pallas_kernels.tune` tries for exact attention.

A row of the table is a kernel, a class of widths and a kind of numbers: f16 and f32,
and of a cache that decodes also i8 and i4, or i8 beside queries in float32. On TPU
blocks have no tiles of their own, and a step of decode takes what fast memory holds.
"""

from __future__ import annotations

import itertools
from typing import Any, Iterator

import jax.numpy as jnp
import numpy as np

from pallas_kernels.matrix import cases
from pallas_kernels.matrix.case import BF16, F32
from pallas_kernels.matrix.cases_flash import attention
from pallas_kernels.matrix.targets import Gpu, Tpu

ROWS = {"flash": ("flash_forward", "flash_backward"),
        "blocks": ("blocks_forward", "blocks_backward"), "decode": ("decode",)}
TPU_TILES = ((512, 1024), (1024, 1024), (1024, 2048), (2048, 1024), (2048, 2048))
TPU_F32 = ((256, 512), (512, 512), (512, 1024), (1024, 1024))
CHUNKS = (256, 512)
SIZES, WARPS, STAGES = (32, 64, 128), (4, 8), (1, 2, 3)
SMALL = (16, 32, 64)  # for float32, which has no tensor cores
SLOTS = (32, 64, 128)
AREA, LEAST = 2**21, 2**10  # most elements of a tile times the width, fewest of a tile
MOST = 250  # registers of a thread
LENGTH = 8192


def rows(family: str, backend: str) -> tuple[str, ...]:
    """The rows of a family of kernels; none where it has no such tiles."""
    return () if backend != "triton" and family != "flash" else ROWS[family]


def kinds(which: str, backend: str) -> tuple[str, ...]:
    """The kinds of numbers that a row is kept for."""
    if which == "decode":
        return "f16", "i8", "i4", "f32", "f32 i8"
    return ("f16",) if backend == "mosaic" else ("f16", "f32")


def candidates(backend: str, width: int, which: str, kind: str) -> Iterator[tuple]:
    """Queries, keys and what else the table says of a tile."""
    if backend == "mosaic":
        # of the backward pass also keys and stages of the kernel for dq
        ahead = which == "flash_forward"
        sizes = ((128, 192), (64, 128)) if ahead else ((64,), (64, 128))
        for tall, wide, stages in itertools.product(*sizes, (1, 2)):
            yield tall, wide, stages, *(() if ahead else (64, stages, stages))
    elif backend == "tpu":
        tiles = TPU_TILES if kind == "f16" else TPU_F32
        yield from ((*tile, chunk) for tile in tiles for chunk in CHUNKS)
    elif which == "decode":
        tall = 16 if kind.startswith("f32") else 32
        slots = SMALL if kind.startswith("f32") else SLOTS
        yield from ((tall, *more) for more in itertools.product(slots, WARPS, STAGES))
    elif kind == "f32":
        for tile in itertools.product(SMALL, SMALL, (8,), (1, 2)):
            if tile[0] * tile[1] * width <= AREA // 8:
                yield tile
    else:
        # chosen blocks are rarely longer than 64
        wide = SIZES if which.startswith("flash") else SIZES[:-1]
        for tile in itertools.product(SIZES, wide, WARPS, STAGES):
            area = tile[0] * tile[1]
            if LEAST <= area <= AREA // width and summed(which, width, tile) < MOST:
                yield tile


def summed(which: str, width: int, tile: tuple[int, ...]) -> float:
    """Registers of a thread that logits and sums of a tile take, of Triton's kernels:
    what has too many of them spills, and need not be compiled."""
    tall, wide, warps = tile[:3]
    logits = tall * wide
    if which.endswith("backward"):
        elements = 2 * logits + max(2 * wide * width, tall * width)
    else:
        elements = logits + tall * width
    return elements / (32 * warps)


def program(target: Tpu | Gpu, backend: str, which: str, width: int, kind: str) -> Any:
    """The function that takes its tile from a row, its arguments and its trips."""
    dtype = F32 if kind.startswith("f32") else BF16
    call = {"backend": backend, "backward": which.endswith("backward"), "d": width,
            "dtype": dtype}
    if which == "decode":
        bits = 8 if "i8" in kind else 4 if "i4" in kind else 16
        f, (args,), trips = cases.cached(
            target, backend=backend, d=width, bits=bits, dtype=dtype)
        lengths, slots = args.pop("lengths"), args["k"].shape[1]

        def full(args):
            return args | {"lengths": jnp.full(lengths.shape, slots)}

        return lambda args: f(full(args)), (args,), trips
    if which.startswith("blocks"):
        f, (at, *args), trips = cases.chosen(target, **call)
        # each block of queries chooses evenly among those before it and itself
        n, many = at.shape[2:]
        steps = np.arange(n)[:, None] - np.arange(many) * np.maximum(
            np.arange(n)[:, None] // many, 1)
        chosen = np.broadcast_to(np.maximum(steps, -1), at.shape).astype(np.int32)
        return lambda *args: f(chosen, *args), tuple(args), trips
    return attention(target, t=LENGTH, **call)
