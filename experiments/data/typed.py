"""Typed: facts far back, one of each type, and questions that name a type."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset, chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Typed(Dataset):
    """Noise in which `types` facts stand among the first `first` tokens, and, in the
    second half of the row, each type twice as a question.

    tokens [B,T]: ids below `noise` are noise, then come a question for each type, a
    fact for each type and value, and an answer for each of `values`. The target, at a
    question, is the answer with the value of the type's fact. Chance: 1/values.
    """

    length: int = 128
    first: int = 32
    types: int = 16
    values: int = 4
    noise: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name in ("types", "values", "noise"):
            self.require(name, getattr(self, name) >= 1, "1 or more")
        half = self.length // 2
        self.require("length", half >= 2 * self.types, f"{4 * self.types} or more")
        self.require("first", self.types <= self.first <= half,
                     f"types={self.types} to half of the row, {half}")

    @property
    def facts(self) -> int:
        """The id of the first fact."""
        return self.noise + self.types

    @property
    def answers(self) -> int:
        """The id of the first answer."""
        return self.facts + self.types * self.values

    @property
    def vocab(self) -> int:
        """How many ids there are."""
        return self.answers + self.values

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        half, types = self.length // 2, np.arange(self.types)
        tokens = rng.integers(self.noise, size=(size, self.length))
        targets = np.full_like(tokens, -1)
        value = rng.integers(self.values, size=(size, self.types))
        np.put_along_axis(tokens, chosen(rng, size, self.first, self.types),
                          self.facts + types * self.values + value, 1)
        at = half + chosen(rng, size, half, 2 * self.types)
        np.put_along_axis(tokens, at, np.tile(self.noise + types, (size, 2)), 1)
        np.put_along_axis(targets, at, np.tile(self.answers + value, (1, 2)), 1)
        return {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32)}
