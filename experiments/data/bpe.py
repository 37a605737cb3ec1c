"""Byte-pair encoding, trained on a corpus and kept in a cache by its content.

The cache is the folder $ATTN_CACHE, else ~/.cache/attn. Its files are named by a hash
of everything that they were made from, so that they are never out of date.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BATCH = 64  # documents encoded at once: an encoding holds far more than its ids
Arrays = dict[str, np.ndarray]


def tokenizers() -> Any:
    """The package tokenizers. ValueError if it is not installed."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError("tokenizer='bpe' needs the package tokenizers: "
                         "pip install 'attn[hf]'") from None


def train(texts: Sequence[str], vocab: int) -> str:
    """A byte-level BPE tokenizer of at most `vocab` ids, as its JSON."""
    version = tokenizers().__version__
    name = "bpe-" + _digest(version, str(vocab), *texts)
    found = cached(name, ("json",), lambda: {"json": _bytes(_train(texts, vocab))})
    return found["json"].tobytes().decode()


def _train(texts: Sequence[str], vocab: int) -> str:
    library = tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    level = library.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(level.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


@functools.lru_cache(maxsize=4)
def tokenizer(json: str) -> Any:
    """The tokenizer that `train` described."""
    return tokenizers().Tokenizer.from_str(json)


def encode(json: str, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] int32 of all texts in a row, and each one's count of ids."""
    name = "ids-" + _digest(json, *texts)
    found = cached(name, ("ids", "counts"), lambda: _encode(json, texts))
    return found["ids"], found["counts"]


def _encode(json: str, texts: Sequence[str]) -> Arrays:
    encoder, ids = tokenizer(json), []
    for start in range(0, len(texts), BATCH):
        part = encoder.encode_batch(list(texts[start : start + BATCH]))
        ids += [np.asarray(e.ids, np.int32) for e in part]
    counts = np.asarray([len(i) for i in ids], np.int64)
    return {"ids": np.concatenate(ids), "counts": counts}


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))  # "ab", "c" is not "a", "bc"
        digest.update(raw)
    return digest.hexdigest()[:32]


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def cached(name: str, keys: Sequence[str], build: Callable[[], Arrays]) -> Arrays:
    """The arrays `keys` kept under `name`, or what `build` makes, kept from now on.

    Warns and builds again if the file is damaged; warns if it cannot be written.
    """
    folder = os.environ.get("ATTN_CACHE") or pathlib.Path.home() / ".cache" / "attn"
    path = pathlib.Path(folder) / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys}
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged archive can raise nearly anything
        warnings.warn(f"{path} is damaged and built again: {error}", stacklevel=2)
    arrays = build()
    try:
        _store(path, arrays)
    except OSError as error:
        warnings.warn(f"{path} cannot be written, so it will be built again next time; "
                      f"set ATTN_CACHE to another folder: {error}", stacklevel=2)
    return arrays


def _store(path: pathlib.Path, arrays: Arrays) -> None:
    """Written beside its place and moved there, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            np.savez(file, **dict[str, Any](arrays))
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
