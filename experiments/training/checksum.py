"""Checksums: 64 bits of an array that any changed bit of it changes.

Every 32-bit word is mixed with its place (the finaliser of MurmurHash3), and the
results are added up. A sum knows no order, so an array has the same checksum however it
is split over devices and hosts; and since mixing can be undone, a single word that
differs always shows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEEDS = (0x9E3779B9, 0x7F4A7C15)
PIECE = 2**20  # words mixed at once on the host


def checksum(a: Any) -> str:
    """dtype, shape and 16 hexadecimal digits of an array's content."""
    a = jnp.asarray(a)
    if a.is_fully_addressable:
        sums = _on_host(np.ascontiguousarray(a))
    else:
        sums = jax.jit(_on_devices)(a)
    shape = "x".join(map(str, a.shape))
    return f"{a.dtype}[{shape}] " + "".join(f"{int(s):08x}" for s in sums)


def checksums(tree: Any) -> dict[str, str]:
    """Path -> checksum of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): checksum(a) for path, a in leaves}


def _mix(x: Any) -> Any:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def _on_host(a: np.ndarray) -> list[int]:
    small = a.dtype.itemsize < 4
    kind = np.dtype(f"u{a.dtype.itemsize}") if small else np.dtype(np.uint32)
    words, sums = a.reshape(-1).view(kind), [0, 0]
    for start in range(0, words.size, PIECE):
        piece = words[start : start + PIECE].astype(np.uint32)
        at = np.arange(start, start + piece.size, dtype=np.uint64).astype(np.uint32)
        for n, seed in enumerate(SEEDS):
            mixed = _mix(piece ^ _mix(at ^ np.uint32(seed)))
            sums[n] = (sums[n] + int(mixed.sum(dtype=np.uint64))) % 2**32
    return sums


def _on_devices(a: jax.Array) -> list[jax.Array]:
    small = a.dtype.itemsize < 4
    kind = jnp.dtype(f"u{a.dtype.itemsize}") if small else jnp.dtype(jnp.uint32)
    a = a.astype(jnp.uint8) if a.dtype == bool else a
    # numbers of 64 bits get an axis of two words more
    words = jax.lax.bitcast_convert_type(a, kind).astype(jnp.uint32)
    at, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        at = at + place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return [_mix(words ^ _mix(at ^ jnp.uint32(seed))).sum(dtype=jnp.uint32)
            for seed in SEEDS]
