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
on either side. The nine networks of what ships took 2 to 22 minutes each, on 2 cores
beside other jobs; computing time alone was not measured.

    python -m experiments.cab

runs one seed for up to two hours on 2 cores, and says what it leaves out (three of the
networks, two of three seeds). `--all` runs the nine attentions of the benchmark, exact
attention and three others on every task and pattern that they allow, with three seeds,
for as long as it takes; what else is set beside `--all` stays as it is set. Both go on
where they were with `--folder=`.

What ships (`experiments/cab.json`, by `--minutes=0` in the folder of such a run, one
seed) is 11 of its 72 cells, from 9 of its 70 networks, those that were run so far, and
no cost of a layer: too little for any of the benchmark's claims. An index, of three
attentions or more, there is of speech alone: all frames at once, the distance of
cepstra is 3.56 dB for ABC, 3.65 for CosFormer, 3.69 for Local, 3.73 for Performer and
for exact attention. A window of 16 reads bytes at a perplexity of 10.9 and exact
attention at 11.5 (200 steps, 128 tokens), at twice the length at 11.8 and 13.3. Exact
attention alone is known in summaries (ROUGE-1 97%) and forecasts.
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
from experiments.measure.cab.index import ranked
from experiments.measure.cab.suite import FULL, NAMES, SMALL
from experiments.measure.cab.sweep import Run
from experiments.measure.cab.task import Task
from experiments.measure.provenance import provenance
from experiments.training.runs import locked, open_folder, write_whole
from models.places import allows, in_pattern


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


def grid(config_: Config) -> tuple[list[Run], list[str]]:
    """The trainings, seed by seed, and what a task refuses, in sentences."""
    runs, refused = [], []
    for one in seeds.each(config_):
        for task, pattern in asked(config_):
            for attention in config_.attentions:
                if not allows(attention, pattern):
                    continue
                try:
                    if pattern == "CS":
                        task.check(in_pattern(attention, pattern))
                except ValueError as error:
                    refused.append(str(error))
                    continue
                runs.append(Run(task, pattern, attention, one.seed))
    return runs, list(dict.fromkeys(refused))


def asked(config_: Config) -> list[tuple[Task, str]]:
    """Tasks and patterns: a task of each pattern before the second one of any, so that
    what there is time for says something of all patterns."""
    ranks: dict[str, list[Task]] = {pattern: [] for pattern in config_.patterns}
    for task in config_.suite:
        for pattern in task.patterns:
            if pattern in ranks:
                ranks[pattern].append(task)
    most = max(map(len, ranks.values()))
    return [(each[n], pattern) for n in range(most) for pattern, each in ranks.items()
            if n < len(each)]


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
    return found | {"trainings": len(result["rows"]), "failed": len(result["failed"])}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
