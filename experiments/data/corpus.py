"""Corpus: running text as rows of tokens, whatever the documents come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from typing import NamedTuple

import numpy as np

from experiments.data import bpe
from experiments.data.dataset import SPLITS, Batch, Dataset


class Tokens(NamedTuple):
    """The documents of a split in a row: ids [n]; where each starts, and n; bytes."""

    ids: np.ndarray
    starts: np.ndarray
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(Dataset):
    """Rows of `length` tokens of running text. Every position has a target, the next
    token.

    tokens, targets [B,T]: windows at random places of all documents in a row; with
    `pack`, random documents, cut at a random place if they are too long for what is
    left of the row, with segments [B,T] = 1, 2, ...; a document's last token then has
    no target. Ids are bytes (`tokenizer="bytes"`, vocab 256), or those of a byte-pair
    encoding trained on the train split ("bpe", at most `vocab` ids, more than 256).
    Chance: ln(vocab) nats; bits per byte = nats / ln 2 / `bytes_per_token`.

    The share `held_out` is the valid split: of the documents, those whose name has the
    lowest hashes; of a single document, its tail.
    """

    length: int = 1024
    tokenizer: str = "bytes"
    vocab: int = 256
    held_out: float = 0.1
    pack: bool = False

    def __post_init__(self):
        super().__post_init__()
        kinds = ("bytes", "bpe")
        self.require("tokenizer", self.tokenizer in kinds, "'bytes' or 'bpe'")
        exact = self.tokenizer == "bytes"
        self.require("vocab", self.vocab == 256 or not exact, "256 for bytes")
        self.require("vocab", self.vocab > 256 or exact, "more than the 256 bytes")
        self.require("held_out", 0 < self.held_out < 1, "between 0 and 1")

    def documents(self) -> dict[str, str]:
        """Name -> text of every document of both splits."""
        raise NotImplementedError(f"{type(self).__name__} has no documents")

    @property
    def parts(self) -> dict[str, list[str]]:
        """The documents of "train" and of "valid"."""
        return {split: list(part.values()) for split, part in _parts(self).items()}

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of the documents of "train" and of "valid"."""
        return {split: list(part) for split, part in _parts(self).items()}

    @property
    def content(self) -> Tokens:
        """All tokens of the split."""
        return _tokens(self._content_key())

    @property
    def bytes_per_token(self) -> float:
        """How many bytes of UTF-8 a token of this split stands for, on average."""
        return self.content.size / len(self.content.ids)

    def encode(self, text: str) -> np.ndarray:
        """The ids [n] int32 of a text."""
        if self.tokenizer == "bytes":
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        encoder = bpe.tokenizer(self.tokenizer_json)
        return np.asarray(encoder.encode(text).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids [n]; bytes that are no UTF-8 become U+FFFD."""
        if self.tokenizer == "bytes":
            return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")
        return bpe.tokenizer(self.tokenizer_json).decode(list(ids))

    @property
    def tokenizer_json(self) -> str:
        """The byte-pair encoding, in the form of the tokenizers library."""
        return _tokenizer(dataclasses.replace(self._content_key(), split="train"))

    def anywhere(self) -> Corpus:
        """Itself, but for where the text lies: what with `digest` says all of it."""
        raise NotImplementedError(f"{type(self).__name__} has no place")

    def digest(self) -> str:
        """A digest of the documents of both splits and of the tokenizer."""
        return _digest(dataclasses.replace(self._content_key(), split="train"))

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        content = self.content
        if self.pack:
            rows = [self._packed(rng, content) for _ in range(size)]
            return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        n = len(content.ids)
        self.require("length", self.length < n, f"less than the {n} tokens of the "
                     f"{self.split} split")
        at = rng.integers(n - self.length, size=(size, 1)) + np.arange(self.length + 1)
        window = content.ids[at].astype(np.int32)
        return {"tokens": window[:, :-1], "targets": window[:, 1:]}

    def _packed(self, rng: np.random.Generator, content: Tokens) -> Batch:
        """One row of documents, [T]."""
        names = ("tokens", "targets", "segments")
        row = {name: np.zeros(self.length, np.int32) for name in names}
        end = 0
        for segment in itertools.count(1):
            i = rng.integers(len(content.starts) - 1)
            first, last = content.starts[i : i + 2]
            many = min(last - first, self.length - end + 1)  # one more for the target
            first = first + rng.integers(last - first - many + 1)
            piece = content.ids[first : first + many].astype(np.int32)
            here = slice(end, min(end + many, self.length))
            width = here.stop - here.start
            row["tokens"][here] = piece[:width]
            row["targets"][here] = np.append(piece[1:], -1)[:width]
            row["segments"][here] = segment
            end += width
            if end == self.length:
                return row
        raise AssertionError("a row is full after at most `length` documents")

    def _content_key(self) -> Corpus:
        return dataclasses.replace(self, length=1, seed=0, pack=False)


def _parts(corpus: Corpus) -> dict[str, dict[str, str]]:
    """Name -> text of the documents of "train" and of "valid"; a single document is in
    both, in parts."""
    return _splits(dataclasses.replace(corpus._content_key(), split="train"))


@functools.lru_cache(maxsize=4)
def _splits(corpus: Corpus) -> dict[str, dict[str, str]]:
    found = {name: text for name, text in corpus.documents().items() if text}
    if len(found) == 1:
        ((name, text),) = found.items()
        cut = len(text) - max(1, round(len(text) * corpus.held_out))
        return {"train": {name: text[:cut]} if cut else {}, "valid": {name: text[cut:]}}
    order = sorted(found, key=_hash)
    cut = min(max(1, round(len(found) * corpus.held_out)), len(found) - 1)
    held_out = {*order[:cut]}
    train = {name: text for name, text in found.items() if name not in held_out}
    return {"train": train, "valid": {name: found[name] for name in sorted(held_out)}}


def _hash(name: str) -> str:
    """Of a document's name, which need not be text where files have such names."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


@functools.lru_cache(maxsize=4)
def _tokenizer(corpus: Corpus) -> str:
    return bpe.train(corpus.parts["train"], corpus.vocab)


@functools.lru_cache(maxsize=4)
def _digest(corpus: Corpus) -> str:
    found = hashlib.sha256()
    splits = corpus.parts
    for name in SPLITS:
        found.update(f"{name} {len(splits[name])}".encode())
        for text in splits[name]:
            raw = text.encode()
            found.update(len(raw).to_bytes(8, "little") + raw)
    if corpus.tokenizer != "bytes":
        found.update(_tokenizer(corpus).encode())
    return f"sha256:{found.hexdigest()[:32]}"


@functools.lru_cache(maxsize=4)
def _tokens(corpus: Corpus) -> Tokens:
    texts = corpus.parts[corpus.split]
    if not texts:
        raise ValueError(f"{corpus}: the {corpus.split} split is empty: expected more")
    raw = [text.encode() for text in texts]
    size = sum(map(len, raw))
    if corpus.tokenizer == "bytes":
        ids = np.frombuffer(b"".join(raw), np.uint8)
        counts = np.asarray([len(r) for r in raw])
    else:
        ids, counts = bpe.encode(_tokenizer(corpus), texts)
    return Tokens(ids, np.concatenate([[0], np.cumsum(counts)]), size)
