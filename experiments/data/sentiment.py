"""Sentiment: short texts with cue words, some for and some against, and much filler.

A made task (proposed, not published), in the place of reviews: the label of a text is
the sign of the sum of its cues' strengths, and a negation before a cue turns it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


class Labelled(NamedTuple):
    """tokens [N,T] int32, 0 is padding; label [N], 0.0 or 1.0."""

    tokens: np.ndarray
    label: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sentiment:
    """Texts of 8 to `longest` words, 2 to 5 of them cues (at most half); negated: the
    share of cues behind a negation; noise: the share of labels that are turned."""

    fillers: int = 140
    negated: float = 0.0
    noise: float = 0.05
    cues: int = 20  # for, and as many against
    longest: int = 30

    def __post_init__(self):
        if self.longest < 12:  # five cues, each with its negation, and filler
            raise ValueError(f"Sentiment: longest={self.longest}: expected 12 or more")
        for name in ("negated", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"Sentiment: {name}={getattr(self, name)}: expected 0 to 1")

    @property
    def vocab(self) -> int:
        """Padding, the negation, cues for, cues against, fillers."""
        return 2 + 2 * self.cues + self.fillers

    def draw(self, rng: np.random.Generator, many: int, clean: bool) -> Labelled:
        """`many` texts; clean: no label is turned."""
        texts = np.zeros((many, self.longest), np.int32)
        label = np.zeros(many)
        strength = np.linspace(0.5, 2, self.cues)
        for n in range(many):
            texts[n], label[n] = self._text(rng, strength)
        if not clean:
            label = np.where(rng.random(many) < self.noise, 1 - label, label)
        return Labelled(texts, label)

    def _text(self, rng, strength) -> tuple[np.ndarray, float]:
        size = int(rng.integers(8, self.longest + 1))
        count = min(int(rng.integers(2, 6)), size // 2)
        which = rng.integers(self.cues, size=count)
        against = rng.integers(2, size=count)
        turned = rng.random(count) < self.negated
        sign = np.where(against ^ turned, -1, 1)
        words = rng.integers(self.fillers, size=self.longest) + 2 + 2 * self.cues
        words[size:] = 0
        # each cue with the place before it, where its negation may stand
        free = np.sort(rng.choice(size - count, count, replace=False))
        at = free + np.arange(count) + 1
        words[at] = 2 + against * self.cues + which
        words[at[turned] - 1] = 1
        return words, float((sign * strength[which]).sum() > 0)
