"""The model that ships: how `models/small` was trained.

A Llama of 4 layers with 8 heads reads the standard library of Python, and, in 4 of 7
batches, rows in which something has to be found again: repeated random ids, facts
hidden in text, lists of keys with values, names (`experiments.data.retrieval`).

    python -m experiments.small --folder=small_run

A run that is stopped (Ctrl-C, SIGTERM) keeps what it has done, and the same command
goes on, so that `timeout 50m python -m experiments.small --folder=small_run` is a leg.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus, Cycle, Grown, Text, bpe
from experiments.data.retrieval import Facts, Names, Opened, Pairs, Repeated
from experiments.training.loop import TrainConfig, fit
from experiments.training.mesh import whole
from experiments.training.runs import open_folder, write_whole
from models.checkpoint import save
from models.checkpoint.config import Config as Source
from models.checkpoint.loading import model_of
from models.lm import LM

START = "<|endoftext|>"
# of the standard library of this Python and the tokenizer that is trained on it
PYTHON_3_11_7 = "sha256:84afbcfc31a71b39c922ff1f7ae4caef"


@dataclasses.dataclass(frozen=True)
class Config:
    """The network and its training."""

    text: Corpus = option(Text(tokenizer="bpe", vocab=2047), "the text, and its tokens")
    length: int = option(1024, "tokens of a row")
    width: int = option(256, "model width E")
    hidden: int = option(512, "width of the MLPs")
    layers: int = option(4, "layers")
    heads: int = option(8, "heads H; each has keys of its own")
    steps: int = option(2800, "training steps", most=STEPS)
    batch: int = option(8, "rows a step")
    rate: float = option(2e-3, "peak learning rate", above=0)
    seed: int = option(0, "of data and parameters")
    save_every: float | None = option(10, "minutes between checkpoints", FREE)
    digest: str | None = option(
        PYTHON_3_11_7, "of the text and its tokens, which is refused if it is another "
        "one (None: any)", FREE)
    quiet: bool = option(False, "no progress bar", FREE)
    folder: str | None = option(
        None, "folder of the run; an old one goes on (None: new)", FREE
    )

    def __post_init__(self):
        if self.length % 8:  # the first rows have an eighth of it
            raise ValueError(f"length={self.length}: expected a multiple of 8")

    @property
    def source(self) -> Source:
        """The `config.json` of the model."""
        start = self.text.vocab  # also where a text ends
        return Source({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": start,
            "dtype": "float32", "eos_token_id": start,
            "head_dim": self.width // self.heads, "hidden_act": "silu",
            "hidden_size": self.width, "initializer_range": 0.02,
            "intermediate_size": self.hidden, "max_position_embeddings": self.length,
            "mlp_bias": False, "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers, "num_key_value_heads": self.heads,
            "pretraining_tp": 1, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": True, "use_cache": True, "vocab_size": start + 1,
        })

    def model(self) -> LM:
        """The network."""
        return model_of(self.source)

    def rows(self) -> Grown:
        """What it reads, batch by batch: copying is learned in rows of an eighth and a
        quarter of the length, where a query has few keys to choose from."""
        early = [(self.lesson(self.length // part), round(share * self.steps))
                 for part, share in ((8, 0.2), (4, 0.15))]
        return Grown(tuple(early), self.lesson(self.length))

    def lesson(self, length: int) -> Cycle:
        """All kinds of rows, of one length."""
        def rows(kind: type[Opened], **more: Any) -> Opened:
            return kind(text=self.text, length=length, seed=self.seed, **more)

        text, facts = rows(Opened), max(1, min(8, length // 64))
        return Cycle((text, rows(Repeated), text, rows(Facts, facts=facts), text,
                      rows(Pairs), rows(Names)))

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate,
            warmup=min(100, self.steps // 10), seed=self.seed,
            save_minutes=self.save_every,
        )


def written(folder: pathlib.Path, config_: Config, params: Any) -> None:
    """The model as a folder of a hub: parameters in bfloat16, config, tokenizer."""
    small = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    save(folder, config_.model(), small)
    encoder = tokenizer(config_.text)
    encoder.save(str(folder / "tokenizer.json"))
    at = config_.text.vocab
    for name, content in (
        ("tokenizer_config.json", {
            "bos_token": START, "eos_token": START, "model_max_length": config_.length,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }),
        ("files.json", {
            "digest": config_.text.digest(), **config_.text.names,
        }),
        ("generation_config.json", {"bos_token_id": at, "eos_token_id": at}),
    ):
        write_whole(folder / name, json.dumps(content, indent=2) + "\n")


def check_text(config_: Config) -> None:
    """ValueError if the text is not the one that is expected."""
    found = config_.text.digest()
    if config_.digest not in (None, found):
        raise ValueError(
            f"the text and its tokens have the digest {found}: expected "
            f"{config_.digest}, the standard library of Python 3.11.7, or --digest=None"
        )


def tokenizer(text: Corpus) -> Any:
    """The encoding of a corpus, with the token that a text begins with: it has the id
    after all others, and is put before what is encoded."""
    library = bpe.tokenizers()
    encoder = library.Tokenizer.from_str(text.tokenizer_json)
    encoder.add_special_tokens([START])
    encoder.post_processor = library.processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, encoder.token_to_id(START))])
    if encoder.token_to_id(START) != text.vocab:
        raise ValueError(f"vocab={text.vocab}: the text has only "
                         f"{encoder.token_to_id(START)} tokens, expected fewer or more "
                         "text")
    return encoder


def run(config_: Config) -> dict[str, Any]:
    """Trains, and writes the model into the folder `model` of the run."""
    check_text(config_)
    tokenizer(config_.text)
    folder = open_folder("small", config_.folder, config.command(config_),
                         config.settings(config_))
    found = fit(config_.model(), config_.rows(), config_.plan(), folder,
                label="small", quiet=config_.quiet)
    written(folder / "model", config_, whole(found.params))
    parameters = sum(a.size for a in jax.tree.leaves(found.params))
    return {"loss": found.rows[-1]["loss"], "parameters": parameters,
            "tokens_per_second": found.tokens_per_second,
            "model": str(folder / "model")}


TINY = Config(
    text=Text(tokenizer="bpe", vocab=300, path=__file__, held_out=0.2), length=128,
    digest=None,
    width=16, hidden=16, layers=1, heads=2, steps=3, batch=1, quiet=True,
)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
