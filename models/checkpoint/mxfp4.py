"""MXFP4: matrices of 4 bits a number, as gpt-oss ships its experts.

Of 32 numbers each has a sign, two bits of an exponent and one of a mantissa (E2M1), and
all share a power of two (E8M0): value = sign * {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^(s-127).
A byte holds two numbers, the first in its lower half. Every product is exact in
bfloat16. Source: OCP Microscaling Formats (MX) Specification, version 1.0 (2023).
"""

from __future__ import annotations

import functools
from typing import Any, Sequence

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from models.checkpoint.tensors import Entry

BLOCK = 32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([VALUES, -VALUES]).astype(ml_dtypes.bfloat16)


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks [...,n,16] and scales [...,n], bytes -> [...,32 n] bfloat16; ValueError
    for a scale of 255, which stands for NaN."""
    if (scales == 255).any():
        raise ValueError("MXFP4: a scale of 255 is NaN: expected numbers")
    numbers = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], -1)  # [...,16,2]
    numbers = numbers.reshape(*blocks.shape[:-1], BLOCK)
    numbers = np.ldexp(numbers.astype(np.float32), scales[..., None].astype(np.int32)
                       - 127)
    return numbers.reshape(*blocks.shape[:-2], -1).astype(ml_dtypes.bfloat16)


def quantised(name: str, paths: Sequence[str]) -> Entry:
    """Kernels [N,in,out] of blocks [N,out,in/32,16] and scales [N,out,in/32]; of two
    paths, outputs are in turns. They are read, and not written in this form."""
    names = f"{name}_blocks", f"{name}_scales"
    return Entry(names, tuple(paths), _read, functools.partial(_bytes, len(paths)))


def _read(arrays, shapes) -> list[np.ndarray]:
    blocks, scales = arrays[0], arrays[1]
    found = np.empty((len(blocks), blocks.shape[2] * BLOCK, blocks.shape[1]),
                     ml_dtypes.bfloat16)
    for n in range(len(found)):  # one expert at a time
        found[n] = dequantised(blocks[n], scales[n]).T
    return [found[..., i::len(shapes)] for i in range(len(shapes))]


def _bytes(many: int, arrays) -> list[Any]:
    """Bytes of the right shapes: what a file has to have."""
    n, inputs, outputs = arrays[0].shape
    scales = jnp.zeros((n, many * outputs, -(-inputs // BLOCK)), jnp.uint8)
    return [jnp.zeros((*scales.shape, BLOCK // 2), jnp.uint8), scales]
