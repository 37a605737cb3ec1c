"""Text: documents from files, the standard library, or Hugging Face."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import itertools
import os
import pathlib
import sysconfig

from experiments.data.corpus import Corpus

RUN = "attn_run.json"  # a file of folders that hold a run
OUTSIDE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Text(Corpus):
    """A text file, or every file of a folder whose name fits `pattern`: see `Corpus`.

    Without a `path` it is the source (*.py) of the running Python's standard library,
    its tests and installed packages left out: some 12 MB that every machine has. Left
    out are hidden files and folders, and folders that hold a run; links are followed.
    ValueError for files that cannot be read or are not UTF-8 text.
    """

    path: str | None = None
    pattern: str = "*"

    def __post_init__(self):
        super().__post_init__()
        self.require("path", "\0" not in (self.path or ""), "a path without NUL")

    def anywhere(self) -> Text:
        return dataclasses.replace(self, path=None, pattern="*")

    def documents(self) -> dict[str, str]:
        shown = f"Text: path={self.path!r}"
        try:
            root = pathlib.Path(self.path or sysconfig.get_path("stdlib")).expanduser()
            files = [root] if root.is_file() else self._files(root)
            found = {f.relative_to(root).as_posix(): self._read(f) for f in files}
        except FileNotFoundError as error:
            gone = "" if error.filename == str(root) else f" ({error.filename})"
            raise ValueError(f"{shown}: no such file or folder{gone}") from None
        except OSError as error:
            raise ValueError(f"Text: {str(error.filename)!r} cannot be read: "
                             f"{error.strerror}") from None
        except RuntimeError as error:  # ~ of nobody
            raise ValueError(f"{shown}: {error}") from None
        if not any(found.values()):
            what = f"a file with text that fits {self.pattern!r}"
            what = "a file with text" if root.is_file() else what
            raise ValueError(f"Text: path={str(root)!r} is empty: expected {what}")
        return found

    def _files(self, root: pathlib.Path) -> list[pathlib.Path]:
        def stop(error):
            raise error

        found, seen = [], set()
        for folder, below, names in os.walk(root, onerror=stop, followlinks=True):
            place = os.path.realpath(folder)
            if place in seen or folder != str(root) and RUN in names:
                below.clear()  # a link that leads back; what a run has written
                continue
            seen.add(place)
            skipped = OUTSIDE if self.path is None else set()
            below[:] = sorted(b for b in below if b not in skipped and b[0] != ".")
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

    def anywhere(self) -> HuggingFace:
        return HuggingFace(
            name="", length=self.length, seed=self.seed, split=self.split,
            tokenizer=self.tokenizer, vocab=self.vocab, held_out=self.held_out,
            pack=self.pack,
        )

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
