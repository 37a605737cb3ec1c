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
import sys
from typing import Any

from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.data import Corpus, Cycle, Text
from experiments.data.retrieval import Facts, Names, Opened, Pairs, Repeated
from experiments.training.loop import TrainConfig, TrainResult, fit
from experiments.training.runs import open_folder
from models.checkpoint.config import Config as Source
from models.checkpoint.loading import model_of
from models.lm import LM


@dataclasses.dataclass(frozen=True)
class Config:
    """The network and its training."""

    text: Corpus = option(Text(tokenizer="bpe", vocab=2047), "the text, and its tokens")
    length: int = option(1024, "tokens of a row")
    width: int = option(256, "model width E")
    hidden: int = option(512, "width of the MLPs")
    layers: int = option(4, "layers")
    heads: int = option(8, "heads H; each has keys of its own")
    steps: int = option(2800, "training steps")
    batch: int = option(8, "rows a step")
    rate: float = option(2e-3, "peak learning rate")
    seed: int = option(0, "of data and parameters")
    save_every: float | None = option(10, "minutes between checkpoints", FREE)
    quiet: bool = option(False, "no progress bar", FREE)
    folder: str | None = option(
        None, "folder of the run; an old one goes on (None: new)", FREE
    )

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

    def rows(self) -> Cycle:
        """What it reads, batch by batch."""
        def rows(kind: type[Opened], **more: Any) -> Opened:
            return kind(text=self.text, length=self.length, seed=self.seed, **more)

        text = rows(Opened)
        return Cycle((
            text, rows(Repeated), text, rows(Facts, facts=min(8, self.length // 64)),
            text, rows(Pairs), rows(Names),
        ))

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate,
            warmup=min(100, self.steps // 10), seed=self.seed,
            save_minutes=self.save_every,
        )


def trained(config_: Config) -> TrainResult:
    """The training, or what is left of it."""
    folder = open_folder("small", config_.folder, config.command(config_),
                         config.settings(config_))
    return fit(config_.model(), config_.rows(), config_.plan(), folder,
               label="small", quiet=config_.quiet)


def run(config_: Config) -> dict[str, Any]:
    """Trains."""
    found = trained(config_)
    return {"tokens_per_second": found.tokens_per_second}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
