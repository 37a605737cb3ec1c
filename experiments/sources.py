"""Sources: where the model of a command comes from, and what it runs with.

A folder with `config.json` and safetensors, a name on a hub, the folder of a run of
`experiments.lm`, or `small`, the model that ships (`models/small`); `models.swap` puts
others in the place of its exact attentions.
"""

from __future__ import annotations

import json
import pathlib
import shlex
from typing import Any, NamedTuple

from experiments.cli import config
from experiments.training.loop import abstract
from experiments.training.runs import RECORD, Checkpoints
from experiments.training.step import TEXT
from models.checkpoint import load
from models.checkpoint.tokenizer import Defaults, Tokenizer, defaults, local, longest
from models.sampling import Sampling
from models.small import FOLDER

SHIPPED = "small"  # what commands read where nothing else is said


class Loaded(NamedTuple):
    """A model, its parameters, its tokenizer (`encode`, `decode`), how it wants to be
    sampled, and the longest text that it was made for."""

    model: Any
    params: Any
    text: Any
    defaults: Defaults
    limit: int | None


def loaded(name: str) -> Loaded:
    """A model by its folder or its name."""
    if (pathlib.Path(name).expanduser() / RECORD).exists():
        return of_run(pathlib.Path(name).expanduser())
    folder = folder_of(name)
    model, params = load(folder)
    there = (folder / "tokenizer.json").exists()
    text = Tokenizer(folder, model.vocab) if there else Ids(folder)
    return Loaded(model, params, text, defaults(folder), longest(model))


def folder_of(name: str) -> pathlib.Path:
    """The folder of a checkpoint by its path or its name; `small` is the one that
    ships, unless there is a folder of that name here."""
    if name == SHIPPED and not pathlib.Path(name).is_dir():
        return FOLDER
    return local(name)


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


class OfCorpus:
    """The tokenizer of a run's text."""

    def __init__(self, corpus: Any):
        self.corpus = corpus

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.corpus.encode(text).tolist()

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self.corpus.decode(ids)


def of_run(folder: pathlib.Path) -> Loaded:
    """The newest parameters of a run of `experiments.lm`."""
    from experiments import lm

    words = shlex.split(json.loads((folder / RECORD).read_text())["command"])
    if words[2] != "experiments.lm":
        raise ValueError(f"{folder} is a run of {words[2]}: expected experiments.lm")
    given = config.read(lm.Config, words[3:])
    model, data = given.model(), given.data
    like = abstract(model, given.plan(), data.batch(0, 1)[TEXT.inputs], None)
    state = Checkpoints(folder).restore(like)
    nothing = Defaults(Sampling(), [], [])
    return Loaded(model, state.params, OfCorpus(data), nothing, None)
