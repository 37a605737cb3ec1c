"""Do the papers' claims about caches hold? On the model that ships, or any other.

Nothing is trained but gates. Facts of five digits are hidden in text, and asked for
after the prompt was read in one piece.

- snapkv: of many facts one is asked for; votes with and without pooling, against first
  and last tokens (SnapKV, arXiv:2404.14469).
- recycled: an eighth of the keys, chosen anew at every second to sixteenth token, and
  by similarity, against H2O and first and last tokens; the weight of full attention
  that is recovered (Recycled Attention, arXiv:2411.05787).
- razor: how many heads show induction; these whole, as many others whole; what the
  others drop folded into one token, or not (RazorAttention, arXiv:2407.15891).
- duo: heads by trained gates, by their weight on far keys, by chance (DuoAttention,
  arXiv:2410.10819).
- probes, pool: which blocks a window looks for, by mean and by probe; blocks shared
  between layers alike and by entropy; drawn (ActQKV, arXiv:2502.13542).
- graphs: how many keys an index looks at for 90% of the best 32, where queries lie
  elsewhere than keys; drawn (RetrievalAttention, arXiv:2409.10516).

    python -m experiments.policies

The model that ships, rows of 1,024 tokens, medians of three seeds with the least and
the greatest behind them:

- snapkv: 88% (81 to 100) of facts are found with the whole cache; with a quarter 31%
  (25 to 38) by pooled votes, 0% (0 to 6) without pooling, 31% (6 to 38) by first and
  last tokens; with an eighth 12%, 0%, 12%. That pooling helps shows; that votes are
  better than the ends of the text does not.
- recycled: 91% with all keys; 52% (51 to 58) chosen anew at every second token, 9%,
  3% and 2% at every 4th, 8th and 16th, 9% (5 to 10) by similarity, 5.5% (4 to 12) with
  H2O and 4.7% with first and last tokens. So keys that come back help where they are
  chosen often; by similarity is little before H2O. They hold 75 to 66% of the weight
  of full attention, first and last tokens 71%.
- razor: 19% of the heads show induction above 0.3, and these whole (30% of the memory)
  find 89% (88 to 92) of facts where all heads whole find 91%, as many others 13% and
  none 27%; of repeats 98, 98, 0.3 and 0.3%: the claim shows. What the others drop,
  folded into one token, leaves 0.016 nats (0.015 to 0.017) to full attention, dropped
  0.019 (0.019 to 0.021).
- duo: with an eighth of the heads whole, and a window of 16 behind 4 sinks in the
  others, 88% (85 to 91) of facts are found where gates chose them, 90% (89 to 90) by
  their weight on far keys, 41% (0 to 45) by chance; with a quarter 91, 90 and 42%, with
  half 90, 91 and 79% (38 to 90). 53% of the gates end above 0.9, 28% below 0.1. So few
  heads are enough, and which ones matters: the claim shows; that gates find better ones
  than the weight does is within what seeds differ by.
- probes: of drawn windows whose queries differ by a noise of 1, 0.75 and 0.5 the mean
  finds 68, 82 and 94% of the blocks, the probe 60, 98 and 100%: it helps unless noise
  is as large as what is looked for. pool: 53% shared alike, 71% by entropy.
- graphs: for 90% of the best 32 keys an index of clusters looks at 37% of all (29 to
  56), a graph of keys at 33% (27 to 38), one made for queries at 21% (20 to 26): that
  helps, though less than the paper's 1 to 3% of keys that are many more.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from typing import Any

from rich import box
from rich.progress import Progress
from rich.table import Table

from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus
from experiments.data.retrieval import NOUNS
from experiments.measure import cache_claims, index_claims, panels, seeds
from experiments.measure.cache_claims import Rated
from experiments.measure.provenance import provenance
from experiments.measure.reading import HELD_OUT, LEAST, check_asked, reader_of
from experiments.sources import SHIPPED, loaded
from experiments.training.runs import open_folder, write_whole

PARTS = (*cache_claims.PARTS, "probes", "pool", "graphs")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, and what is tried on it."""

    model: str = option(SHIPPED, "folder, name on the hub, folder of a run, or small")
    parts: tuple[str, ...] = option(
        PARTS, "of snapkv, recycled, razor, duo, probes, pool, graphs")
    text: Corpus = option(HELD_OUT, "hay: the valid split, as words")
    length: int | None = option(
        None, "tokens of a row (None: the model's, at most 1024)", least=LEAST)
    trials: int = option(16, "rows of each setting", least=1)
    facts: int = option(8, "facts in a row", least=1)
    gate_steps: int = option(
        150, "steps that the gates of duo are trained", least=1, most=STEPS
    )
    draws: int = option(200, "windows of probes, pools of pool", least=1)
    batch: int = option(4, "rows at once", FREE, least=1)
    seed: int = option(0, "of what is hidden where; the first of several")
    seeds: int = option(3, "of what is hidden where, one after the other")
    quiet: bool = option(False, "no progress bar and no table", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        seeds.check(self)
        if not self.parts or {*self.parts} - {*PARTS}:
            raise ValueError(f"parts={self.parts!r}: expected some of {PARTS}")
        if self.facts > len(NOUNS):
            raise ValueError(f"facts={self.facts}: expected at most {len(NOUNS)}")


TINY = Config(parts=("probes", "pool"), draws=2, seeds=1, quiet=True)


def rated(config_: Config, part: str, seed: int, source: Any) -> Rated:
    """The numbers of one part and seed; source: the model, where the part needs it."""
    if part == "probes":
        return index_claims.probe_recall(seed, config_.draws)
    if part == "pool":
        return index_claims.pooled_recall(seed, config_.draws)
    if part == "graphs":
        return index_claims.graphs(seed)
    length = config_.length or min(source.limit or 1024, 1024)
    reader, _ = reader_of(source, (part,), config_.text, length, seed)
    more = (config_.gate_steps,) if part == "duo" else ()
    return cache_claims.PARTS[part](
        reader, config_.trials, config_.facts, config_.batch, *more)


def run(config_: Config) -> dict[str, Any]:
    """Measures -> medians over seeds; all numbers and a picture in a folder."""
    needed = {*config_.parts} & {*cache_claims.PARTS}
    source = loaded(config_.model) if needed else None
    if source is not None:
        check_asked(config_.model, source)
    folder = open_folder("policies", config_.folder, config.command(config_),
                         config.settings(config_))
    every = range(config_.seed, config_.seed + config_.seeds)
    found: dict[str, dict[str, list[float]]] = {part: {} for part in config_.parts}
    with Progress(disable=config_.quiet) as progress:
        bar = progress.add_task("policies", total=len(config_.parts) * len(every))
        for part in config_.parts:
            for seed in every:
                progress.update(bar, description=f"{part}, seed {seed}")
                for name, value in rated(config_, part, seed, source):
                    found[part].setdefault(name, []).append(value)
                progress.advance(bar)
            if not config_.quiet:
                progress.console.print(table(part, found[part]))
    result = {"parts": found, "provenance": provenance(
        config.command(config_), list(every))}
    write_whole(folder / "policies.json", json.dumps(result, indent=1) + "\n")
    if "graphs" in config_.parts:
        curves = index_claims.graph_scans(config_.seed)
        panels.curves([panels.Panel(
            "queries that lie elsewhere than keys",
            {name: tuple(zip(*points)) for name, points in curves.items()},
            {"xlabel": "share of the keys that is looked at", "ylabel":
             "recall of the best 32"})], folder / "graphs.png")
    return {f"{part}: {name}": statistics.median(values)
            for part, each in found.items() for name, values in each.items()
            } | {"folder": str(folder)}


def table(part: str, each: dict[str, list[float]]) -> Table:
    """One part for the terminal: the median over seeds, the least and the greatest."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(part)
    for title in ("median", "from", "to"):
        made.add_column(title, justify="right")
    for name, values in each.items():
        form = "{:.4f}" if name.startswith("nats") else "{:.1%}"
        made.add_row(name, *(form.format(f(values)) for f in
                             (statistics.median, min, max)))
    return made


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
