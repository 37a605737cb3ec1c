"""Clauses: texts with delimiters, whose mood has to be named."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset

BEGIN, STOP, JUDGE = 0, 1, 2
MOODS, WORDS, LABELS = np.arange(3, 15), np.arange(15, 47), np.arange(47, 50)
VOCAB = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clauses(Dataset):
    """BEGIN, then clauses of three words of which one may have a mood (4 words for each
    of 3), each with STOP behind; JUDGE, whose target is the mood of most."""

    length: int = 34

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        count = (self.length - 2) // 4
        mood = rng.integers(0, 3, (size, count))
        says = rng.random((size, count)) < 0.7
        tokens = np.full((size, count, 4), STOP, np.int32)
        tokens[..., :3] = rng.choice(WORDS, (size, count, 3))
        place = rng.integers(0, 3, (size, count, 1))
        word = MOODS[mood * 4 + rng.integers(0, 4, (size, count))]
        own = np.take_along_axis(tokens, place, 2)
        np.put_along_axis(tokens, place, np.where(says[..., None], word[..., None],
                                                  own), 2)
        votes = np.stack([(says & (mood == n)).sum(1) for n in range(3)], 1)
        ends = [np.full((size, 1), n, np.int32) for n in (BEGIN, JUDGE)]
        text = np.concatenate([ends[0], tokens.reshape(size, -1), ends[1]], 1)
        targets = np.full_like(text, -1)
        targets[:, -1] = LABELS[votes.argmax(1)]  # of equals the first
        return {"tokens": text, "targets": targets}
