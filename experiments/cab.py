"""Which attention for what: four patterns, seven tasks, one number each (CAB).

Comprehensive Attention Benchmarking (Zhang et al., 2022, arXiv:2210.07661) asks an
attention four ways: keys of the queries' own sequence or of another one (self, cross),
and with or without an order (causal, noncausal). Here any attentions of the library are
asked, on a processor: for each task and each pattern in it a small network is trained
that has the attention in the places of that pattern and exact attention in the others.
What is measured becomes the benchmark's index: deviations from the mean of those that
are compared, positive is better. Beside it stands from how many tokens on a layer costs
less time, and less memory, than exact attention as one matrix.

The tasks are text to speech (two networks), summarisation, super-resolution, masked
and next-byte language modelling, forecasting, completion of clouds of points; data are
synthetic but for language (`experiments/data`), networks have width 64 and two layers
on either side, one in forecasts.

    python -m experiments.cab

runs one seed, for up to two hours, and says what it leaves out (three of the networks,
two of three seeds); 70 networks took 37 minutes on 2 cores beside other jobs, 31
seconds each, half of them compiling, with XLA_FLAGS=--xla_cpu_multi_thread_eigen=false.
`--all` runs the nine attentions of the benchmark, exact attention and three others on
every task and pattern that they allow, with three seeds, for as long as it takes; what
else is set beside `--all` stays as it is set. Both go on where they were with
`--folder=`.

What ships (`experiments/cab.json`, by `--all --folder=results/cab
--record=experiments/cab.json`) is all of it: 351 networks, 43 seconds each on one core
beside other jobs. Indices are medians of three seeds, with the least and the greatest:

                           NS                       CS
    Softmax      +0.28 (-0.05 to +0.38)   +0.42 (+0.25 to +0.45)
    Local        +0.73 (-0.11 to +0.84)   +0.87 (+0.81 to +0.99)
    ABC          -0.25 (-0.31 to -0.02)   -0.55 (-0.81 to -0.34)
    Nystrom      +0.00 (-0.33 to +0.55)
    LongShort    +0.52 (+0.32 to +0.91)   +0.59 (-0.35 to +0.96)
    ProbSparse   -0.46 (-0.54 to -0.41)
    CosFormer    +0.10 (-0.02 to +0.27)   -0.50 (-0.80 to -0.42)
    Performer    -0.90 (-1.16 to -0.78)   -0.26 (-0.89 to -0.11)
    LARA         +0.02 (-0.08 to +0.11)
    S4D          +0.25 (+0.18 to +0.67)   +1.30 (+1.23 to +1.43)
    Flow         +0.49 (+0.21 to +0.51)   -0.85 (-1.48 to -0.84)
    LightNet     -0.49 (-0.81 to -0.15)   -0.19 (-0.98 to +0.00)
    Based        -0.19 (-0.28 to +0.01)   +0.03 (-0.22 to +0.27)

                           NC                       CC
    Softmax      +0.77 (+0.52 to +1.04)   +1.96 (+1.88 to +2.15)
    ABC          -0.72 (-0.80 to -0.27)   -0.84 (-1.04 to -0.55)
    CosFormer    +0.27 (-1.15 to +0.28)   -0.28 (-0.52 to +0.03)
    Performer    +0.01 (-0.47 to +0.88)   -0.25 (-1.07 to +0.41)
    Flow         +0.05 (-0.25 to +0.27)
    LightNet     +0.57 (+0.03 to +0.70)   -0.25 (-0.36 to -0.14)
    Based        -0.57 (-0.66 to -0.50)   -0.43 (-0.49 to -0.23)

The shape of the benchmark's claim is there: its own sequence is read better than by
exact attention by several (3 of 12 in NS, of which Flow with every seed; 3 of 9 in CS,
of which Local and S4D), another one by none (0 of 6 in NC, where LightNet is with one
seed; 0 of 5 in CC). Ranks of NS correlate with those of CS by +0.43, of NC by +0.32, of
CC by +0.09; CS with NC by +0.43, with CC by +0.60, NC with CC by +0.83. But seeds
differ by as much as patterns: each alone says +0.56, +0.60 and -0.38 of NS and CS,
-0.31 to +0.83 of NS and CC, 0 to +0.21 of CS and NC, +0.49 to +0.66 of NC and CC. What
an attention is good at is of the task as much: S4D is first of masked bytes and last of
summaries in NS (ROUGE-1 20%, exact attention 93%), and among the first three in each
task of CS.

What does not show: a layer costs less time than the matrix at every length, by its line
(ProbSparse from 387 tokens on, S4D from 416), and less memory from 96 to 601 tokens on,
so that memory pays later than time and not sooner, as there. And 5 of 10 attentions,
exact attention among them, read bytes better at twice the length of the training than
at it (10.6 after 10.8, a window of 16 9.2 after 9.7).

What the tasks ask for, with one seed: bytes are read at a perplexity of 10.2, and of
12.3 with a window of one, the token itself. In NS the nearest tokens are most of it, in
so few steps: one to either side (`--attentions='(Local(window=1),)'`) is above all that
ships, with 1.9 dB in speech (exact attention 3.6), ROUGE-1 99% (93%) and a perplexity
of 8.2 in masked bytes (14.0). In CC the worst, ABC, has a ROUGE-1 of 57%.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from rich.console import Console

from attn.abc import ABC
from attn.based import Based
from attn.contract.patterns import PATTERNS
from attn.cosformer import CosFormer
from attn.flow import Flow
from attn.lara import LARA
from attn.lightnet import LightNet
from attn.local import Local
from attn.longshort import LongShort
from attn.nystrom import Nystrom
from attn.performer import Performer
from attn.probsparse import ProbSparse
from attn.s4d import S4D
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.measure import seeds, shipped
from experiments.measure.cab import page, sweep
from experiments.measure.cab.grid import grid
from experiments.measure.cab.index import ranked
from experiments.measure.cab.suite import FULL, NAMES, SMALL
from experiments.measure.cab.sweep import Run
from experiments.measure.cab.task import Task
from experiments.measure.provenance import provenance
from experiments.training.runs import locked, open_folder, write_whole
from models.places import allows
from models.stack import check_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """Which attentions, on which tasks."""

    # exact attention, the benchmark's nine, set as there where its sizes fit rows of 17
    # to 256 tokens, and three others
    attentions: tuple = option(
        (
            Softmax(), Local(), ABC(), Nystrom(landmarks=16),
            LongShort(rank=4, window=16, chunk=16), ProbSparse(),
            CosFormer(length=256), Performer(), LARA(), S4D(), Flow(), LightNet(),
            Based(feature_dim=8),
        ),
        "the list, of any attentions",
    )
    tasks: tuple[str, ...] = option(
        ("speech", "lm", "series", "summary", "mlm"),
        "networks, of these and speech_ar, superres, clouds, the first ones first")
    patterns: tuple[str, ...] = option(("NS", "CS", "NC", "CC"), "what is asked")
    all: bool = option(False, "all tasks, three seeds, no end, but for what is set")
    lengths: tuple[int, ...] = option(
        (256, 512, 1024, 2048), "of the layers whose cost is measured, or ()")
    width: int = option(256, "E of those layers")
    heads: int = option(4, "H of those layers")
    repeats: int = option(12, "calls of a layer that are timed")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained of each, with seeds one after the other")
    minutes: float | None = option(
        110.0, "after which no training is begun, nor a cost measured; None, and with "
        "--all as the default: no end", FREE)
    small: bool = option(False, "tasks of a few tokens and two steps: a test")
    quiet: bool = option(False, "no progress and no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)
    record: str | None = option(None, "a file that cab.json is copied to", FREE)

    def __post_init__(self):
        seeds.check(self)
        for name, known in (("tasks", NAMES), ("patterns", PATTERNS)):
            for one in getattr(self, name):
                if one not in known:
                    raise ValueError(f"{name}: {one!r}: expected of {known}")
            if not getattr(self, name):
                raise ValueError(f"{name}=(): expected one or more of {known}")
        if not self.attentions:
            raise ValueError("attentions=(): expected one or more")
        check_layers("attentions", self.attentions)
        if len(self.lengths) in (1, 2) or (self.lengths and min(self.lengths) < 16):
            raise ValueError(f"lengths={self.lengths}: expected three or more of 16 or "
                             "more, to fit a parabola, or ()")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(
                f"width={self.width}: expected a multiple of heads={self.heads}")
        for one in self.attentions:
            if not any(allows(one, p) for task in self.suite for p in task.patterns
                       if p in self.patterns):
                raise ValueError(
                    f"attentions: {type(one).__name__} has none of the patterns that "
                    f"tasks={self.tasks} ask for: expected one that "
                    "`python -m attn` lists with them")

    @property
    def suite(self) -> tuple[Task, ...]:
        """The tasks, in the order in which they are named."""
        each = {task.name: task for task in (SMALL if self.small else FULL)}
        return tuple(each[name] for name in dict.fromkeys(self.tasks))


TINY = Config(
    attentions=(Softmax(), Local(window=2)), tasks=("summary",), patterns=("NS", "CS"),
    lengths=(16, 32, 64), width=8, heads=2, repeats=1, small=True, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Trains, measures and compares -> indices by pattern and attention, rank
    correlations of patterns, efficiency lengths, folder."""
    command = config.command(config_)
    again = config.command(dataclasses.replace(  # as it is asked for from the first
        config_, minutes=Config().minutes, record=None))
    config_ = whole(config_)
    runs, refused = grid(config_)
    folder = open_folder("cab", config_.folder, command, config.settings(config_))
    console = Console(stderr=True, quiet=config_.quiet)
    console.print(left_out(config_, refused))
    with locked(folder):
        until = None if config_.minutes is None else (
            time.perf_counter() + 60 * config_.minutes)
        found = sweep.trained(runs, folder, console, until)
        spent = sweep.measured(config_, folder, console, until)
        which = [one.seed for one in seeds.each(config_)]
        refused += missing(config_, runs, [one for one, _ in found], spent)
        result = provenance(command, which) | {"left_out": left_out(config_, refused)}
        result |= sweep.compared(config_, found, spent)
        networks = {one.name: made for one, made in found}  # exact attention's once
        result |= {"networks": len(networks), "training_seconds": sum(
            made["seconds"] for made in networks.values())}
        text = json.dumps(result, indent=1) + "\n"
        write_whole(folder / "cab.json", text)
        page.heat_map(result, folder / "cab.png")
        write_whole(folder / "report.html",
                    page.html_page(result, folder / "cab.png", again))
        if config_.record is not None:
            shipped.copy(pathlib.Path(config_.record), result)
    if not config_.quiet:
        page.show(result, Console())
    return numbers(result) | {"folder": str(folder)}


def whole(config_: Config) -> Config:
    """With `all`, what is as in the default made all there is."""
    more: dict[str, Any] = {"tasks": NAMES, "seeds": 3, "minutes": None}
    return dataclasses.replace(config_, **{
        name: value for name, value in more.items()
        if config_.all and getattr(config_, name) == getattr(Config(), name)})


def left_out(config_: Config, refused: list[str]) -> str:
    """What is not run, in words."""
    tasks = ", ".join(sorted(set(NAMES) - set(config_.tasks))) or "no task"
    more = ", ".join(config.format_value(a) for a in Config().attentions
                     if a not in config_.attentions) or "no attention"
    words = f"Left out: {tasks}; {more} of the default"
    words += f"; {3 - config_.seeds} of three seeds" if config_.seeds < 3 else ""
    return ". ".join([words, *refused]) + "."


def missing(config_: Config, runs: list[Run], found: list[Run],
            spent: dict[str, dict]) -> list[str]:
    """What there was no time for, in sentences: networks, of which exact attention's
    stands in several patterns, and costs."""
    said = []
    asked, made = (len({one.name for one in each}) for each in (runs, found))
    if made < asked:
        said.append(f"Of {asked} networks {made} were trained")
    labels = [config.format_value(one) for one in config_.attentions
              if config_.lengths and (allows(one, "NS") or allows(one, "CS"))]
    if lacking := sum(label not in spent for label in labels):
        said.append(f"Costs of {lacking} of {len(labels)} layers were not measured")
    return said


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The same as plain numbers."""
    found: dict[str, Any] = {}
    for pattern, each in result["own"].items():
        for label, value in ranked(each).items():
            found[f"{pattern} {label}"] = value
    for pair, value in result["correlations"].items():
        found[f"ranks {pair}"] = value
    for label, both in result["lengths"].items():
        for what, value in both.items():
            if value is not None:
                found[f"efficiency length, {what}, {label}"] = value
    return found | {"trainings": len(result["rows"]), "failed": len(result["failed"]),
                    "networks": result["networks"],
                    "seconds of training": result["training_seconds"]}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
