"""Recall against state: what an attention of fixed memory answers, by its size.

Arora et al., 2024 (arXiv:2402.18668) measure how much of an associative recall task a
mechanism answers (`experiments.recall`) against the bytes that it keeps of a sequence:
a larger state recalls more, and the Taylor features of Based recall more than a sliding
window, or a linear attention with blunt weights, of the same size. Each attention here
learns the same task in the same network; the memory then read is the one it keeps. A
step of decoding reads all of it, so its growth with the length is printed as well.

    python -m experiments.frontier

trains each with three seeds, which takes three times the 2 to 5 minutes that one seed
(`--seeds=1`) takes on 2 cores. With seed 0: recall of 16 pairs in 64 tokens, bytes of a
sequence's memory, and microseconds of a decoding step at T = 4096:

    Based(feature_dim=2)                   32.9%     2,092      263
    Based(feature_dim=4)                   75.2%     5,732      194
    Based(feature_dim=8, compact=True)     97.6%    11,972      220
    Based(feature_dim=8)                   97.6%    19,252      214
    a window of 8                           1.2%     4,400      223
    a window of 16                          2.3%     8,528      230
    a window of 32                         52.6%    16,784      239
    Lightning()                            61.7%    16,656      205
    GLA()                                   4.9%    16,656      374
    Delta()                                99.3%    18,960      306
    Softmax()                              99.8%    33,296    5,122

Recall of Based rises with its state. The best Based of at most its bytes is 32, 73 and
45 points ahead of the windows and 36 ahead of Lightning; Delta is 1.8 points ahead of
it. (The compact state is the same function, so it recalls the same with less.)
All memories but that of softmax are as large at any length (exponent 0; softmax 1.00).
GLA learns next to nothing in 800 steps at this rate. At 3e-3, tried for five of them by
`experiments.recall`, GLA recalls 34.6%, and the others less than above: Lightning 5.8%,
the window of 32 52.4%, Based of 4 and 8 55.1% and 83.5%. One seed; 800 steps do not
show what a longer training would reach.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.based import Based
from attn.delta import Delta
from attn.gla import GLA
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.softmax import Softmax
from experiments import recall
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.measure import report, seeds
from experiments.measure.provenance import provenance
from experiments.measure.timing import inputs, prepared, repeats, seconds
from experiments.training.loop import check
from experiments.training.runs import locked, open_folder, write_whole
from models.generate import check_stream
from models.lm import state_bytes
from models.stack import check_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared, on what size of the task."""

    attentions: tuple = option(
        (
            Based(feature_dim=2),
            Based(feature_dim=4),
            Based(feature_dim=8, compact=True),
            Based(feature_dim=8),
            Softmax(mask=Causal() & Window(7)),
            Softmax(mask=Causal() & Window(15)),
            Softmax(mask=Causal() & Window(31)),
            Lightning(),
            GLA(),
            Delta(),
            Softmax(),
        ),
        "the list; Window(n) sees n tokens back and the present one",
    )
    pairs: int = option(16, "keys with values in a sequence")
    length: int = option(64, "tokens of a sequence")
    vocab: int = option(
        256, "token ids; the lower half are keys, the upper half values"
    )
    width: int = option(64, "model width E")
    steps: int = option(800, "training steps", most=STEPS)
    batch: int = option(16, "sequences a step")
    rate: float = option(1e-2, "peak learning rate", above=0)
    lengths: tuple = option((256, 1024, 4096, 16384), "at which memory is counted")
    stream: int = option(4096, "tokens in memory where a step of decoding is timed")
    rounds: int = option(9, "how often each step is timed")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(3, "networks trained of each, with seeds one after the other")
    quiet: bool = option(False, "no progress bars and no table", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE
    )

    def __post_init__(self):
        check_layers("attentions", self.attentions)
        seeds.check(self)
        if not self.attentions or not self.lengths:
            raise ValueError("attentions or lengths: expected one or more, not ()")

    def recall(self, attention: Any) -> recall.Config:
        """The run of one attention."""
        return recall.Config(
            attention=attention, pairs=self.pairs, length=self.length,
            vocab=self.vocab, width=self.width, steps=self.steps, batch=self.batch,
            rate=self.rate, seed=self.seed, seeds=self.seeds, quiet=self.quiet,
        )


TINY = Config(
    attentions=(Based(feature_dim=2), Softmax(mask=Causal() & Window(3))), pairs=2,
    length=16, vocab=32, width=16, steps=2, batch=4, lengths=(16, 32), stream=16,
    rounds=1, seeds=2, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Trains and measures -> for each attention recall, state_bytes, decode_us and the
    exponent of its memory; the smallest lead of Based over those of a fixed memory."""
    for attention in config_.attentions:  # what cannot run ends here, without a folder
        task = config_.recall(attention)
        check(task.model(), task.plan(), task.curriculum())
        check_stream(task.model(), task.length)
    command = config.command(config_)
    folder = open_folder("frontier", config_.folder, command, config.settings(config_))
    console = Console(stderr=True, quiet=config_.quiet)
    with locked(folder):
        times, rows = decoding(config_), []
        for n, attention in enumerate(config_.attentions, 1):
            label = config.format_value(attention)
            console.print(f"[bold]{n}/{len(config_.attentions)} {label}")
            rows.append(row(config_, attention) | {"decode_us": 1e6 * times[n - 1]})
        which = [one.seed for one in seeds.each(config_)]
        found = provenance(command, which) | {"rows": rows}
        write_whole(folder / "frontier.json", json.dumps(found, indent=1) + "\n")
        report.recall_picture(rows, folder / "frontier.png")
    if not config_.quiet:
        Console().print(table(config_, rows))
    names = "recall", "recall_from", "recall_to", "state_bytes", "growth", "decode_us"
    numbers = {f"{one['attention']} {name}": one[name] for one in rows
               for name in names}
    open_ends = {f"{one['attention']} not converged": one["not_converged"]
                 for one in rows if one["not_converged"]}
    return numbers | leads(rows) | open_ends | {"folder": str(folder)}


def row(config_: Config, attention: Any) -> dict[str, Any]:
    """The numbers of one attention, trained anew with each seed. growth: the exponent
    of its memory in the length, 0 if it is constant and 1 if it is in proportion."""
    task = config_.recall(attention)
    model = task.model()
    found = [recall.scores(one, model, recall.trained(one)) for one in seeds.each(task)]
    recalls, scores = [one["recall"] for one in found], found[0]
    sizes = [state_bytes(model, length) for length in config_.lengths]
    ends = [np.log(end / start) for start, end in (
        (config_.lengths[0], config_.lengths[-1]), (sizes[0], sizes[-1]))]
    return {
        "attention": config.format_value(attention), "kind": type(attention).__name__,
        "recall": float(np.median(recalls)), "recall_seeds": recalls,
        "recall_from": min(recalls), "recall_to": max(recalls),
        "not_converged": seeds.unsettled(found, ("recall",)),
        "chance": scores["chance"],
        "state_bytes": scores["state_bytes"], "recall_state": scores["state_bytes"],
        "train_loss": float(np.median([one["train_loss"] for one in found])),
        "sizes": sizes,
        "growth": float(ends[1] / ends[0]) if ends[0] else 0.0,
        "command": config.command(task),
    }


def leads(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How much more Based recalls than each attention of fixed memory that is not
    smaller: the best Based of at most its bytes, less its own recall, of medians over
    seeds; and over Based
    themselves, the least that recall rises by from one size to the next."""
    based = sorted(
        (r["state_bytes"], r["recall"]) for r in rows if r["kind"] == "Based")
    found = {}
    for one in rows:
        within = [recall for size, recall in based if size <= one["state_bytes"]]
        if one["kind"] != "Based" and one["growth"] < 0.5 and within:
            found[f"lead over {one['attention']}"] = max(within) - one["recall"]
    if len(based) > 1:
        rises = np.diff([recall for _, recall in based])
        found["least rise of Based"] = float(rises.min())
    return found


def decoding(config_: Config) -> list[float]:
    """Seconds of one more token of each attention, 4 heads of 64 channels, with
    `stream` tokens in memory: the median of rounds in which all take turns."""
    calls = []
    for attention in config_.attentions:
        d = getattr(attention, "feature_dim", None) or 64
        x = inputs(1, config_.stream, 4, 4, d, 64, np.float32)
        calls.append(prepared(attention, x.last, "decode"))
    often = [repeats(call) for call in calls]
    spent = [[seconds(call, n) for call, n in zip(calls, often)]
             for _ in range(config_.rounds)]
    return np.median(spent, 0).tolist()


def table(config_: Config, rows: list[dict[str, Any]]) -> Table:
    """The rows for the terminal, with the bytes that a step of decoding reads."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    found.add_column("attention", overflow="fold", min_width=22)
    ends = [0, len(config_.lengths) - 1]
    titles = ["recall", "memory\nbytes", f"us a token\nat {config_.stream:,}"]
    titles += [f"bytes read\nat {config_.lengths[n]:,}" for n in ends]
    for title in titles:
        found.add_column(title, justify="right")
    for one in rows:
        found.add_row(
            one["attention"], report.cell(one, "recall", "{:.1%}"),
            f"{one['state_bytes']:,}",
            f"{one['decode_us']:.1f}", *(f"{one['sizes'][n]:,}" for n in ends))
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
