"""The main job: which attention remembers what, and at what cost.

Every attention in the list gets the same budget twice: a small network is trained on
associative recall (`experiments.recall`), another on text (`experiments.lm`). Both are
then read as streams, with the memory that each attention really keeps. An attention
that only compresses the memory (SnapKV) is not trained: it takes over the network of
the exact attention that it belongs to.

    python -m experiments.compare

trains each with one seed, which takes 3 minutes on 2 cores (it says how long before it
begins), and leaves a table, compare.json, two pictures and report.html in a new folder
under results/. One seed is no result: beside each figure stands what three seeds gave,
which ships as experiments/compare.json and was made by

    python -m experiments.compare --seeds=3 --record=experiments/compare.json

Medians there: exact attention recalls 93%, Delta 97% and Based(feature_dim=8) 94% with
less than a third of the memory, Lightning 12% and the window 2%, with 3.1 to 3.7 bits
per byte of text, where so short a training favours what is near and Delta, whose keys
and values pass a short convolution, is among the best. All but the window have not
converged after these steps.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.based import Based
from attn.delta import Delta
from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from experiments import lm, recall
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus, Text
from experiments.measure import report, seeds, shipped
from experiments.measure.provenance import provenance
from experiments.training.loop import check
from experiments.training.runs import locked, open_folder, write_whole
from models.generate import check_stream

COLUMNS = {
    "attention": ("attention", "{}"),
    "recall": ("recall", "{:.1%}"),
    "recall_state": ("memory of recall, bytes", "{:,}"),
    "bits_per_byte": ("text bits/byte", "{:.3f}"),
    "text_state": ("memory of text, bytes", "{:,}"),
    "train_tokens_per_second": ("train tok/s", "{:,.0f}"),
    "decode_ms": ("decode ms/tok", "{:.2f}"),
}

CLAIMS = "recall", "bits_per_byte"  # what seeds have to agree about


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared, and the budget of each."""

    attentions: tuple = option(
        (
            Softmax(),
            Softmax(mask=Causal() & Window(31)),
            SnapKV(capacity=24, window=8),
            Landmark(block=15, top_k=2),
            Lightning(),
            Delta(),
            Based(feature_dim=8),
        ),
        "the list; an entry may be a tuple with one attention per layer",
    )
    pairs: int = option(16, "keys with values of the recall task")
    recall_steps: int = option(800, "training steps on recall", most=STEPS)
    recall_batch: int = option(8, "sequences of a step on recall")
    text: Corpus = option(Text(length=128), "the text, and the tokens of a row")
    layers: int = option(2, "layers of the language model")
    width: int = option(128, "width of the language model")
    text_steps: int = option(150, "training steps on text", most=STEPS)
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained of each, with seeds one after the other")
    quiet: bool = option(False, "no progress bars", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE
    )
    record: str | None = option(
        None, "a file for what later runs of one seed show beside their own", FREE
    )

    def __post_init__(self):
        seeds.check(self)
        if not self.attentions:
            raise ValueError("attentions=(): expected one or more")

    def recall(self, attention: Any) -> recall.Config:
        """The recall run of one attention."""
        return recall.Config(
            attention=attention, pairs=self.pairs, steps=self.recall_steps,
            batch=self.recall_batch, seed=self.seed, seeds=self.seeds,
            quiet=self.quiet,
        )

    def lm(self, attention: Any) -> lm.Config:
        """The text run of one attention."""
        layers = attention
        if not isinstance(attention, tuple):
            layers = (attention,) * self.layers
        return lm.Config(
            attention=layers, text=self.text, width=self.width, steps=self.text_steps,
            seed=self.seed, seeds=self.seeds, quiet=self.quiet,
        )


TINY = Config(
    attentions=(Softmax(), SnapKV(capacity=6, window=2)), pairs=2, recall_steps=2,
    text=Text(length=32), layers=1, width=16, text_steps=2, seeds=2,
    quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Trains and compares -> {"rows": one dict an attention, "folder": ...}."""
    shipped.check(config_.record, config_.seeds)
    for attention in config_.attentions:
        check_row(config_, attention)  # what cannot run ends here, without a folder
    command = config.command(config_)
    folder = open_folder("compare", config_.folder, command, config.settings(config_))
    console, rows = Console(stderr=True, quiet=config_.quiet), []
    record = shipped.load("compare", shared(config_))
    labels = [config.format_value(attention) for attention in config_.attentions]
    seconds = shipped.expected(record, labels, config_.seeds)
    if seconds is not None:
        console.print(f"{len(labels)} attentions: about {shipped.duration(seconds)} "
                      "here, less where programs are compiled already")
    fits: dict[Any, tuple] = {}
    with locked(folder):
        for n, attention in enumerate(config_.attentions, 1):
            console.print(f"[bold]{n}/{len(labels)} {labels[n - 1]}")
            rows.append(row(config_, attention, fits))
            if config_.seeds == 1:
                rows[-1] = shipped.beside(rows[-1], record, CLAIMS)
            console.print(line(rows[-1]) + left(rows, labels, record, config_.seeds))
        which = [one.seed for one in seeds.each(config_)]
        found = provenance(command, which) | {"rows": rows}
        write_whole(folder / "compare.json", json.dumps(found, indent=1) + "\n")
        report.recall_picture(rows, folder / "recall.png")
        report.loss_picture(rows, folder / "loss.png")
        write_whole(folder / "report.html", report.page(found, COLUMNS, folder))
        if config_.record is not None:
            shipped.save(pathlib.Path(config_.record), shared(config_), found)
    Console().print(table(rows))
    console.print(caption(config_, record))
    open_ends = [one["attention"] for one in rows if one["not_converged"]]
    more = {"not_converged": ", ".join(open_ends)} if open_ends else {}
    return {"rows": len(rows), "folder": str(folder)} | more


def shared(config_: Config) -> dict[str, Any]:
    """The settings under which every seed and every attention is run."""
    return config.settings(dataclasses.replace(
        config_, attentions=Config().attentions, seed=0, seeds=1, record=None
    ))


def line(row: dict[str, Any]) -> str:
    """What a row says first."""
    return (f"recall {row['recall']:.1%}, {row['bits_per_byte']:.3f} bits per byte, in "
            + shipped.duration(row["seconds"]))


def left(rows: list, labels: list[str], record: Any, many: int) -> str:
    """How long the rows that are left will take: by those of the record, at the pace of
    the rows that are done; without one, as long as those each."""
    rest = labels[len(rows):]
    spent = sum(row["seconds"] for row in rows) * many
    if not rest:
        return ""
    whole = shipped.expected(record, labels[: len(rows)], many)
    more = shipped.expected(record, rest, many)
    if whole is None or more is None:
        return f"; about {shipped.duration(spent / len(rows) * len(rest))} more"
    return f"; about {shipped.duration(more * spent / whole)} more"


def caption(config_: Config, record: Any) -> str:
    """Of how many seeds the figures are."""
    if config_.seeds > 1:
        return f"medians of {config_.seeds} seeds, under them least and greatest"
    if record is None:
        return (f"of one seed, {config_.seed}: --seeds=3 gives medians and spreads, in "
                "three times the time")
    many, made = len(record["seeds"]), f"{record['date'][:10]}, {record['device']}"
    return (f"of one seed, {config_.seed}; under it the median, the least and the "
            f"greatest of {many} seeds, as shipped ({made})")


def check_row(config_: Config, attention: Any) -> None:
    """ValueError or NotImplementedError if an attention cannot learn and stream both
    tasks. Nothing is computed."""
    of_recall, of_text = config_.recall(attention), config_.lm(attention)
    check(of_recall.model(), of_recall.plan(), of_recall.curriculum())
    check(of_text.model(), of_text.plan(), of_text.data)
    check_stream(of_recall.model(), of_recall.length)
    check_stream(of_text.model(), of_text.text.length)


def row(config_: Config, attention: Any, fits: dict) -> dict[str, Any]:
    """The numbers of one attention: medians over seeds, those of each seed, and the
    seconds that a seed took. fits: networks that are trained already."""
    start = time.perf_counter()
    found = [row_of_seed(one, attention, fits) for one in seeds.each(config_)]
    seconds = (time.perf_counter() - start) / len(found)
    medians = {name: float(np.median([one[name] for one in found]))
               for name in (*CLAIMS, "train_tokens_per_second", "decode_ms")}
    values = {f"{name}_seeds": [one[name] for one in found] for name in medians}
    of_recall, of_text = config_.recall(attention), config_.lm(attention)
    return found[0] | medians | values | {
        "losses": [one["losses"] for one in found],
        "not_converged": seeds.unsettled(found, CLAIMS),
        "seconds": seconds,
        "commands": [config.command(of_recall), config.command(of_text)],
    }


def row_of_seed(config_: Config, attention: Any, fits: dict) -> dict[str, Any]:
    """The numbers of one attention with one seed."""
    source = jax.tree.map(trained_as, attention, is_leaf=lambda a: not _is_tuple(a))
    if (source, config_.seed) not in fits:
        of_recall, of_text = config_.recall(source), config_.lm(source)
        fits[source, config_.seed] = recall.trained(of_recall), lm.trained(of_text)
    recalled, text = fits[source, config_.seed]
    of_recall, of_text = config_.recall(attention), config_.lm(attention)
    remembered = recall.scores(of_recall, of_recall.model(), recalled)
    model = of_text.model()
    read = lm.scores(of_text, model, text)
    rows = config_.text.length * of_text.batch
    return {
        "attention": config.format_value(attention),
        "trained_as": config.format_value(source),
        "recall": remembered["recall"],
        "chance": remembered["chance"],
        "recall_state": remembered["state_bytes"],
        "bits_per_byte": lm.streamed_bits(of_text, model, text),
        "text_state": read["state_bytes"],
        "train_tokens_per_second": read["tokens_per_second"],
        "decode_ms": read["decode_ms"],
        "parameters": read["parameters"],
        "losses": [[r["step"] * rows, r["loss"]] for r in text.rows],
        "falling": remembered["falling"],
    }


def trained_as(attention: Any) -> Any:
    """The attention that a network is trained with: a policy for the cache of exact
    attention learns nothing and does nothing before there is a cache."""
    policy = getattr(attention, "part", None) is not None  # of which it says the part
    if not (policy and isinstance(attention, Softmax)):
        return attention
    own = {f.name: getattr(attention, f.name) for f in dataclasses.fields(Softmax)}
    return Softmax(**own)


def _is_tuple(a: Any) -> bool:
    return isinstance(a, tuple)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for the terminal."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, (title, _) in COLUMNS.items():
        if name == "attention":
            found.add_column(title, overflow="fold", min_width=22)
        else:
            found.add_column(title.replace(" ", "\n"), justify="right")
    for one in rows:
        found.add_row(*(report.cell(one, name, text)
                        for name, (_, text) in COLUMNS.items()))
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
