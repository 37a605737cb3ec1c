"""Dataset: where batches come from, each a pure function of (seed, split, step, size).

There is no loader and no loader state: a run that stops at step 700 goes on with
`dataset.batch(700, size)`, and two hosts draw the same batch or, with other seeds,
other ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

SPLITS = ("train", "valid")
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows of `length` tokens below `vocab`; subclasses say what stands in them.

    `seed` (0 or more) and `split` ("train" or "valid") choose the stream of batches.
    """

    length: int = 256
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        self.require("length", self.length >= 1, "1 or more tokens")
        self.require("seed", self.seed >= 0, "0 or more")
        self.require("split", self.split in SPLITS, "'train' or 'valid'")

    def require(self, field: str, holds: bool, expected: str) -> None:
        """Raises ValueError, naming field, value and what was expected."""
        if not holds:
            name, value = type(self).__name__, getattr(self, field)
            raise ValueError(f"{name}: {field}={value!r}: expected {expected}")

    def batch(self, step: int, size: int) -> Batch:
        """`size` rows B for step `step`: tokens [B,T], targets [B,T] int32, and
        segments [B,T] int32 where rows are packed. Target -1 counts for no loss."""
        if step < 0 or size < 1:
            raise ValueError(f"batch({step}, {size}): expected a step of 0 or more and "
                             "a size of 1 or more rows")
        stream = (self.seed, SPLITS.index(self.split), step)
        return self.draw(np.random.default_rng(stream), size)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """The rows of one batch."""
        raise NotImplementedError(f"{type(self).__name__} draws no batches")


@dataclasses.dataclass(frozen=True)
class Cycle:
    """Datasets in turn: batch n is that of dataset n mod their number. They share their
    shapes, so that a model compiles once."""

    datasets: tuple[Dataset, ...]

    def __post_init__(self):
        if len({dataset.length for dataset in self.datasets}) != 1:
            raise ValueError("Cycle: expected one or more datasets of one length")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.datasets[0].length

    def batch(self, step: int, size: int) -> Batch:
        """The batch of the dataset whose turn it is."""
        return self.datasets[step % len(self.datasets)].batch(step, size)


@dataclasses.dataclass(frozen=True)
class Grown:
    """Datasets one after the other: each of `first`, (dataset, steps), for so many
    steps, then `last`. A batch has as many tokens in all of them: rows are longer, and
    fewer, from one to the next. ValueError unless each length divides the last one."""

    first: tuple[tuple[Any, int], ...]
    last: Any

    def __post_init__(self):
        for dataset, _ in self.first:
            if self.length % dataset.length:
                raise ValueError(f"Grown: length={dataset.length}: expected a divisor "
                                 f"of the last one, {self.length}")

    @property
    def length(self) -> int:
        """Tokens of a row in the end."""
        return self.last.length

    def batch(self, step: int, size: int) -> Batch:
        """The batch of the dataset that the step falls into; `size`: rows of `last`."""
        for dataset, steps in self.first:
            if step < steps:
                return dataset.batch(step, size * (self.length // dataset.length))
            step -= steps
        return self.last.batch(step, size)


def row(sequence: np.ndarray, answers: np.ndarray) -> Batch:
    """tokens and targets [B,T] of sequences [B,T+1], where `answers` [B,T+1] marks the
    tokens that have to be predicted."""
    targets = np.where(answers[:, 1:], sequence[:, 1:], -1)
    tokens = sequence[:, :-1]
    return {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32)}


def chosen(rng: np.random.Generator, size: int, many: int, n: int,
           log_weight: Any = 0.0) -> np.ndarray:
    """n of `many` without replacement for each of `size` rows, in the order drawn.

    The Gumbel top-k trick: the n largest of log_weight [many] + Gumbel noise are drawn
    one after the other with probabilities proportional to exp(log_weight).
    """
    score = log_weight + rng.gumbel(size=(size, many))
    top = np.argpartition(-score, n - 1, axis=1)[:, :n]
    order = np.argsort(-np.take_along_axis(score, top, 1), axis=1)
    return np.take_along_axis(top, order, 1)
