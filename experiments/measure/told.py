"""Told: facts in the words of a loaded model, one of them asked for.

A row has facts "The secret number of KEY is N." between lines of hay, and the question
about one. Keys of two words share the second with others: who looks for the last words
alone finds several.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.pasta import Pasta, highlight
from experiments.data.retrieval import NOUNS, fact
from experiments.measure.asked import Reader, batches
from experiments.measure.head_choice import everywhere, exact_layers
from experiments.measure.reading import Loaded, check_asked

ROUND = 32  # rows are as long as a multiple, so that few programs are compiled


class Told(NamedTuple):
    """prompt [B,T], all up to what is to be written, answer [B,n]; question [B]: where
    the question begins; spans [B,F,2]: where each fact begins and ends; sentence [B]:
    which of them is asked for."""

    prompt: np.ndarray
    answer: np.ndarray
    question: np.ndarray
    spans: np.ndarray
    sentence: np.ndarray


def check(name: str, found: Loaded, facts: int, shared: int) -> None:
    """ValueError for a model that cannot be steered, or not be asked in words."""
    check_asked(name, found)
    if not 1 <= shared <= facts or facts + -(-facts // shared) > len(NOUNS):
        raise ValueError(f"facts={facts}, shared={shared}: expected shared of 1 to "
                         f"facts, and keys of at most {len(NOUNS)} words")
    left, right = fact(found.text.encode, NOUNS[0], 12345)
    if "12345" not in found.text.decode([*left, *right]):
        raise ValueError(f"the {found.model.vocab} tokens of {name} do not hold "
                         "12345: expected a vocabulary with words and numbers")


def told(reader: Reader, rng: np.random.Generator, size: int, facts: int, shared: int,
         length: int | None = None, limit: int | None = None) -> Told:
    """`size` rows of `facts` facts; shared: so many have the last word of the key in
    common, 1: keys are that word alone. length: of the prompt, None for what the
    longest row needs; limit: what the model has room for."""
    rows = [_drawn(reader, rng, facts, shared) for _ in range(size)]
    need = max(len(reader.start) + sum(map(len, body)) + len(left)
               for body, left, *_ in rows)
    room = length if length is not None else -(-need // ROUND) * ROUND
    most = None if limit is None else limit - rows[0][2].size
    if length is None and most is not None:
        room = max(min(room, most), need)
    if need > room or most is not None and room > most:
        raise ValueError(f"length={room}: expected {need} or more for {facts} facts"
                         + ("" if most is None else f", and at most {most}"))
    prompts, spans = zip(*(_row(reader, rng, room, body, left)
                           for body, left, *_ in rows))
    return Told(np.stack(prompts), np.stack([row[2] for row in rows]),
                np.asarray([room - len(row[1]) for row in rows]), np.stack(spans),
                np.asarray([row[3] for row in rows]))


def _drawn(reader: Reader, rng: np.random.Generator, facts: int, shared: int):
    """One row: the facts, the question, the answer [n], which fact it is."""
    groups = -(-facts // shared)
    words = rng.choice(NOUNS, groups + facts, replace=False)
    last = np.repeat(words[:groups], shared)[:facts]
    keys = last if shared == 1 else [f"{a} {b}" for a, b in zip(words[groups:], last)]
    parts = [fact(reader.encode, keys[n], number)
             for n, number in zip(rng.permutation(facts), _numbers(reader, rng, facts))]
    which = int(rng.integers(facts))
    left, right = parts[which]
    return [a + b for a, b in parts], left, np.asarray(right[:-1], np.int32), which


def _numbers(reader: Reader, rng: np.random.Generator, many: int) -> list[int]:
    """Different ones of five digits, all of the same count of ids: that of most."""
    size = _commonest(reader)
    found: dict[int, None] = {}
    while len(found) < many:
        number = int(rng.integers(10_000, 100_000))
        if len(reader.encode(f" {number}.\n")) == size:
            found[number] = None
    return list(found)


def _commonest(reader: Reader) -> int:
    draws = np.random.default_rng(0).integers(10_000, 100_000, 200)
    sizes = [len(reader.encode(f" {n}.\n")) for n in draws]
    return max(set(sizes), key=sizes.count)


def _row(reader: Reader, rng: np.random.Generator, room: int, body: list, left: list):
    """The prompt [T] with hay between the facts, and their spans [F,2]."""
    begin = len(reader.start)
    hay = reader.piece(rng, room - begin - sum(map(len, body)) - len(left))
    cuts = np.sort(rng.integers(len(hay) + 1, size=len(body)))
    sizes = np.cumsum([0, *map(len, body)])
    at = begin + cuts + sizes[:-1]
    parts = [np.asarray(reader.start, int)]
    for piece, mine in zip(np.split(hay, cuts), [*body, left]):
        parts += [piece, np.asarray(mine)]
    ids = np.concatenate(parts).astype(np.int32)
    return ids, np.stack([at, at + np.diff(sizes)], 1)


def steerable(model: Any, alpha: float) -> tuple[Any, list[int]]:
    """The model with `Pasta` in its layers of exact attention that see everything, and
    which these are."""
    return everywhere(model, Pasta(alpha=alpha)), exact_layers(model)


def written(model: Any, params: Any, asked: Told, begin: int, heads: np.ndarray,
            sentence: np.ndarray, batch: int) -> np.ndarray:
    """What a steered model writes [B,n], with heads [L,H] pointed at a fact of each row
    [B]. The first `begin` tokens, with which a text begins, and the question count as
    they do (proposed): of the context alone others count less."""
    size, t = asked.prompt.shape
    at = np.arange(t)[None]
    own = asked.spans[np.arange(size), sentence]
    inside = (at >= own[:, :1]) & (at < own[:, 1:]) | (at < begin)
    pasta = next(a for a in model.attention if isinstance(a, Pasta))
    marks = np.asarray(pasta.marks(inside[:, None], asked.question))
    found = []
    for rows in batches(size, batch):
        found.append(np.asarray(_written(
            model, params, asked.prompt[rows], marks[rows], heads,
            asked.answer.shape[1])))
    return np.concatenate(found)[:size]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _written(model, params, prompt, marks, heads, many: int) -> jax.Array:
    b, t = prompt.shape
    state = highlight(model.init_state(t + many, prompt), marks, heads)
    state, logits = model.apply(params, prompt, state, at=jnp.full(b, t - 1))

    def one(carry, _):
        state, token = carry
        state, logits = model.apply(params, token[:, None], state)
        return (state, logits[:, 0].argmax(-1)), token

    last, found = jax.lax.scan(one, (state, logits.argmax(-1)), None, many - 1)
    return jnp.concatenate([found, last[1][None]]).T


def nearest(asked: Told, said: np.ndarray) -> np.ndarray:
    """The fact [B] of each row that is nearest to what was written [B,n]: the cosine of
    counts of tokens, of equals the first."""
    found = []
    for n, ids in enumerate(said):
        known = np.unique(asked.prompt[n])
        count = lambda a: (known[:, None] == a[None]).sum(1)
        facts = np.stack([count(asked.prompt[n, a:b]) for a, b in asked.spans[n]])
        size = np.linalg.norm(facts, axis=1)
        found.append(int((facts @ count(ids) / size).argmax()))
    return np.asarray(found)
