"""Asked: rows in which a model has to find something again, and how often it does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.retrieval import NOUNS, fact, hidden
from models.generate import stream
from models.lm import loss

DIGITS = 5


class Row(NamedTuple):
    """A text [T] and which of its tokens are answers; parts of the same length in a
    group are read at once."""

    ids: np.ndarray
    asked: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that is asked: what it is, its tokenizer `text`, the hay [n] of its ids,
    the ids that a text begins with, and the tokens of the longest row. prompt: how many
    of a row stand before its first answer, None for all that there is room for; what is
    left of the row behind its answers is hay."""

    model: Any
    params: Any
    text: Any
    hay: np.ndarray
    start: list[int]
    length: int
    seed: int
    prompt: int | None = None

    def encode(self, text: str) -> list[int]:
        """Ids without a beginning of the text."""
        return plain(self.text, text)

    def rng(self, *at: int) -> np.random.Generator:
        """The draws of a trial."""
        return np.random.default_rng((self.seed, *at))

    def told(
        self, rng: np.random.Generator, many: int
    ) -> list[tuple[list[int], list[int]]]:
        """`many` facts, all numbers of which have as many ids."""
        words = rng.choice(NOUNS, many, replace=False)
        return [fact(self.encode, w, self.number(rng)) for w in words]

    def number(self, rng: np.random.Generator) -> int:
        """Of five digits, of the commonest count of ids."""
        draws = rng.integers(10 ** (DIGITS - 1), 10**DIGITS, 32)
        sizes = [len(self.encode(f" {n}.")) for n in draws]
        return int(draws[sizes.index(max(set(sizes), key=sizes.count))])

    def piece(self, rng: np.random.Generator, room: int) -> np.ndarray:
        """`room` ids of hay from a random place."""
        at = rng.integers(max(1, len(self.hay) - room))
        return np.resize(self.hay[at : at + room], room) if room else self.hay[:0]

    def row(self, rng: np.random.Generator, body: Sequence, tail: Sequence,
            length: int, depths: Sequence[float] | None) -> Row:
        """A row of `length`: the pieces of `body` in hay, then (ids, whether asked)."""
        end = np.concatenate([ids for ids, _ in tail])
        asked = np.concatenate([np.full(len(ids), flag) for ids, flag in tail])
        after = 0
        if self.prompt is not None:
            after = length - self.prompt - len(end) + int(asked.argmax())
        room = length - len(self.start) - len(end) - sum(map(len, body)) - after
        if room < 0 or after < 0:
            raise ValueError(f"length={length}: expected {length - min(room, after)} "
                             "or more for what is hidden and asked")
        hay = self.piece(rng, room)
        told = hidden(rng, hay, body, depths)
        ids = np.concatenate([self.start, told, end, self.piece(rng, after)])
        before = np.zeros(length - len(end) - after, bool)
        return Row(ids.astype(np.int32),
                   np.concatenate([before, asked, np.zeros(after, bool)]))


def plain(text: Any, words: str) -> list[int]:
    """The ids of words, without what a text begins with."""
    try:
        return list(text.encode(words, special=False))
    except TypeError:  # of a run: it puts nothing before a text
        return list(text.encode(words))


def needle(reader: Reader, length: int, depth: float, trial: int) -> Row:
    """One fact at one depth."""
    rng = reader.rng(0, length, round(1000 * depth), trial)
    ((left, right),) = reader.told(rng, 1)
    return reader.row(rng, [left + right], _question(left, right), length,
                      [depth])


def needles(reader: Reader, many: int, trial: int) -> Row:
    """`many` facts anywhere, all asked for in another order."""
    rng = reader.rng(1, trial)
    told = reader.told(rng, many)
    asked = [part for n in rng.permutation(many) for part in _question(*told[n])]
    return reader.row(rng, [a + b for a, b in told], asked, reader.length, None)


def one_of(reader: Reader, many: int, trial: int) -> Row:
    """`many` facts anywhere, one of them asked for."""
    rng = reader.rng(8, trial)
    told = reader.told(rng, many)
    asked = _question(*told[int(rng.integers(many))])
    return reader.row(rng, [a + b for a, b in told], asked, reader.length, None)


def _question(left: list[int], right: list[int]) -> list[tuple[list[int], bool]]:
    """What is asked, the number with its dot, and the end of the line."""
    return [(left, False), (right[:-1], True), (right[-1:], False)]


def variables(reader: Reader, hops: int, trial: int) -> Row:
    """A number under a name, then `hops` times that another name is the last one, in
    hay, in this order; asked is the number of the last name (variable tracking of Hsieh
    et al., 2024, arXiv:2404.06654, with one chain)."""
    rng = reader.rng(4, trial)
    names = rng.choice(NOUNS, hops + 1, replace=False)
    value = reader.encode(f" {reader.number(rng)}")
    first = reader.encode(f"\n{names[0]} =") + value
    chain = [reader.encode(f"\n{b} = {a}") for a, b in zip(names, names[1:])]
    tail = [(reader.encode(f"\n{names[-1]} =="), False), (value, True)]
    return reader.row(rng, [first, *chain], tail, reader.length, None)


def recall(
    reader: Reader, many: int, trial: int, length: int | None = None
) -> Row:
    """A dictionary, then each of its keys once more; in rows of `length` hay stands
    before."""
    rng = reader.rng(2, trial)
    keys = rng.choice(NOUNS, many, replace=False)
    entries = [(reader.encode(f"\n'{k}':"), reader.encode(f" {reader.number(rng)},"))
               for k in keys]
    again = [part for n in rng.permutation(many)
             for part in ((entries[n][0], False), (entries[n][1], True))]
    told = [(ids, False) for entry in entries for ids in entry]
    if length is None:
        length = len(reader.start) + sum(len(ids) for ids, _ in (*told, *again))
    return reader.row(rng, [], told + again, length, None)


def repeats(reader: Reader, vocab: int, trial: int) -> Row:
    """Random ids, twice."""
    rng = reader.rng(3, trial)
    least = len(reader.start) + 4  # two tokens, twice
    if reader.length < least:
        raise ValueError(f"length={reader.length}: expected {least} or more for what "
                         "repeats")
    half = rng.integers(vocab, size=(reader.length - len(reader.start)) // 2)
    ids = np.concatenate([reader.start, half, half]).astype(np.int32)
    # the first of the second time cannot be known
    return Row(ids, np.arange(len(ids)) > len(reader.start) + len(half))


def aligned(draw: Callable[[Reader], list[Row]], reader: Reader) -> list[Row]:
    """The rows that `draw` gives, with as many tokens before the first answer of each,
    those of the row that has the fewest: one program reads them all."""
    rows = draw(reader)
    least = min(int(row.asked.argmax()) for row in rows)
    return draw(dataclasses.replace(reader, prompt=least))


def batches(size: int, batch: int) -> list[np.ndarray]:
    """The numbers [batch] of rows that are read at once: a last batch that is not full
    is filled up, so that nothing is compiled; what is behind `size` is to be cut off.
    """
    return [np.resize(np.arange(first, min(first + batch, size)), batch)
            for first in range(0, size, batch)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def hits(model: Any, params: Any, tokens: jax.Array, prompt: int) -> jax.Array:
    """Whether the likeliest token is the next one, [B,T-1], of tokens [B,T] of which
    `prompt` come in one piece and the others one by one."""
    logits = stream(model, params, tokens[:, :-1], prompt)
    return logits.argmax(-1) == tokens[:, 1:]


def score(reader: Reader, rows: Sequence[Row], batch: int) -> tuple[float, float]:
    """(share of answers of which each token is the likeliest, share of their tokens):
    an answer is a run of tokens that are asked for."""
    counts = np.zeros(4)
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        first = int(row.asked.argmax())
        groups.setdefault((len(row.ids), first), []).append(row)
    for (_, first), group in groups.items():
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            # a last batch that is not full is filled up, so that nothing is compiled
            ids = np.stack([row.ids for row in (part * batch)[:batch]])
            good = hits(reader.model, reader.params, jnp.asarray(ids), first)
            for row, mine in zip(part, np.asarray(good)):
                counts += counted(mine, row.asked[1:])
    whole, answers, right, tokens = counts
    return float(whole / answers), float(right / tokens)


def counted(good: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(answers that are right as a whole, answers, tokens of them that are right,
    tokens of them) of a row: good, asked [T] booleans."""
    runs = np.split(good, np.flatnonzero(np.diff(asked)) + 1)
    kinds = np.split(asked, np.flatnonzero(np.diff(asked)) + 1)
    each = [run.all() for run, kind in zip(runs, kinds) if kind[0]]
    return np.asarray([sum(each), len(each), good[asked].sum(), asked.sum()], float)


def streamed_nats(reader: Reader, rows: int, batch: int) -> tuple[float, float]:
    """(nats, tokens) of the second half of `rows` rows of hay, which comes token by
    token after the first half was read in one piece: what a small memory really costs.
    """
    half = reader.length // 2
    nats = count = 0.0
    room = reader.length - len(reader.start)
    for at in range(0, rows, batch):
        ids = [np.concatenate([reader.start, reader.piece(reader.rng(5, n), room)])
               for n in range(at, min(at + batch, rows))]
        found = np.asarray(_nats(reader.model, reader.params,
                                 jnp.asarray(np.stack(ids), jnp.int32), half))
        nats, count = nats + float(found[0]), count + float(found[1])
    return nats, count


@functools.partial(jax.jit, static_argnums=(0, 3))
def _nats(model: Any, params: Any, tokens: jax.Array, half: int) -> jax.Array:
    logits = stream(model, params, tokens[:, :-1], half)
    return jnp.stack(loss(logits[:, half - 1:], tokens[:, half:]))
