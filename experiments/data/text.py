"""Text: batches of tokens from files, the standard library, or Hugging Face."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import importlib
import itertools
import os
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

from experiments.data import bpe
from experiments.data.dataset import SPLITS, Batch, Dataset

OUTSIDE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


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
        encoder = bpe.tokenizer(_tokenizer(self._content_key()))
        return np.asarray(encoder.encode(text).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids [n]; bytes that are no UTF-8 become U+FFFD."""
        if self.tokenizer == "bytes":
            return bytes(np.asarray(ids, np.uint8)).decode(errors="replace")
        return bpe.tokenizer(_tokenizer(self._content_key())).decode(list(ids))

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


@functools.lru_cache(maxsize=4)
def _splits(corpus: Corpus) -> dict[str, list[str]]:
    """The documents of "train" and of "valid"."""
    found = {name: text for name, text in corpus.documents().items() if text}
    if len(found) == 1:
        (text,) = found.values()
        cut = len(text) - max(1, round(len(text) * corpus.held_out))
        return dict(zip(SPLITS, ([text[:cut]] * (cut > 0), [text[cut:]])))
    order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    cut = min(max(1, round(len(found) * corpus.held_out)), len(found) - 1)
    held_out = {*order[:cut]}
    train = [text for name, text in found.items() if name not in held_out]
    return dict(zip(SPLITS, (train, [found[name] for name in sorted(held_out)])))


def _tokenizer(corpus: Corpus) -> str:
    return bpe.train(_splits(dataclasses.replace(corpus, split="train"))["train"],
                     corpus.vocab)


@functools.lru_cache(maxsize=4)
def _tokens(corpus: Corpus) -> Tokens:
    texts = _splits(dataclasses.replace(corpus, split="train"))[corpus.split]
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


@dataclasses.dataclass(frozen=True)
class Text(Corpus):
    """A text file, or every file of a folder whose name fits `pattern`: see `Corpus`.

    Without a `path` it is the source (*.py) of the running Python's standard library,
    its tests and installed packages left out: some 12 MB that every machine has. Hidden
    files are left out. ValueError for files that cannot be read or are not UTF-8 text.
    """

    path: str | None = None
    pattern: str = "*"

    def documents(self) -> dict[str, str]:
        root = pathlib.Path(self.path or sysconfig.get_path("stdlib")).expanduser()
        if not root.exists():
            raise ValueError(f"Text: path={self.path!r}: no such file or folder")
        try:
            files = [root] if root.is_file() else self._files(root)
            found = {f.relative_to(root).as_posix(): self._read(f) for f in files}
        except OSError as error:
            raise ValueError(f"Text: {error.filename} cannot be read: "
                             f"{error.strerror}") from None
        if not any(found.values()):
            what = f"a file with text that fits {self.pattern!r}"
            what = "a file with text" if root.is_file() else what
            raise ValueError(f"Text: path={str(root)!r} is empty: expected {what}")
        return found

    def _files(self, root: pathlib.Path) -> list[pathlib.Path]:
        def stop(error):
            raise error

        found = []
        for folder, below, names in os.walk(root, onerror=stop):
            skipped = OUTSIDE if self.path is None else set()
            below[:] = [b for b in below if b not in skipped and b[0] != "."]
            for name in names:
                hidden = name[0] == "." or self.path is None and name[-3:] != ".py"
                if fnmatch.fnmatch(name, self.pattern) and not hidden:
                    found.append(pathlib.Path(folder, name))
        return sorted(f for f in found if f.is_file() or not f.exists())

    def _read(self, file: pathlib.Path) -> str:
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise ValueError(f"Text: {str(file)!r} is not UTF-8 text: expected text "
                             "files, or a pattern such as '*.txt' that leaves it out")
        return text


@dataclasses.dataclass(frozen=True)
class HuggingFace(Corpus):
    """Text of the Hugging Face data set `name` (or of a local folder): see `Corpus`.

    The documents are the strings in `column` of the first `rows` rows of its part
    `part`, which are streamed. Needs the package datasets.
    """

    name: str
    subset: str | None = None
    part: str = "train"
    column: str = "text"
    rows: int = 10_000

    def __post_init__(self):
        super().__post_init__()
        self.require("rows", self.rows >= 1, "1 or more")

    def documents(self) -> dict[str, str]:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise ValueError("HuggingFace needs the package datasets: "
                             "pip install 'attn[hf]'") from None
        try:
            dataset = datasets.load_dataset(
                self.name, self.subset, split=self.part, streaming=True
            )
            found = list(itertools.islice(dataset, self.rows))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"HuggingFace: name={self.name!r} cannot be loaded: "
                             f"{first or type(error).__name__}") from error
        for i, row in enumerate(found):
            if not isinstance(row.get(self.column), str):
                have = ", ".join(k for k, v in row.items() if isinstance(v, str))
                raise ValueError(f"HuggingFace: column={self.column!r} of row {i} has "
                                 f"no text: expected one of: {have or 'none'}")
        return {f"{i:09}": row[self.column] for i, row in enumerate(found)}
