"""Sources: where the model of a command comes from, and what it runs with.

A folder with `config.json` and safetensors, a name on a hub, the folder of a run of
`experiments.lm`, or `small`, the model that ships (`models/small`); `models.swap` puts
others in the place of its exact attentions.
"""

from __future__ import annotations

import json
import pathlib
import shlex
from typing import Any

from experiments.cli import config
from experiments.measure.reading import Ids, Loaded
from experiments.training.loop import abstract
from experiments.training.runs import RECORD, Checkpoints
from experiments.training.step import TEXT
from models.checkpoint import load
from models.checkpoint.tokenizer import Defaults, Tokenizer, defaults, local, longest
from models.sampling import Sampling
from models.small import FOLDER

SHIPPED = "small"  # what commands read where nothing else is said


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
