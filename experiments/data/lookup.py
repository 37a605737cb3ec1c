"""Lookup: facts told by sources that contradict each other, and a question about one.

Twelve sentences "source entity attribute value", in which each fact is told by two
sources with different values, and a question that says whom to trust; a second form of
question asks for the number of the sentence.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.data.dataset import Batch, Dataset, chosen

ASK, FIND = 0, 1  # the two forms of a question
SOURCES, ENTITIES, ATTRIBUTES, VALUES = 8, 24, 4, 24
SENTENCES, WORDS = 12, 4
AT = 2 + np.cumsum([0, SOURCES, ENTITIES, ATTRIBUTES, VALUES, SENTENCES])
LENGTH = SENTENCES * WORDS + 4


class Facts(NamedTuple):
    """tokens [B,T] of the context and a question that asks; sentence [B], the one that
    answers it; answer [B], the token of its value."""

    tokens: np.ndarray
    sentence: np.ndarray
    answer: np.ndarray


def facts(rng: np.random.Generator, size: int) -> Facts:
    """Six facts, each told by two sources with different values, in any order."""
    half = SENTENCES // 2
    entity = AT[1] + chosen(rng, size, ENTITIES, half)
    attribute = AT[2] + rng.integers(0, ATTRIBUTES, (size, half))
    source = AT[0] + chosen(rng, size, SOURCES, 2)
    value = AT[3] + chosen(rng, size, VALUES, SENTENCES)
    parts = np.stack([np.repeat(source, half, 1), np.tile(entity, 2),
                      np.tile(attribute, 2), value], 2)
    order = chosen(rng, size, SENTENCES, SENTENCES)
    parts = np.take_along_axis(parts, order[..., None], 1)
    sentence = rng.integers(0, SENTENCES, size)
    own = parts[np.arange(size), sentence]
    question = np.concatenate([np.full((size, 1), ASK), own[:, :3]], 1)
    tokens = np.concatenate([parts.reshape(size, -1), question], 1)
    return Facts(tokens.astype(np.int32), sentence, own[:, 3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup(Dataset):
    """Facts to train on: a question in one of the two forms, whose answer is the target
    of the last token."""

    length: int = LENGTH

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        found = facts(rng, size)
        tokens, targets = found.tokens.copy(), np.full_like(found.tokens, -1)
        find = rng.random(size) < 0.5
        tokens[:, -4] = np.where(find, FIND, ASK)
        targets[:, -1] = np.where(find, AT[4] + found.sentence, found.answer)
        return {"tokens": tokens, "targets": targets}
