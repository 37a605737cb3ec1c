"""Clouds of points, synthetic: surfaces of five bodies, of which a part is missing.

They stand for the scans of the benchmark CAB (PCN's cars, chairs and planes): a half
space is cut off from a body that was turned and scaled, and asked for.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset

BODIES = "box", "sphere", "torus", "cone", "cylinder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clouds(Dataset):
    """`length` points of a body, and the `missing` ones beyond a plane.

    points [B,length,3], missing [B,missing,3] float32, of bodies within 1 of 0; the
    plane lies so that as many are missing.
    """

    length: int = 256
    missing: int = 128

    def __post_init__(self):
        super().__post_init__()
        self.require("missing", self.missing >= 1, "1 or more")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        n = self.length + self.missing
        which = rng.integers(len(BODIES), size=size)
        all_ = np.stack([_surface(rng, BODIES[one], n) for one in which])
        all_ = all_ * rng.uniform(0.5, 1, (size, 1, 3))
        turned = np.linalg.qr(rng.normal(size=(size, 3, 3)))[0]
        all_ = all_ @ turned
        far = np.linalg.norm(all_, axis=-1).max(1)[:, None, None]
        all_ = all_ / far
        side = rng.normal(size=(size, 3, 1))
        order = np.argsort((all_ @ side)[..., 0], 1)
        all_ = np.take_along_axis(all_, order[..., None], 1).astype(np.float32)
        mixed = rng.permuted(np.tile(np.arange(self.length), (size, 1)), axis=1)
        known = np.take_along_axis(all_[:, : self.length], mixed[..., None], 1)
        return {"points": known, "missing": all_[:, self.length:]}


def _surface(rng: np.random.Generator, body: str, n: int) -> np.ndarray:
    """n points [n,3] on the surface of a body around 0."""
    a, b = rng.uniform(0, 2 * np.pi, (2, n))
    u, v = rng.uniform(-1, 1, (2, n))
    ones = np.ones(n)
    if body == "box":
        face = rng.permuted(np.stack([rng.choice((-1.0, 1.0), n), u, v]), axis=0)
        return face.T
    if body == "sphere":
        p = rng.normal(size=(n, 3))
        return p / np.linalg.norm(p, axis=1, keepdims=True)
    if body == "torus":
        r = 1 + 0.4 * np.cos(b)
        return np.stack([r * np.cos(a), r * np.sin(a), 0.4 * np.sin(b)], 1)
    cap = rng.uniform(size=n) < 0.3  # the share of the ends
    r = np.sqrt(rng.uniform(size=n))
    if body == "cone":
        height = np.where(cap, -ones, 1 - 2 * r)
        return np.stack([r * np.cos(a), r * np.sin(a), height], 1)
    r, height = np.where(cap, r, 1), np.where(cap, np.sign(u), u)
    return np.stack([r * np.cos(a), r * np.sin(a), height], 1)
