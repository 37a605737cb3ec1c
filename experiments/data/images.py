"""Images: datasets of pictures that are on the machine, or made up, and never fetched.

Digits and photographs come with scikit-learn (the extra `images`), spectral cubes are
drawn from a model of mixed materials. A batch is a pure function of seed, split, step
and size, as with text.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from experiments.data.dataset import Batch, Dataset


def _datasets():
    try:
        from sklearn import datasets
    except ImportError:
        raise ValueError(
            "scikit-learn is not installed: expected pip install 'attn[images]'"
        ) from None
    return datasets


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797,8,8] in 0..1 and labels [1797], in a fixed random order."""
    found = _datasets().load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order] / 16).astype(np.float32), found.target[order]


@functools.cache
def _photo(name: str) -> np.ndarray:
    """A colour photograph [427,640,3] in 0..1."""
    image = _datasets().load_sample_image(name)
    return (np.asarray(image) / 255).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """Handwritten digits, 8 x 8 grey pixels (UCI; Alpaydin & Kaynak, 1998): x [B,8,8,1]
    float32 in 0..1 and labels [B] int32. The last fifth of 1,797 is held out. zoom: so
    many pixels a side for each, all alike: 4 makes 32 x 32."""

    zoom: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.require("zoom", self.zoom >= 1, "1 or more")

    def whole(self) -> Batch:
        """All pictures of the split."""
        x, labels = _digits()
        cut = len(x) * 4 // 5
        part = slice(None, cut) if self.split == "train" else slice(cut, None)
        x = x[part, ..., None].repeat(self.zoom, 1).repeat(self.zoom, 2)
        return {"x": x, "labels": labels[part].astype(np.int32)}

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        all_of_it = self.whole()
        at = rng.integers(len(all_of_it["x"]), size=size)
        return {name: a[at] for name, a in all_of_it.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Dataset):
    """Images beside smaller ones: y [B,s h,s w,bands] and x [B,h,w,bands], the means of
    squares of s x s pixels. `size` is the side of x, `scale` is s; values are in 0..1.
    """

    size: int = 16
    scale: int = 4

    def __post_init__(self):
        super().__post_init__()
        self.require("size", self.size >= 1, "1 or more pixels")
        self.require("scale", self.scale >= 2, "2 or more")

    @property
    def bands(self) -> int:
        """Channels of a pixel."""
        raise NotImplementedError

    def pair(self, y: np.ndarray) -> Batch:
        """y beside what is left of it at low size."""
        b, h, w, c = y.shape
        s = self.scale
        x = y.reshape(b, h // s, s, w // s, s, c).mean((2, 4))
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photos(Pairs):
    """Pieces of a colour photograph that comes with scikit-learn: china.jpg, a temple,
    or flower.jpg. The middle third of its columns is held out."""

    name: str = "china.jpg"

    def __post_init__(self):
        super().__post_init__()
        known = ("china.jpg", "flower.jpg")
        self.require("name", self.name in known, f"one of {known}")

    @property
    def bands(self) -> int:
        return 3

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        image, side = _photo(self.name), self.size * self.scale
        height, third = image.shape[0], image.shape[1] // 3
        most = min(height, third)
        self.require("size", side <= most, f"size * scale of {most} or less")
        rows = rng.integers(height - side + 1, size=size)
        columns = rng.integers(third - side + 1, size=size)
        sides = rng.integers(2, size=size) * 2 if self.split == "train" else 1
        columns = columns + third * sides
        return self.pair(np.stack([
            image[r:r + side, c:c + side] for r, c in zip(rows, columns)
        ]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectra(Pairs):
    """Cubes of mixed materials: a few smooth spectra, fixed by the seed, in shares that
    change slowly over the image, softmax of low-pass noise."""

    many: int = 31
    materials: int = 4
    smooth: float = 4.0

    @property
    def bands(self) -> int:
        return self.many

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        # the materials are the same in both splits
        fixed = np.random.default_rng((self.seed, 7))
        at = np.linspace(0, 1, self.many)
        waves = fixed.normal(size=(self.materials, 5)) / (1 + np.arange(5))
        basis = np.cos(np.pi * np.arange(5)[:, None] * at)
        spectra = 1 / (1 + np.exp(-2 * waves @ basis))
        side = self.size * self.scale
        noise = rng.normal(size=(size, side, side, self.materials))
        shares = np.exp(8 * _low_pass(noise, self.smooth))
        shares /= shares.sum(-1, keepdims=True)
        return self.pair(shares @ spectra)


def _low_pass(noise: np.ndarray, smooth: float) -> np.ndarray:
    """noise [B,h,w,C] without what changes within `smooth` pixels, of unit variance."""
    h, w = noise.shape[1:3]
    y, x = np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None]
    keep = np.exp(-2 * (np.pi * smooth) ** 2 * (y**2 + x**2) / 4)[None, ..., None]
    soft = np.fft.ifft2(np.fft.fft2(noise, axes=(1, 2)) * keep, axes=(1, 2)).real
    return soft / soft.std()
