"""What a language model knows and finds again: perplexity, needles, recall, induction.

For any folder, name on the hub or run (as `experiments.generate` takes them), with any
attention or cache policy in the place of its exact attention.

- text: nats a token and bits per byte of a text, in windows of the model's length that
  move by `stride` tokens; only tokens that no window before had count, so that each is
  judged with much before it. Beside them, what `gzip -9` makes of the same text.
- needle: "The secret number of WORD is N." hidden in text, at every length and depth;
  the share of questions whose whole answer is the likeliest.
- needles: so many in a row of the greatest length, all asked for.
- variables: "a = N", then "b = a", asked for b: what one look does not find.
- recall: keys with values as a dictionary, each key asked for once.
- repeats: random tokens twice; the share of the second time that is predicted.

    python -m experiments.evaluate --model=FOLDER --policy='SnapKV(capacity=256)'

All answers are read as a stream: the prompt in one piece, as a policy takes it, then
what is answered token by token.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.data import Corpus
from experiments.data.retrieval import NOUNS
from experiments.measure import charts
from experiments.measure.asked import (
    Reader, Row, needle, needles, recall, repeats, score, variables
)
from experiments.measure.reading import HELD_OUT, LEAST, reader_of
from experiments.sources import SHIPPED, loaded
from experiments.training.runs import open_folder, write_whole
from models.lm import loss, state_bytes
from models.swap import swapped

PARTS = ("text", "needle", "needles", "variables", "recall", "repeats")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, with what in it, and how it is asked."""

    model: str = option(SHIPPED, "folder, name on the hub, folder of a run, or small")
    attention: tuple | None = option(
        None, "instead of the exact ones: one, or one a layer")
    policy: Any = option(None, "instead of all exact ones that see everything")
    parts: tuple[str, ...] = option(
        PARTS, "of text, needle, needles, variables, recall, repeats")
    text: Corpus = option(
        HELD_OUT, "text to read, and the hay: the valid split, as words, not as ids")
    tokens: int = option(32768, "of the text at most")
    stride: int | None = option(None, "tokens a window moves by (None: half of it)")
    length: int | None = option(
        None, "tokens of the longest row (None: the model's, at most 4096)",
        least=LEAST)
    lengths: int = option(4, "lengths of the needle's rows: each half of the next")
    depths: int = option(5, "depths of the needle, from the beginning to the end")
    trials: int = option(8, "rows a length and depth, and of each other part")
    facts: int = option(8, "needles in a row of `needles`, keys of `recall`")
    hops: int = option(1, "names that `variables` goes through")
    batch: int = option(4, "rows at once", FREE)
    seed: int = option(0, "of what is hidden where")
    quiet: bool = option(False, "no progress bars", FREE)
    folder: str | None = option(
        None, "where numbers and picture go; None makes a new folder", FREE)

    def __post_init__(self):
        if unknown := set(self.parts) - {*PARTS}:
            raise ValueError(f"parts={sorted(unknown)}: expected some of {PARTS}")
        if self.attention and self.policy:
            raise ValueError("expected one of --attention and --policy")
        if self.facts > len(NOUNS):
            raise ValueError(f"facts={self.facts}: expected at most {len(NOUNS)}")
        if self.hops >= len(NOUNS):
            raise ValueError(f"hops={self.hops}: expected at most {len(NOUNS) - 1}")


TINY = Config(
    model=str(pathlib.Path(__file__).parents[1] / "tests" / "checkpoints" / "llama"),
    parts=("repeats",), length=16, trials=1, batch=1, quiet=True,
)


@functools.partial(jax.jit, static_argnums=0)
def nats(model: Any, params: Any, tokens: jax.Array, targets: jax.Array) -> Any:
    """Sum of nats and count over the targets [B,T] that are not -1."""
    return loss(model.apply(params, tokens), targets)


def perplexity(reader: Reader, documents: Sequence[str], most: int,
               stride: int | None) -> dict[str, float]:
    """Nats a token, bits per byte and what gzip needs, over the documents up to `most`
    tokens, each read from its own beginning; of the last one what was read alone
    counts. ValueError where no document has a token to be judged."""
    length = reader.length
    stride = min(stride or length // 2, length)
    total = count = size = packed = 0.0
    for text in documents:
        ids = np.asarray(reader.start + reader.encode(text))
        if len(ids) < 2:
            continue  # nothing stands before its token
        room = most - int(count)  # all but the first id are judged
        if len(ids) - 1 > room:
            ids = ids[: room + 1]
            text = reader.text.decode(ids[len(reader.start):].tolist())
        for tokens, targets in windows(ids, length, stride, bool(reader.start)):
            found = nats(reader.model, reader.params, tokens, targets)
            total, count = total + float(found[0]), count + float(found[1])
        size += len(text.encode())
        packed += len(gzip.compress(text.encode(), 9))
        if count >= most:
            break
    if not count or not size:
        raise ValueError(f"text: {len(documents)} documents without a token to be "
                         "judged: expected one of two tokens or more")
    return {"nats": total / count, "bits_per_byte": total / math.log(2) / size,
            "gzip_bits_per_byte": 8 * packed / size, "tokens": count}


def windows(ids: np.ndarray, length: int, stride: int, started: bool):
    """tokens and targets [1,length] of windows over ids [n]; each target once. Where a
    text has no beginning of its own, its first token is not judged."""
    done = 0 if started else 1
    for at in range(0, max(1, len(ids) - 1), stride):
        piece = ids[at : at + length + 1]
        targets = np.full(length, -1)
        new = max(done, at + 1) - at  # the first index in the piece not judged yet
        if new >= len(piece):
            return
        targets[new - 1 : len(piece) - 1] = piece[new:]
        tokens = np.zeros(length, np.int32)
        tokens[: len(piece) - 1] = piece[:-1]
        done = at + len(piece)
        yield jnp.asarray(tokens[None]), jnp.asarray(targets[None])
        if at + length + 1 >= len(ids):
            return


def of_text(config_: Config, reader: Reader, documents: Sequence[str]) -> dict:
    """The part `text`."""
    return perplexity(reader, documents, config_.tokens, config_.stride)


def of_needle(config_: Config, reader: Reader, documents: Sequence[str]) -> dict:
    """The part `needle`: the share at the longest length, over all, and cell by cell.
    """
    lengths = sorted({reader.length >> n for n in range(config_.lengths)})
    depths = np.linspace(0, 1, config_.depths).tolist()
    cells = []
    places = [(length, depth) for length in lengths for depth in depths]
    for length, depth in track(places, "needle", disable=config_.quiet):
        rows = [needle(reader, length, depth, n) for n in range(config_.trials)]
        whole, _ = score(reader, rows, config_.batch)
        cells.append({"length": length, "depth": depth, "found": whole})
    longest = [cell["found"] for cell in cells if cell["length"] == reader.length]
    return {"": float(np.mean(longest)),
            "all_lengths": float(np.mean([cell["found"] for cell in cells])),
            "cells": cells}


def of_rows(name: str, make: Callable[[Reader, int, int], Row], config_: Config,
            reader: Reader, documents: Sequence[str]) -> dict:
    """The parts `needles`, `recall` and `repeats`."""
    many = {"repeats": reader.model.vocab, "variables": config_.hops}.get(
        name, config_.facts)
    trials = track(range(config_.trials), name, disable=config_.quiet)
    rows = [make(reader, many, n) for n in trials]
    whole, right = score(reader, rows, config_.batch)
    return {"": right if name == "repeats" else whole}


PART: dict[str, Callable[[Config, Reader, Sequence[str]], dict]] = {
    "text": of_text, "needle": of_needle,
    "needles": functools.partial(of_rows, "needles", needles),
    "variables": functools.partial(of_rows, "variables", variables),
    "recall": functools.partial(of_rows, "recall", recall),
    "repeats": functools.partial(of_rows, "repeats", repeats),
}


def run(config_: Config) -> dict[str, Any]:
    """Evaluates -> plain numbers; numbers and heat map in a folder."""
    found = loaded(config_.model)
    found = found._replace(
        model=swapped(found.model, config_.attention, config_.policy))
    folder = open_folder("evaluate", config_.folder, config.command(config_),
                         config.settings(config_))
    reader, documents = reader_of(
        found, config_.parts, config_.text, config_.length, config_.seed)
    scores = {part: PART[part](config_, reader, documents) for part in config_.parts}
    numbers = {f"{part}_{name}" if name else part: value
               for part, each in scores.items() for name, value in each.items()
               if isinstance(value, float)}
    numbers["state_bytes"] = state_bytes(found.model, reader.length)
    write_whole(folder / "evaluation.json", json.dumps(scores, indent=1) + "\n")
    if "needle" in scores:
        charts.needle_picture(scores["needle"]["cells"], folder / "needle.png")
    return numbers | {"folder": str(folder)}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
