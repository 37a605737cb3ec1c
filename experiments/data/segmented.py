"""Segmented: documents in segments; a fact is stated once and asked for later."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset, chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmented(Dataset):
    """Noise in segments of `segment` tokens, in each of which `facts` names get a
    number; from the second on, `asked` names of earlier ones are asked for.

    tokens [B,T]: ids below `noise` are noise, then come a question for each name, a
    fact "name = number", one token, for each name and number, and an answer for each of
    `values` numbers. Each name is stated once in a row, in any segment. The target, at
    a question, is the answer; distance [B,T] int32, how many segments back its fact
    stands, is uniform among those that there are, 0 where nothing is asked. Chance:
    1/values.
    """

    length: int = 128
    segment: int = 16
    facts: int = 2
    asked: int = 4
    values: int = 8
    noise: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name in ("segment", "facts", "asked", "values", "noise"):
            self.require(name, getattr(self, name) >= 1, "1 or more")
        self.require("segment", self.facts + self.asked <= self.segment,
                     f"facts={self.facts} and asked={self.asked} to fit in it")
        whole = self.length % self.segment == 0 and self.length >= 2 * self.segment
        self.require("length", whole, f"2 or more times segment={self.segment}")

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return self.length // self.segment

    @property
    def names(self) -> int:
        """How many names there are, each stated once in a row."""
        return self.segments * self.facts

    @property
    def first(self) -> int:
        """The id of the first fact."""
        return self.noise + self.names

    @property
    def answers(self) -> int:
        """The id of the first answer."""
        return self.first + self.names * self.values

    @property
    def vocab(self) -> int:
        """How many ids there are."""
        return self.answers + self.values

    def states(self, tokens: np.ndarray) -> np.ndarray:
        """Which tokens are facts."""
        return (tokens >= self.first) & (tokens < self.answers)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        n, many = self.segments, self.facts + self.asked
        shape = size, n, self.segment
        tokens = rng.integers(self.noise, size=shape)
        targets, distance = np.full(shape, -1), np.zeros(shape, int)
        name = chosen(rng, size, self.names, self.names).reshape(size, n, self.facts)
        value = rng.integers(self.values, size=name.shape)
        at = chosen(rng, size * n, self.segment, many).reshape(size, n, many)
        told, asked = at[..., :self.facts], at[:, 1:, self.facts:]
        np.put_along_axis(tokens, told, self.first + name * self.values + value, 2)
        here = np.arange(1, n)[:, None]
        back = rng.integers(1, here + 1, size=asked.shape)  # [B,N-1,asked]
        which = np.arange(size)[:, None, None], here - back, rng.integers(
            self.facts, size=asked.shape)
        for array, found in ((tokens, self.noise + name[which]), (distance, back),
                             (targets, self.answers + value[which])):
            np.put_along_axis(array[:, 1:], asked, found, 2)
        return {key: array.reshape(size, -1).astype(np.int32) for key, array in (
            ("tokens", tokens), ("targets", targets), ("distance", distance))}
