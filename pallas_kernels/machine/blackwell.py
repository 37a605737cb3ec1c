"""Tensor memory of a kernel for Blackwell, by Mosaic GPU, and the products that add up
there: 128 lanes of 512 columns of 32 bits.

What an interpreter on a CPU does differently stands here: that of jax 0.10 knows
neither tensor memory nor its products, so shared memory stands in for the one and dots
for the others; later ones simulate both.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.machine.hopper import F32, LATER, Tile

ROWS = 128  # of a product: the lanes of tensor memory
COLUMNS = 512  # of tensor memory, of 32 bits
ROW = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a thread has a row
COPIED = plgpu.Layout.TCGEN05  # what shared memory takes without conflicts of banks


def tensor(interpret: bool, *parts: tuple[int, Any]) -> list[Any]:
    """Tensor memory for tiles of so many columns and that type; 16 bits are packed."""
    if stands_in(interpret):
        return [plgpu.SMEM((ROWS, n), dtype) for n, dtype in parts]
    return [plgpu.TMEM((ROWS, n), dtype, packed=dtype != F32) for n, dtype in parts]


def stands_in(interpret: bool) -> bool:
    """Whether shared memory stands in for tensor memory, and dots for its products: the
    interpreter of jax 0.10 knows neither."""
    return interpret and not LATER


def load(ref, interpret: bool, layout=ROW):
    """What lies in tensor memory; it may be overwritten at once."""
    if stands_in(interpret):
        return ref[...]
    # an interpreter knows no layouts
    found = plgpu.async_load_tmem(ref, layout=None if interpret else layout)
    plgpu.wait_load_tmem()  # so that it may be overwritten
    return found


def store(ref, x, interpret: bool) -> None:
    """Puts x into tensor memory; it is there after `commit`."""
    if stands_in(interpret):
        ref[...] = x
    else:
        plgpu.async_store_tmem(ref, x)


def meet(met) -> None:
    """Until all threads of the warpgroup are here: a product, which one of them begins,
    may overwrite what the others have loaded."""
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)


def commit(interpret: bool) -> None:
    """Until what this thread has stored is there."""
    if not stands_in(interpret):
        plgpu.commit_tmem()


def settle(met, interpret: bool) -> None:
    """Until what all threads of the warpgroup have stored is there for a product."""
    commit(interpret)
    meet(met)


def multiply(acc, a, b, done, accumulate, interpret: bool) -> None:
    """Begins acc (+)= a b; `done` says when it is there. acc: tensor memory, a: shared
    or tensor memory, b: shared memory or a `Tile` of it."""
    turned = isinstance(b, Tile)
    if not stands_in(interpret):
        b = b.turned.transpose((1, 0)) if turned else b
        plgpu.tcgen05_mma(acc, a, b, done, accumulate=accumulate)
        return
    b = b.turned[...].T if turned else b[...]
    found = jnp.dot(a[...], b, preferred_element_type=F32)
    acc[...] = jnp.where(accumulate, acc[...], 0) + found  # `accumulate` may be traced
    plgpu.barrier_arrive(done)
