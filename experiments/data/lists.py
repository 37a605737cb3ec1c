"""Lists of numbers, and what algorithms make of them (Back De Luca et al., 2024,
arXiv:2410.01686): sums, least ones, medians, sorting, the best run."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from experiments.data.dataset import Batch, Dataset


def sums(x: np.ndarray) -> np.ndarray:
    """The sum of each prefix. x [B,n], as of all tasks -> [B,n]."""
    return np.cumsum(x, 1)


def least(x: np.ndarray) -> np.ndarray:
    """The least of each prefix."""
    return np.minimum.accumulate(x, 1)


def median(x: np.ndarray) -> np.ndarray:
    """The median of each prefix, the middle of the middle two if it is even."""
    return np.stack([np.median(x[:, :n + 1], 1) for n in range(x.shape[1])], 1)


def ordered(x: np.ndarray) -> np.ndarray:
    """The numbers in rising order."""
    return np.sort(x, 1)


def best_run(x: np.ndarray) -> np.ndarray:
    """The greatest sum of a run of neighbours within each prefix (Kadane)."""
    here = best = x[:, 0]
    found = [best]
    for n in range(1, x.shape[1]):
        here = np.maximum(x[:, n], here + x[:, n])  # of runs that end here
        best = np.maximum(best, here)
        found.append(best)
    return np.stack(found, 1)


TASKS = {"sum": sums, "min": least, "median": median, "sort": ordered,
         "run": best_run}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists(Dataset):
    """Lists x [B,n+1,1] and what `task` makes of them, y [B,n+1,1], float32; the last
    one is a scratch token, 0 in both. A list's n = `length` numbers are uniform between
    two that are uniform in [-reach, reach] times `scale`. With a scale other than 1 at
    least one of the two lies outside of what is trained on. many: the training set's
    lists, of which batches are drawn; None: new ones in every batch.
    """

    length: int = 8
    task: str = "sum"
    reach: float = 2.0
    scale: float = 1.0
    many: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require("task", self.task in TASKS, f"one of {tuple(TASKS)}")
        self.require("reach", self.reach > 0, "more than 0")
        self.require("scale", self.scale >= 1, "1 or more")
        self.require("many", self.many is None or self.many >= 1, "1 or more, or None")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        if self.many is None or self.split != "train":
            return self.lists(rng, size)
        all_of_it = _fixed(self)
        at = rng.integers(self.many, size=size)
        return {name: a[at] for name, a in all_of_it.items()}

    def lists(self, rng: np.random.Generator, size: int) -> Batch:
        """New lists."""
        far = self.reach * self.scale
        ends = np.sort(rng.uniform(-far, far, (size, 2)), 1)
        while self.scale > 1:
            known = (np.abs(ends) <= self.reach).all(1)
            if not known.any():
                break
            ends[known] = np.sort(rng.uniform(-far, far, (int(known.sum()), 2)), 1)
        x = rng.uniform(ends[:, :1], ends[:, 1:], (size, self.length))
        scratch = (0, 0), (0, 1)
        return {name: np.pad(a, scratch)[..., None].astype(np.float32)
                for name, a in (("x", x), ("y", TASKS[self.task](x)))}


@functools.lru_cache(4)
def _fixed(lists: Lists) -> Batch:
    """The training set."""
    rng = np.random.default_rng((lists.seed, 11))
    return lists.lists(rng, lists.many or 1)
