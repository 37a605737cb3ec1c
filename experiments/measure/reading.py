"""Reading: a model that was loaded, and what it needs to be asked.

Where it comes from is the business of `experiments.sources`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data import Corpus, Text
from experiments.measure.asked import Reader, plain
from experiments.measure.head_choice import exact_layers
from models.checkpoint.tokenizer import Defaults

HELD_OUT = Text(held_out=0.1)  # the split of `experiments.small`
LEAST = 8  # tokens of a row: with fewer nothing stands before what is asked


class Loaded(NamedTuple):
    """A model, its parameters, its tokenizer (`encode`, `decode`), how it wants to be
    sampled, and the longest text that it was made for."""

    model: Any
    params: Any
    text: Any
    defaults: Defaults
    limit: int | None


class Ids:
    """The tokenizer of a folder that has none: ids, with spaces between."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def encode(self, text: str) -> list[int]:
        """The ids that stand in the text."""
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(f"prompt={text!r}: the folder has no tokenizer.json, "
                             "expected ids such as '5 7 9'") from None

    def decode(self, ids: list[int]) -> str:
        """The ids as text."""
        return "".join(f" {n}" for n in ids)


def check_asked(name: str, found: Loaded) -> None:
    """ValueError for a model whose attention cannot be replaced, or that has no words.
    """
    if not exact_layers(found.model):
        raise ValueError(f"{name}: no layer is exact attention that sees everything: "
                         "expected one or more")
    if isinstance(found.text, Ids):
        raise ValueError(f"{name} has no tokenizer.json: expected a model with words")


def reader_of(found: Loaded, parts: Sequence[str], text: Corpus, length: int | None,
              seed: int, name: str = "parts") -> tuple[Reader, list[str]]:
    """A model that can be asked, and the documents that it is asked about: none where
    parts read ids alone, for models without a tokenizer. name: the option that has
    them. ValueError for words without a tokenizer, and for rows of less than 8."""
    length = length or min(found.limit or 4096, 4096)
    if length < LEAST:
        raise ValueError(f"length={length}: expected {LEAST} or more tokens")
    documents, hay = [], np.zeros(0, np.int32)
    if {*parts} - {"repeats"}:
        if isinstance(found.text, Ids):
            raise ValueError(f"{found.text.folder} has no tokenizer.json: expected "
                             f"--{name}='(\"repeats\",)'")
        documents = text.parts["valid"]
        words = "\n".join(documents)[: 64 * length]
        hay = np.asarray(plain(found.text, words), np.int32)
    reader = Reader(found.model, found.params, found.text, hay,
                    list(found.text.encode("")), length, seed)
    return reader, documents
