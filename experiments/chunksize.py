"""RAT's chunks: what the length L of a recurrence costs in recall and saves in time.

RAT (Wei et al., 2025, arXiv:2507.04416) sums up each chunk of L tokens by a gated
recurrence and looks across chunks by softmax: L = 1 is attention, L >= T a recurrence.
The paper claims that L = 16 is far faster on long sequences and about as good on text.
Three parts: the time of one layer over a long sequence, and what it keeps; the loss of
a small language model on bytes of the standard library; and recall of pairs
(`experiments.recall`), which has to fall with L.

    python -m experiments.chunksize

takes 3 to 6 minutes on 2 cores (6:22 beside other jobs). The claims show in direction:

    a layer, T = 8192, E = 128    softmax    L = 1    L = 16    L = 64
    ms forward                        297      316      68.9      52.0
    times as fast as softmax            1     0.91      4.25      5.77
    keys and values kept             8192     8192       512       128

    text (300 steps)              softmax            L = 16     L = T
    loss in nats a byte             1.933             1.909     1.929

    recall of 16 pairs              L = 1    L = 4    L = 16    L = 64
    share of right answers          99.9%    48.6%      6.6%      5.0%
    bytes of memory                33,808    9,040     2,848     1,300

The times are with `keep`: where glibc gives memory back between calls, L = 16 was 2.5
times as fast and no more (a run of its own). On text L = 16 is ahead of softmax and of
the recurrence, but by 1.2% and 1.0%, one seed; rows of 256 bytes ask for little memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.layers import MultiHead
from attn.rat import RAT
from attn.softmax import Softmax
from experiments import lm, recall
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus, Text
from experiments.measure import seeds
from experiments.measure.timing import keep_memory, repeats, seconds
from experiments.training.loop import evaluate
from experiments.training.runs import open_folder


@dataclasses.dataclass(frozen=True)
class Config:
    """Chunks, and the sizes of the three parts."""

    chunks: tuple[int, ...] = option((1, 16, 64), "L of the layers that are timed")
    tokens: int = option(8192, "tokens T of a timed layer")
    layer_width: int = option(128, "its model width E, of 4 heads")
    rounds: int = option(7, "how often each layer is timed")
    keep: bool = option(True, "keep freed memory in the process, where glibc is used")
    text: Corpus = option(Text(length=256), "the text, and the tokens of a row")
    chunk: int = option(16, "L of the language model beside softmax and L = T")
    layers: int = option(2, "layers of the language models")
    width: int = option(96, "their model width E, of 4 heads")
    text_steps: int = option(300, "training steps on text", most=STEPS)
    recall_chunks: tuple[int, ...] = option((1, 4, 16, 64), "L of the recall networks")
    pairs: int = option(16, "keys with values of the recall task")
    length: int = option(64, "tokens of a sequence of it")
    recall_width: int = option(64, "model width E of its networks")
    recall_steps: int = option(800, "training steps on recall", most=STEPS)
    rate: float = option(1e-2, "peak learning rate on recall", above=0)
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars and no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        seeds.check(self)

    def lm(self, attention: Any) -> lm.Config:
        """The text run of one attention."""
        return lm.Config(
            attention=(attention,) * self.layers, text=self.text, width=self.width,
            steps=self.text_steps, seed=self.seed, quiet=self.quiet,
        )

    def recall(self, chunk: int) -> recall.Config:
        """The recall run of one chunk."""
        return recall.Config(
            attention=RAT(chunk=chunk), pairs=self.pairs, length=self.length,
            width=self.recall_width, steps=self.recall_steps, rate=self.rate,
            seed=self.seed, quiet=self.quiet,
        )


TINY = Config(
    chunks=(4,), tokens=16, layer_width=16, rounds=1, text=Text(length=32), chunk=4,
    layers=1, width=16, text_steps=2, recall_chunks=(16,), pairs=2, length=16,
    recall_width=16, recall_steps=2, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    return seeds.repeated(config_, once, "chunksize", ("loss", "recall"))


def once(config_: Config) -> dict[str, Any]:
    """Times and trains -> speedup over Softmax and slots kept by L, loss (nats a token)
    of softmax, of RAT and of the recurrence, recall by L, and the folder."""
    folder = open_folder(
        "chunksize", config_.folder, config.command(config_), config.settings(config_)
    )
    if config_.keep:
        keep_memory()
    found = timed(config_) | losses(config_) | recalls(config_)
    (folder / "chunksize.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(config_, found, folder / "chunksize.png")
    if not config_.quiet:
        for one in tables(config_, found):
            Console().print(one)
    return found | {"folder": str(folder)}


def timed(config_: Config) -> dict[str, Any]:
    """Milliseconds of a layer forward and how many times as fast as with Softmax it is:
    medians of rounds in which all take turns. slots: what is kept of T tokens."""
    t, e = config_.tokens, config_.layer_width
    x = jax.random.normal(jax.random.key(config_.seed), (1, t, e))
    found: dict[str, Any] = {}
    calls = []
    for attention in (Softmax(), *(RAT(chunk=chunk) for chunk in config_.chunks)):
        layer = MultiHead(attention, 4)
        params = layer.init(jax.random.key(config_.seed), x[:, :1])
        apply: Any = jax.jit(layer.apply)
        calls.append(lambda apply=apply, params=params: apply(params, x))
        jax.block_until_ready(calls[-1]())
        state = jax.eval_shape(lambda layer=layer: layer.init_state(t, x))
        found[f"{_name(attention)} slots"] = state.k.shape[1]
    often = [repeats(call) for call in calls]
    spent = np.array([[seconds(call, n) for call, n in zip(calls, often)]
                      for _ in range(config_.rounds)])
    names = ["softmax", *(f"L={chunk}" for chunk in config_.chunks)]
    for name, own in zip(names, spent.T):
        found[f"{name} ms"] = float(np.median(own)) * 1e3
        found[f"{name} speedup"] = float(np.median(spent[:, 0] / own))
    return found


def _name(attention: Any) -> str:
    return f"L={attention.chunk}" if isinstance(attention, RAT) else "softmax"


def losses(config_: Config) -> dict[str, float]:
    """Nats a token on held-out text of softmax, of RAT, and of the recurrence."""
    held_out = dataclasses.replace(config_.text, split="valid")
    found = {}
    networks = {
        "softmax": Softmax(), f"L={config_.chunk}": RAT(chunk=config_.chunk),
        "recurrence": RAT(chunk=config_.text.length),
    }
    for name, attention in networks.items():
        own = config_.lm(attention)
        fitted = lm.trained(own)
        score = evaluate(own.model(), fitted.params, held_out, 16, own.batch)
        found[f"{name} loss"] = score["loss"]
        if not math.isfinite(score["loss"]):
            raise ValueError(f"{name}: the loss on held-out text is not finite")
    return found


def recalls(config_: Config) -> dict[str, Any]:
    """Recall and bytes of memory by L."""
    found = {}
    for chunk in config_.recall_chunks:
        own = config_.recall(chunk)
        scores = recall.scores(own, own.model(), recall.trained(own))
        found[f"L={chunk} recall"] = scores["recall"]
        found[f"L={chunk} recall_bytes"] = scores["state_bytes"]
    return found


def tables(config_: Config, found: dict[str, Any]) -> list[Table]:
    """The three parts for the terminal."""
    parts = {
        f"a layer, T={config_.tokens:,}": (
            ["softmax", *(f"L={c}" for c in config_.chunks)],
            {"ms": "{:.3g}", "speedup": "{:.2f}", "slots": "{:,}"}),
        f"text, {config_.text_steps} steps": (
            ["softmax", f"L={config_.chunk}", "recurrence"], {"loss": "{:.3f}"}),
        f"recall of {config_.pairs} pairs": (
            [f"L={c}" for c in config_.recall_chunks],
            {"recall": "{:.1%}", "recall_bytes": "{:,}"}),
    }
    made = []
    for title, (names, columns) in parts.items():
        one = Table(title=title, box=box.SIMPLE_HEAD)
        one.add_column("chunk")
        for column in columns:
            one.add_column(column, justify="right")
        for name in names:
            cells = (text.format(found[f"{name} {c}"]) for c, text in columns.items())
            one.add_row(name, *cells)
        made.append(one)
    return made


def picture(config_: Config, found: dict[str, Any], path: pathlib.Path) -> None:
    """The time of a layer, and recall, against L."""
    from experiments.measure.panels import Panel, curves

    def line(chunks: tuple[int, ...], what: str) -> tuple:
        return chunks, [found[f"L={c} {what}"] for c in chunks]

    chunk = {"xscale": "log", "xlabel": "tokens of a chunk L"}
    curves((
        Panel(f"a layer forward, T={config_.tokens:,}",
              {"RAT": line(config_.chunks, "ms")},
              chunk | {"yscale": "log", "ylabel": "ms"},
              {"softmax": found["softmax ms"]}),
        Panel("recall", {"RAT": line(config_.recall_chunks, "recall")},
              chunk | {"ylim": (-0.03, 1.03), "ylabel": "share of right answers"}),
    ), path)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
