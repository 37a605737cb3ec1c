"""Shapes, synthetic: small images of ellipses and bars, sharp and made small.

They stand for the faces of the benchmark CAB (FFHQ to CelebA-HQ): edges that a small
image only hints at.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset

SCALE = 4  # of a side
SHADES = 4  # points of a pixel's side that are tested, for smooth edges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes(Dataset):
    """Grey images of `length` x `length` pixels in -1..1: three shapes, each an ellipse
    or a bar, over each other.

    sharp [B,n,n,1] float32; given [B,n,n,1]: means of 4 x 4 pixels, made large again.
    """

    length: int = 32

    def __post_init__(self):
        super().__post_init__()
        self.require("length", self.length % (2 * SCALE) == 0,
                     f"a multiple of {2 * SCALE}")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        n = self.length
        fine = (np.arange(n * SHADES) + 0.5) / (n * SHADES)  # of 0..1
        y, x = fine[:, None], fine[None]
        image = np.full((size, n * SHADES, n * SHADES), -1.0)
        for _ in range(3):
            value = lambda low, high: rng.uniform(low, high, (size, 1, 1))
            a, b = x - value(0.2, 0.8), y - value(0.2, 0.8)
            turn = value(0, np.pi)
            u, v = np.cos(turn) * a + np.sin(turn) * b, np.cos(turn) * b - np.sin(
                turn) * a
            u, v = u / value(0.08, 0.3), v / value(0.08, 0.3)
            round_ = value(0, 1) < 0.5
            inside = np.where(round_, u * u + v * v < 1, (abs(u) < 1) & (abs(v) < 1))
            image = np.where(inside, value(-0.5, 1), image)
        sharp = _means(image, SHADES)
        given = np.repeat(np.repeat(_means(sharp, SCALE), SCALE, 1), SCALE, 2)
        return {"sharp": sharp[..., None].astype(np.float32),
                "given": given[..., None].astype(np.float32)}


def _means(images: np.ndarray, of: int) -> np.ndarray:
    """images [B,n,n] -> [B,n/of,n/of], means of of x of pixels."""
    b, n, _ = images.shape
    return images.reshape(b, n // of, of, n // of, of).mean((2, 4))
