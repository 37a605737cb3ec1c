"""Summaries, synthetic: documents whose names, in order, are their summary.

They stand for the news of the benchmark CAB (Multi-News): most of a document is of no
account, what counts is spread over all of it, and the summary is much shorter. Here
what counts is known by its word alone, and sections are of one length.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset

START = 0
WORDS = 2  # of a section that belong to the summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summaries(Dataset):
    """Documents of `length` tokens S in `sections`; each has two names somewhere, one
    behind the other, and other words around them.

    source [B,S] int32; summary [B,T] int32, T = 2 sections: the names; before [B,T]:
    the summary moved by one behind the start symbol. Ids below `vocab`: 0 starts, the
    upper half are names.
    """

    length: int = 48
    sections: int = 6
    vocab: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.require("vocab", self.vocab > 4, "more than 4")
        fits = self.sections >= 1 and self.length % self.sections == 0
        self.require("sections", fits and self.length // self.sections >= WORDS,
                     f"a divisor of length={self.length}, with {WORDS} tokens a "
                     "section or more")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        each, half = self.length // self.sections, self.vocab // 2
        words = rng.integers(1, half, (size, self.sections, each))
        at = rng.integers(each - WORDS + 1, size=(size, self.sections, 1))
        names = rng.integers(half, self.vocab, (size, self.sections, WORDS))
        np.put_along_axis(words, at + np.arange(WORDS), names, 2)
        summary = names.reshape(size, -1)
        before = np.pad(summary[:, :-1], ((0, 0), (1, 0)), constant_values=START)
        return {"source": words.reshape(size, -1).astype(np.int32),
                "summary": summary.astype(np.int32), "before": before.astype(np.int32)}
