"""Retrieval: rows of text in which something has to be found again.

Five kinds of rows over the ids of one corpus and its tokenizer: running text, repeated
random ids, facts hidden in text, lists of keys with values, names that come back. Each
row begins with a token of its own, `start`, the id after those of the tokenizer: a text
begins there, and the first key that every query sees is the same in all rows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments.data.corpus import Corpus
from experiments.data.dataset import Batch, Dataset, row

Encode = Callable[[str], Iterable[int]]
Piece = tuple[str, bool]  # text, and whether it has to be predicted

FACT = "\n# The secret number of {} is", " {}.\n"
NOUNS = (
    "apple anchor basket bridge candle castle circle cotton desert doctor dragon "
    "engine falcon feather forest garden guitar hammer harbor island jacket kettle "
    "ladder lantern marble meadow mirror monkey mountain needle ocean orange painter "
    "pepper pillow planet pocket rabbit ribbon river saddle salmon shadow silver "
    "spider summer temple thunder tiger tunnel valley velvet violin wagon walnut "
    "window winter yellow"
).split()
NAMES = (
    "Alice Anna Ben Carl Clara Daniel David Emma Eric Eva Felix Frank George Grace "
    "Hanna Henry Ida Jack James Jane John Julia Kate Laura Leo Lisa Louis Lucy Maria "
    "Mark Martin Mary Max Nina Nora Oscar Otto Paul Peter Robert Rosa Ruth Sara Simon "
    "Sofia Thomas Tom Victor Walter William"
).split()
PLACES = "store park school office station beach garden library market river".split()
THINGS = "book drink letter ring key ball lamp coat flower map".split()


def fact(encode: Encode, word: str, number: int) -> tuple[list[int], list[int]]:
    """A fact as (the ids up to its number, those of the number and what follows)."""
    return list(encode(FACT[0].format(word))), list(encode(FACT[1].format(number)))


def hidden(
    rng: np.random.Generator, hay: np.ndarray, pieces: Sequence[Sequence[int]],
    depths: Sequence[float] | None = None,
) -> np.ndarray:
    """hay [n] with the pieces between its ids: in their order at random places, or at
    `depths`, 0 for the beginning and 1 for the end."""
    if depths is None:
        cuts = np.sort(rng.integers(len(hay) + 1, size=len(pieces)))
    else:
        cuts = np.round(np.asarray(depths) * len(hay)).astype(int)
    parts = np.split(np.asarray(hay), cuts)
    mixed = [parts[0]]
    for piece, part in zip(pieces, parts[1:]):
        mixed += [np.asarray(piece), part]
    return np.concatenate(mixed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened(Dataset):
    """Running text behind a token `start`: windows at random places of `text`, every
    token a target. Subclasses put other things into the rows; of these what cannot be
    known has no target.

    text: where ids come from (its length, seed and split are this dataset's).
    """

    text: Corpus
    length: int = 1024

    @property
    def vocab(self) -> int:
        """How many ids there are."""
        return self.text.vocab + 1

    @property
    def start(self) -> int:
        """The id that a row begins with."""
        return self.text.vocab

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        rows = [self.one(rng) for _ in range(size)]
        sequence, answers = (np.stack(part) for part in zip(*rows))
        first = np.full((size, 1), self.start)
        return row(np.concatenate([first, sequence], 1),
                   np.concatenate([first < 0, answers], 1))

    def one(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The ids [T] of one row behind `start`, and which of them are answers."""
        return self.running(rng, self.length), np.ones(self.length, bool)

    def running(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Text [length] from a random place."""
        ids = dataclasses.replace(self.text, split=self.split, length=1).content.ids
        self.require("length", length < len(ids), f"less than the {len(ids)} tokens of "
                     f"the {self.split} split")
        at = rng.integers(len(ids) - length)
        return ids[at : at + length].astype(np.int64)

    def joined(self, lines: Sequence[Sequence[Piece]]) -> tuple[list[int], list[bool]]:
        """The ids of all pieces of lines, one behind the other, and the answers."""
        ids: list[int] = []
        answers: list[bool] = []
        for text, asked in (piece for line in lines for piece in line):
            new = self.text.encode(text).tolist()
            ids += new
            answers += [asked] * len(new)
        return ids, answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeated(Opened):
    """Random ids that repeat with a period p, log-uniform from 4 to T/2, each row its
    own; from the second time on they can be known (Olsson et al., 2022)
    arXiv:2209.11895. period: p for all rows, if it is given."""

    period: int | None = None

    def one(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        p = self.period
        if p is None:
            p = round(np.exp(rng.uniform(np.log(4), np.log(self.length / 2))))
        ids = np.resize(rng.integers(self.text.vocab, size=p), self.length)
        return ids, np.arange(self.length) >= p


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts(Opened):
    """Facts in text: "The secret number of WORD is N.", `facts` of them at random
    places, and at the end the questions about all, in another order."""

    facts: int = 8

    def one(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        words = rng.choice(words_of(self.text), self.facts, replace=False)
        numbers = rng.integers(10_000, 100_000, self.facts)
        told = [fact(self.text.encode, w, n) for w, n in zip(words, numbers)]
        asked = [told[n] for n in rng.permutation(self.facts)]
        tail = [n for left, right in asked for n in left + right]
        # the number and the dot behind it, without the end of the line
        known = [k for left, right in asked
                 for k in [False] * len(left) + [True] * (len(right) - 1) + [False]]
        facts = [left + right for left, right in told]
        room = self.length - len(tail) - sum(map(len, facts))
        self.require("length", room >= 0, f"room for {self.facts} facts, asked twice")
        body = hidden(rng, self.running(rng, room), facts)
        answers = np.concatenate([np.zeros(len(body), bool), np.asarray(known, bool)])
        return np.concatenate([body, np.asarray(tail)]), answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Opened):
    """A list of keys with values, as a dictionary is written down, then the same
    entries in other orders until the row is full: values are numbers in half of the
    rows and words in the others. entries: the most there are, fewer where they would
    fill more than half of a row."""

    entries: int = 32

    def one(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # an entry has some twelve ids
        most = max(2, min(self.entries, self.length // 24))
        many = int(rng.integers(2, most + 1))
        known = words_of(self.text)
        keys = rng.choice(known, many, replace=False)
        numbers = rng.integers(100, 100_000, many)
        words = [f"'{w}'" for w in rng.choice(known, many)]
        values = [str(n) for n in numbers] if rng.random() < 0.5 else words
        lines = [((f"\n'{k}':", False), (f" {v},", False))
                 for k, v in zip(keys, values)]
        ids, answers = self.joined(lines)
        while len(ids) < self.length:
            again = [lines[n] for n in rng.permutation(many)]
            more = self.joined([(key, (value[0], True)) for key, value in again])
            ids, answers = ids + more[0], answers + more[1]
        return np.asarray(ids[: self.length]), np.asarray(answers[: self.length])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names(Opened):
    """Sentences in which a name has to be copied: "When A and B went to the store, B
    gave the book to A." (Wang et al., 2023, arXiv:2211.00593, have this form), in both
    orders, and calls with the arguments of a function."""

    def one(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        answers: list[bool] = []
        while len(ids) < self.length:
            line = self._sentence(rng) if rng.random() < 0.5 else self._call(rng)
            more = self.joined([line])
            ids, answers = ids + more[0], answers + more[1]
        return np.asarray(ids[: self.length]), np.asarray(answers[: self.length])

    def _sentence(self, rng: np.random.Generator) -> list[Piece]:
        first, second = rng.choice(NAMES, 2, replace=False)
        gives, gets = rng.permutation([first, second])
        place, thing = rng.choice(PLACES), rng.choice(THINGS)
        said = (f"\n# When {first} and {second} went to the {place}, {gives} gave the "
                f"{thing} to")
        return [(said, False), (f" {gets}.", True)]

    def _call(self, rng: np.random.Generator) -> list[Piece]:
        words = rng.choice(words_of(self.text), 5, replace=False)
        name, call, *given = words
        inside = ", ".join(given)
        return [(f"\ndef {name}({inside}):\n    return {call}(", False),
                (f"{inside})", True)]


@functools.lru_cache(maxsize=4)
def _words(text: Corpus) -> np.ndarray:
    found: collections.Counter = collections.Counter()
    for document in text.documents().values():
        found.update(re.findall(r"\b[a-z]{4,8}\b", document))
    words = sorted(word for word, count in found.most_common(3000))
    return np.asarray(words or NOUNS)


def words_of(text: Corpus) -> Any:
    """The 3,000 most frequent words of 4 to 8 small letters in a corpus [n], in order
    of the alphabet."""
    return _words(dataclasses.replace(text, seed=0, split="train", length=1))
