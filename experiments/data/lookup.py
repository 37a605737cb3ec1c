"""Lookup: facts told by sources that contradict each other, and questions about them.

Numbered sentences "attribute source entity value number", in which each fact is told by
two sources with different values, and questions "form attribute source entity" that say
whom to trust. One form asks for the value, the other for the number of the sentence.
`Copies` is what comes before: texts that begin again.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.data.dataset import Batch, Dataset, chosen

ASK, FIND = 0, 1  # the two forms of a question
SOURCES, ENTITIES, ATTRIBUTES, VALUES = 8, 24, 4, 24
SENTENCES, WORDS, QUESTION = 12, 5, 4
AT = 2 + np.cumsum([0, SOURCES, ENTITIES, ATTRIBUTES, VALUES, SENTENCES])


class Facts(NamedTuple):
    """tokens [B,T] of the context and a question that asks; sentence [B], the one that
    answers it; answer [B], the token of its value."""

    tokens: np.ndarray
    sentence: np.ndarray
    answer: np.ndarray


def facts(rng: np.random.Generator, size: int) -> Facts:
    """Six facts, each told by two sources with different values, in any order."""
    parts = told(rng, size, SENTENCES)
    sentence = rng.integers(0, SENTENCES, size)
    own = parts[np.arange(size), sentence]
    tokens = np.concatenate([parts.reshape(size, -1), asked(own, ASK)], 1)
    return Facts(tokens.astype(np.int32), sentence, own[:, 3])


def told(rng: np.random.Generator, size: int, sentences: int) -> np.ndarray:
    """Sentences [B,n,WORDS], n even: half as many facts, each told by two sources."""
    half = sentences // 2
    entity = AT[1] + chosen(rng, size, ENTITIES, half)
    attribute = AT[2] + rng.integers(0, ATTRIBUTES, (size, half))
    source = AT[0] + chosen(rng, size, SOURCES, 2)
    value = AT[3] + chosen(rng, size, VALUES, sentences)
    parts = np.stack([np.tile(attribute, 2), np.repeat(source, half, 1),
                      np.tile(entity, 2), value], 2)
    order = chosen(rng, size, sentences, sentences)
    parts = np.take_along_axis(parts, order[..., None], 1)
    # rising, and any of the twelve where there are fewer sentences
    number = AT[4] + np.sort(chosen(rng, size, SENTENCES, sentences), 1)
    return np.concatenate([parts, number[..., None]], 2)


def asked(own: np.ndarray, form) -> np.ndarray:
    """The question [...,QUESTION] about a sentence [...,WORDS]."""
    form = np.broadcast_to(form, own.shape[:-1])[..., None]
    return np.concatenate([form, own[..., :3]], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup(Dataset):
    """Facts to train on: a question about each of `sentences` (even, 2 to 12), in any
    order, in one of the two forms; the answer is the target of its last token. find:
    the share that asks for the number. Rows have `sentences` (WORDS + QUESTION)
    tokens."""

    length: int = SENTENCES * (WORDS + QUESTION)
    find: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        of_two = 2 * (WORDS + QUESTION)
        self.require("length", self.length in range(
            of_two, SENTENCES * (WORDS + QUESTION) + 1, of_two),
            f"a multiple of {of_two}, of {SENTENCES} sentences at most")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        n = self.length // (WORDS + QUESTION)
        parts = told(rng, size, n)
        order = chosen(rng, size, n, n)
        own = np.take_along_axis(parts, order[..., None], 1)  # [B,n,WORDS]
        find = rng.random((size, n)) < self.find
        questions = asked(own, np.where(find, FIND, ASK))
        tokens = np.concatenate([parts.reshape(size, -1), questions.reshape(size, -1)],
                                1).astype(np.int32)
        targets = np.full_like(tokens, -1)
        targets[:, n * WORDS + QUESTION - 1 :: QUESTION] = np.where(
            find, own[..., 4], own[..., 3])
        return {"tokens": tokens, "targets": targets}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies(Dataset):
    """Texts of twelve different words of a lookup's vocabulary that begin again after 4
    tokens or more, up to half of `length`: what comes next is known from there on, from
    the tokens before it and not from the last one alone."""

    length: int = 36
    words: int = 12

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        period = rng.integers(4, self.length // 2 + 1, size)[:, None]
        vocabulary = 2 + chosen(rng, size, int(AT[-1]) - 2, self.words)
        once = np.take_along_axis(
            vocabulary, rng.integers(0, self.words, (size, self.length)), 1)
        at = np.arange(self.length)[None]
        tokens = np.take_along_axis(once, at % period, 1)
        following = np.take_along_axis(once, (at + 1) % period, 1)
        targets = np.where(at >= period, following, -1)
        return {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32)}
