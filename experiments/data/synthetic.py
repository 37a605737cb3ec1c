"""Puzzles: synthetic data on which recall can be counted (MQAR, copying, needles)."""

from __future__ import annotations

import dataclasses

import numpy as np

from experiments.data.dataset import Batch, Dataset, chosen, row
from experiments.data.corpus import Corpus

IGNORED = -100  # the label of positions without a target in the published generator


def mqar(
    vocab: int,
    examples: int,
    length: int,
    pairs: int,
    power: float = 0.01,
    seed: int = 0,
    random_non_queries: bool = True,
    passes: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """MQAR (Arora et al., 2023) arXiv:2312.04927: the published draw, bit for bit.

    Returns inputs and labels [examples, length] int64; labels are -100 but at queries.
    The draws are those of numpy's legacy generator with `seed`. The published code
    takes the random ids between queries from an unseeded generator of another
    library; here they come last from the same one, so the rest is equal either way.
    """
    Recall(vocab=vocab, length=length, pairs=pairs, power=power, passes=passes)
    if examples < 1:
        raise ValueError(f"mqar: examples={examples}: expected 1 or more")
    legacy = np.random.RandomState(seed)
    many = lambda pool, n, p=None: np.stack(
        [legacy.choice(pool, n, replace=False, p=p) for _ in range(examples)]
    )
    keys = many(np.arange(1, vocab // 2), pairs)
    values = many(np.arange(vocab // 2, vocab), pairs)
    space = (length - 2 * pairs * passes) // 2
    gaps = many(np.arange(space), pairs, _gap_weights(space, power))
    inputs, targets = _ask(keys, values, gaps, length, passes)
    if random_non_queries:
        inputs = np.where(inputs == 0, legacy.randint(vocab, size=inputs.shape), inputs)
    return inputs, np.where(targets < 0, IGNORED, targets)


def _gap_weights(space: int, power: float) -> np.ndarray:
    """The probability [space] of each distance i = 1, 2, ...: a i^(a-1), normalised."""
    weight = power * np.arange(1, space + 1) ** (power - 1)
    return weight / weight.sum()


def _ask(keys, values, gaps, length: int, passes: int):
    """Inputs and targets [B,length]: the pairs [B,n] `passes` times, then at an even
    distance `2 gaps` behind them each key again, whose target is its value."""
    pairs = np.stack([keys, values], 2).reshape(len(keys), -1)
    context = np.tile(pairs, (1, passes))
    inputs = np.zeros((len(keys), length), np.int64)
    inputs[:, : context.shape[1]] = context
    targets = np.full_like(inputs, -1)
    place = context.shape[1] + 2 * gaps
    np.put_along_axis(inputs, place, keys, 1)
    np.put_along_axis(targets, place, values, 1)
    return inputs, targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Dataset):
    """Multi-query associative recall: `pairs` keys with values, then every key again.

    tokens [B,T]: k1 v1 k2 v2 ..., then the keys at distances that follow a power law
    (`power` near 0: close to the pairs; 1: anywhere). The target, at the position of
    the repeated key, is its value. Keys are 1..vocab/2-1, values vocab/2..vocab-1, and
    between the queries stands 0, or any id if `random_non_queries`. `passes` repeats
    the pairs before the queries. Chance: 2/vocab for a value, 1/pairs for a value seen.
    """

    vocab: int = 8192
    length: int = 256
    pairs: int = 16
    power: float = 0.01
    random_non_queries: bool = True
    passes: int = 1

    def __post_init__(self):
        super().__post_init__()
        self.require("pairs", self.pairs >= 1, "1 or more")
        self.require("passes", self.passes >= 1, "1 or more")
        self.require("power", self.power > 0, "more than 0")
        self.require("length", self.length % 2 == 0, "an even number")
        more = f"more than length={self.length}"
        self.require("vocab", self.vocab > self.length, more)
        need = 2 * self.pairs * (self.passes + 1)
        room = f"{need} or more for pairs and queries"
        self.require("length", self.length >= need, room)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        half = self.vocab // 2
        keys = 1 + chosen(rng, size, half - 1, self.pairs)
        values = half + chosen(rng, size, self.vocab - half, self.pairs)
        space = (self.length - 2 * self.pairs * self.passes) // 2
        weights = np.log(_gap_weights(space, self.power))
        gaps = chosen(rng, size, space, self.pairs, weights)
        tokens, targets = _ask(keys, values, gaps, self.length, self.passes)
        if self.random_non_queries:
            noise = rng.integers(self.vocab, size=tokens.shape)
            tokens = np.where(tokens == 0, noise, tokens)
        return {"tokens": tokens.astype(np.int32), "targets": targets.astype(np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Dataset):
    """A random string, a separator, and the string again, which has to be predicted.

    tokens [B,T]: T/2 symbols, 0, the first T/2 - 1 symbols; the targets are the T/2
    symbols, from the position of the separator on. Symbols are 1..vocab-1, 0 is the
    separator. Chance: 1/(vocab-1).
    """

    vocab: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.require("vocab", self.vocab >= 3, "3 or more: a separator and two symbols")
        self.require("length", self.length % 2 == 0, "an even number")

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        half = self.length // 2
        text = rng.integers(1, self.vocab, (size, half))
        sequence = np.concatenate([text, np.zeros((size, 1), int), text], 1)
        answers = np.broadcast_to(np.arange(self.length + 1) > half, sequence.shape)
        return row(sequence, answers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles(Dataset):
    """Needles in a haystack: `needles` keys with answers, hidden in noise or in text.

    tokens [B,T]: the hay, in which stand needles `NEEDLE key a_1 .. a_n` at random
    places, and at the end `questions` questions `ASK key a_1 .. a_n` about some,
    of which the last lacks a_n. The targets are the answers' n = `answer` tokens. With
    `depth` the needle that is asked for lies there: 0 is the beginning, 1 the end.

    With W hay tokens, ids below W are hay: uniform noise of W = `hay` ids, or the
    text of a dataset, W = hay.vocab, of the same split. W is NEEDLE, W + 1 is ASK, then
    come `keys` keys and `values` values. Keys in a row differ. Chance: 1/values.
    """

    length: int = 512
    hay: int | Corpus = 64
    needles: int = 4
    questions: int = 1
    answer: int = 2
    keys: int = 32
    values: int = 32
    depth: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.hay, int):
            self.require("hay", self.hay >= 1, "1 or more noise tokens, or a text")
        known = 1 <= self.needles <= self.keys
        self.require("needles", known, f"1 to keys={self.keys}")
        most = self.needles if self.depth is None else 1
        self.require("questions", 1 <= self.questions <= most, f"1 to {most}")
        self.require("answer", self.answer >= 1, "1 or more tokens")
        self.require("values", self.values >= 2, "2 or more")
        self.require("depth", self.depth is None or 0 <= self.depth <= 1, "0 to 1")
        need = (self.needles + self.questions) * (self.answer + 2) - 1
        self.require("length", self.length >= need, f"{need} or more for the needles")

    @property
    def vocab(self) -> int:
        """How many token ids there are."""
        return self.words + 2 + self.keys + self.values

    @property
    def words(self) -> int:
        """W, how many ids are hay."""
        return self.hay if isinstance(self.hay, int) else self.hay.vocab

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        width = self.answer + 2
        room = self.length + 1 - self.questions * width
        keys = self.words + 2 + chosen(rng, size, self.keys, self.needles)
        first = self.vocab - self.values
        answers = rng.integers(first, self.vocab, (size, self.needles, self.answer))
        mark = np.full((size, self.needles, 1), self.words)
        facts = np.concatenate([mark, keys[:, :, None], answers], 2)
        sequence = self._hay(rng, size, room)
        place = self._places(rng, size, room // width) * width
        place = place + rng.integers(room % width + 1, size=(size, 1))
        at = (place[:, :, None] + np.arange(width)).reshape(size, -1)
        np.put_along_axis(sequence, at, facts.reshape(size, -1), 1)
        asked = facts[:, : self.questions].copy()
        asked[:, :, 0] = self.words + 1
        sequence = np.concatenate([sequence, asked.reshape(size, -1)], 1)
        n = np.arange(self.length + 1) - room
        asked_for = (n >= 0) & (n % width >= 2)
        return row(sequence, np.broadcast_to(asked_for, sequence.shape))

    def _places(self, rng: np.random.Generator, size: int, slots: int) -> np.ndarray:
        """The slot [B,needles] of each needle; the first ones are asked for."""
        if self.depth is None:
            return chosen(rng, size, slots, self.needles)
        asked = round(self.depth * (slots - 1))
        if self.needles == 1:
            return np.full((size, 1), asked)
        others = chosen(rng, size, slots - 1, self.needles - 1)
        others = others + (others >= asked)
        return np.concatenate([np.full((size, 1), asked), others], 1)

    def _hay(self, rng: np.random.Generator, size: int, room: int) -> np.ndarray:
        if isinstance(self.hay, int):
            return rng.integers(self.words, size=(size, room))
        text = dataclasses.replace(self.hay, length=room, split=self.split, pack=False)
        return text.draw(rng, size)["tokens"].astype(np.int64)
