"""How arrays lie for the linear memory's kernels on TPU: steps of 128 tokens, in which
chunks have tiles of 16, 32 or 64, and their numbers stand side by side in the lanes.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.memory.api import STEP


def laid(static, a, steps: int):
    """[B,T,H,X] -> [B,H,steps STEP,X], chunks in tiles, padded behind."""
    many, (b, t, h, x) = steps * STEP // static.tile, a.shape
    a = jnp.pad(a, ((0, 0), (0, many * static.chunk - t), (0, 0), (0, 0)))
    a = a.reshape(b, many, static.chunk, h, x)
    a = jnp.pad(a, [(0, 0)] * 2 + [(0, static.tile - static.chunk)] + [(0, 0)] * 2)
    return a.reshape(b, steps * STEP, h, x).transpose(0, 2, 1, 3)


def unlaid(static, a):
    """The inverse of `laid`."""
    b, h, _, x = a.shape
    a = a.transpose(0, 2, 1, 3).reshape(b, -1, static.tile, h, x)
    return a[:, :, :static.chunk].reshape(b, -1, h, x)[:, :static.t]


def side_by_side(side, c: int):
    """[B,H,N,R,c] -> [B,H,N c/STEP,R,STEP]."""
    b, h, many, rows, _ = side.shape
    side = side.reshape(b, h, -1, STEP // c, rows, c).swapaxes(3, 4)
    return side.reshape(b, h, -1, rows, STEP)


def one_by_one(side, c: int):
    """The inverse of `side_by_side`."""
    b, h, steps, rows, _ = side.shape
    side = side.reshape(b, h, steps, rows, STEP // c, c).swapaxes(3, 4)
    return side.reshape(b, h, -1, rows, c)
