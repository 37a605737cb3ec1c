"""Quality against memory, of every family that streams, in one table.

Each attention learns the same associative recall (`experiments.recall`: keys with
values go by, then the keys are asked for) in the same small network and is then read as
a stream, with the memory that it keeps. A policy for the cache of exact attention is
not trained: it takes over the network of exact attention. Memory is what the arrays of
one sequence's state hold, of all layers, float32 (what a compiled program says of them
is 8 bytes an array more): as long as the task, and of 4,096 tokens, where one that
grows has grown.

    python -m experiments.leaderboard

trains one network of each family, settings small enough to matter on so short a row,
and prints the table sorted by memory, with a picture; it goes on where it was with
`--folder=`. What is left out: `Retrieval`, whose index is for thousands of keys;
`Razor` and `Duo`, which have to be told which heads are which; `ActQKV`; `Seer` and
`SeerR`, whose gates are distilled; `MoBA`, `NSA`, `FlexPrefill` and `PrFlash`, which
choose blocks of a memory that they keep; `Pasta` and `ACT`, which keep all of it, too.

What ships (`experiments/leaderboard.json`, by `--seeds=3`; a seed takes 9 minutes of
one core) are medians of three seeds: exact attention recalls 100% with 2.1 MB of 4,096
tokens; a sixth of that in codes (KIVI, SAQ) is enough for the same, and half of it by
shards (S2) for 99.4%. Of what does not grow LightNet recalls 93% with 9 kB (87% to
94%), Based 92% with 20 kB (84% to 94%), Delta 83% with 11 kB (55% to 88%), and of the
policies that free memory SnapKV 81% with 6.5 kB (79% to 84%). Most linear recurrences
have not found the task after so few steps, and some find it with one seed of three:
Routing 2% to 70%, Titans 34% to 86%, Miras 10% to 47%, Lightning 12% to 41%.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.aaren import Aaren
from attn.abc import ABC
from attn.adakv import AdaKV
from attn.based import Based
from attn.combiner import Combiner
from attn.cosformer import CosFormer
from attn.delta import Delta
from attn.flow import Flow
from attn.gla import GLA
from attn.h2o import H2O
from attn.hip import HiP
from attn.kivi import KIVI
from attn.landmark import Landmark
from attn.lightnet import LightNet
from attn.lightning import Lightning
from attn.lineartransformer import LinearTransformer
from attn.local import Local
from attn.longshort import LongShort
from attn.miras import Miras
from attn.performer import Performer
from attn.pyramidkv import PyramidKV
from attn.quest import Quest
from attn.rat import RAT
from attn.recycled import Recycled
from attn.relative import Relative
from attn.retnet import RetNet
from attn.routing import Routing
from attn.s2 import S2
from attn.s4d import S4D
from attn.saq import SAQ
from attn.sea import SEA
from attn.sinklora import SinkLoRA
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from attn.streaming import Streaming
from attn.titans import Titans
from attn.topk import TopK
from attn.tova import TOVA
from experiments import recall
from experiments.cli import config
from experiments.cli.config import FREE, GROWS, STEPS, option
from experiments.compare import trained_as
from experiments.measure import charts, report, seeds, shipped
from experiments.measure.provenance import provenance
from experiments.training.cells import cell, kept
from experiments.training.loop import NotFinite
from experiments.training.runs import locked, open_folder, write_whole
from models.generate import check_stream
from models.lm import state_bytes
from models.stack import check_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared, on what size of the task."""

    attentions: tuple = option(
        (
            Softmax(), Relative(reach=64), Local(window=8), RAT(chunk=8),
            Combiner(block=8), S2(block=4, local=2, stride=2), SinkLoRA(group=16),
            Routing(clusters=4, window=8), LongShort(window=8, chunk=8),
            SEA(columns=16, keep=4, length=4096), Landmark(block=7, top_k=2),
            ABC(landmarks=8), Aaren(), Based(feature_dim=8), CosFormer(),
            Performer(features=32), LinearTransformer(), Flow(), LightNet(),
            Lightning(), RetNet(), GLA(), Delta(), S4D(), Titans(chunk=8, depth=1),
            Miras(chunk=8, memory="linear"), SnapKV(capacity=12, window=4),
            PyramidKV(capacity=12, window=4, layers=1), AdaKV(capacity=12, window=4),
            H2O(heavy=6, recent=6), TOVA(capacity=12),
            Streaming(sinks=4, window=8, rebase=False),
            Quest(page=4, budget=8, least=1),
            TopK(top_k=6, block=1, sink=0, local=2), Recycled(capacity=8),
            HiP(keys=8, block_q=4, block_k=2, window=4), KIVI(), SAQ(),
        ),
        "the list",
    )
    pairs: int = option(8, "keys with values in a sequence")
    length: int = option(48, "tokens of a sequence")
    vocab: int = option(128, "token ids: keys the lower half, values the upper half")
    width: int = option(64, "model width E")
    heads: int = option(2, "heads H")
    steps: int = option(500, "training steps", most=STEPS)
    batch: int = option(16, "sequences a step")
    rate: float = option(5e-3, "peak learning rate", above=0)
    long: int = option(4096, "tokens of the memory that is counted as well")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(
        1, "networks trained of each, with seeds one after the other; an old run may "
        "get more", GROWS)
    minutes: float | None = option(
        None, "after which no network is begun; None: no end", FREE)
    quiet: bool = option(False, "no progress and no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)
    record: str | None = option(
        None, "a file that leaderboard.json is copied to", FREE)

    def __post_init__(self):
        seeds.check(self)
        if not self.attentions:
            raise ValueError("attentions=(): expected one or more")
        check_layers("attentions", self.attentions)
        if self.long < self.length:
            raise ValueError(f"long={self.long}: expected length={self.length} or more")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(
                f"width={self.width}: expected a multiple of heads={self.heads}")
        self.recall(Softmax(), self.seed).curriculum()  # whether pairs fit

    def recall(self, attention: Any, seed: int) -> recall.Config:
        """The task of one attention."""
        return recall.Config(
            attention=attention, pairs=self.pairs, length=self.length,
            vocab=self.vocab, width=self.width, heads=self.heads, steps=self.steps,
            batch=self.batch, rate=self.rate, seed=seed, seeds=1, quiet=True)


TINY = Config(
    attentions=(Softmax(), Based(feature_dim=2), TOVA(capacity=6)), pairs=2, length=16,
    vocab=32, width=16, steps=2, batch=4, long=32, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Trains and reads -> recall and bytes by attention, folder."""
    for attention in config_.attentions:  # what cannot stream ends here, no folder made
        model = config_.recall(attention, config_.seed).model()
        for length in (config_.length, config_.long):  # what is read, what is counted
            check_stream(model, length)
    command = config.command(config_)
    folder = open_folder(
        "leaderboard", config_.folder, command, config.settings(config_))
    console = Console(stderr=True, quiet=config_.quiet)
    rows: list[dict[str, Any]] = []
    fits: dict[Any, Any] = {}
    clock = time.perf_counter()
    with locked(folder):
        for n, attention in enumerate(config_.attentions, 1):
            label = config.format_value(attention)
            parts = [cell_of(one, attention, folder, fits, clock)
                     for one in seeds.each(config_)]
            if None in parts:
                continue
            found = row([part for part, _ in parts])
            rows.append({"attention": label} | found)
            if not all(known for _, known in parts):
                said = found.get("failed") or (
                    f"recall {found['recall']:.1%}, {found['bytes']:,} bytes")
                console.print(f"{n}/{len(config_.attentions)} {label}: {said}",
                              markup=False, highlight=False)
        which = [one.seed for one in seeds.each(config_)]
        result = provenance(command, which) | {
            "rows": rows, "long": config_.long, "asked": len(config_.attentions)}
        text = json.dumps(result, indent=1) + "\n"
        write_whole(folder / "leaderboard.json", text)
        good = [one for one in rows if "failed" not in one]
        if good:
            charts.leaderboard_picture(
                good, len(config_.attentions), folder / "leaderboard.png")
        if config_.record is not None:
            shipped.copy(pathlib.Path(config_.record), result)
    if not config_.quiet:
        Console().print(table(result))
    numbers = {f"{one['attention']} {name}": one[name] for one in rows
               for name in ("recall", "bytes", "bytes_long", "failed") if name in one}
    return numbers | {"folder": str(folder)}


def source(attention: Any) -> Any:
    """The attention whose network it reads with: that of a policy is exact attention's
    (`experiments.compare`), and so it is here of two more that ask for no training."""
    exact = isinstance(attention, TopK) and attention.prefill == "dense"
    free = exact or isinstance(attention, HiP)
    return Softmax() if free else trained_as(attention)


def cell_of(config_: Config, attention, folder, fits: dict, clock: float):
    """(the cell of one seed's network, whether it was there already); None where it is
    not and `minutes` since `clock` are over."""
    name = f"{config.format_value(attention)} seed={config_.seed}"
    spent = (time.perf_counter() - clock) / 60
    late = config_.minutes is not None and spent >= config_.minutes
    if late and kept(folder, name) is None:
        return None
    return cell(folder, name, functools.partial(network, config_, attention, fits))


def network(config_: Config, attention: Any, fits: dict) -> dict[str, Any]:
    """recall, bytes of memory and seconds of one seed, or why there are none; fits:
    networks that are trained already, by attention and seed."""
    clock, learns = time.perf_counter(), source(attention)
    task = config_.recall(attention, config_.seed)
    try:
        model = task.model()
        bytes_ = [state_bytes(model, n) for n in (task.length, config_.long)]
        key = config.format_value(learns), config_.seed
        if key not in fits:
            fits[key] = recall.trained(config_.recall(learns, config_.seed))
        right = recall.scores(task, model, fits[key])["recall"]
    except (NotFinite, NotImplementedError, ValueError) as error:
        return {"failed": str(error), "seconds": time.perf_counter() - clock}
    return {"recall": right, "bytes": bytes_[0], "bytes_long": bytes_[1],
            "trained": learns == attention, "seconds": time.perf_counter() - clock}


def row(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The networks of all seeds: recall is the median; failed if one has."""
    seconds = sum(one["seconds"] for one in parts)
    failed = [one["failed"] for one in parts if "failed" in one]
    if failed:
        return {"failed": failed[0], "seconds": seconds}
    recalls = [one["recall"] for one in parts]
    return parts[0] | {"recall": float(np.median(recalls)), "recall_seeds": recalls,
                       "seconds": seconds}


def table(result: dict[str, Any]) -> Table:
    """The rows by the memory of a long text, the least first."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
                  caption=f"{len(result['rows'])} of {result['asked']} were run; "
                  "network: own, or that of exact attention, not trained anew")
    found.add_column("attention", overflow="fold", min_width=22)
    long = f"bytes of\n{result['long']:,} tokens"
    for title in ("recall", "bytes\nof the task", long, "network"):
        found.add_column(title, justify="right")
    good = [one for one in result["rows"] if "failed" not in one]
    for one in sorted(good, key=lambda one: (one["bytes_long"], -one["recall"])):
        found.add_row(
            one["attention"], report.cell(one, "recall", "{:.1%}"), f"{one['bytes']:,}",
            f"{one['bytes_long']:,}", "own" if one["trained"] else "exact")
    for one in result["rows"]:
        if "failed" in one:
            found.add_row(one["attention"], one["failed"], "", "", "")
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
