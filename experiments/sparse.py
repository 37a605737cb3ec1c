"""What is lost by reading less: quality against the share of the pairs that is read.

Two networks are trained with exact attention, one on associative recall (as in
`experiments.recall`, where the key may stand anywhere before) and one on text. Then
their attention is replaced by one that reads a share of the causal pairs only, chosen
by a rule: the newest tokens (a window, with and without the first ones as sinks), a
shard of its own for each head (S2, arXiv:2407.17678), a tree search (HiP,
arXiv:2406.09827), a pattern found from the last queries (FlexPrefill,
arXiv:2502.20766), a gate (Seer, arXiv:2410.13276). The gate alone learns, from the
network around it, for `gate_steps` steps; nothing else is trained again. The best
tokens and the best blocks, known only after all logits are, are the limit
(arXiv:2506.05333), and exact attention is what all are held against. What was really
read is counted, on queries and keys of the network.

    python -m experiments.sparse
    python -m experiments.sparse --model=small --facts=4 --rows=12 --batch=12 \\
        --shares='(0.125, 0.25)' --gate_steps=40

The second takes a model that is there and judges it by needles in text, the keys of a
dictionary and bits per byte, in its own words; nothing but gates is trained, on the
train split and other questions. Seeds are then draws of texts and gates. NSA
(arXiv:2502.11089) is left out: what it compresses keys and values with is learned with
the network, and in one that was trained without it would be random. So is Landmark,
whose tokens a network has to learn. The model that ships, medians of three seeds, rows
of 256 tokens; exact attention finds 94% (92 to 98) of 48 needles, 88% (88 to 90) of the
keys, and reads text at 1.277 bits per byte (1.061 to 1.408). At a quarter the least and
the greatest share of needles and keys stand behind:

    12% asked    needles keys  bits (read)    25% asked: needles, keys, bits (read)
    window         0%     6%   1.753 (13%)     2%          25% (19-29)  1.478 (25%)
    and sinks      0%     0%   1.645 (13%)     2% (0-2)    19% (19-23)  1.413 (25%)
    S2             0%     0%   2.547 (9%)      4% (0-6)     2% (0-2)    1.781 (23%)
    FlexPrefill    6%     8%   1.615 (15%)     8% (6-15)   12% (8-15)   1.461 (23%)
    SeerR         21%    21%   1.399 (15%)    33% (31-33)  42% (38-46)  1.337 (26%)
    best blocks   23%    19%   1.451 (15%)    56% (50-56)  31% (23-48)  1.339 (26%)
    Seer          23%    29%   1.439 (11%)    46% (42-52)  60% (60-65)  1.333 (22%)
    HiP           19%    12%   1.403 (12%)    46% (38-48)  46% (44-50)  1.315 (23%)
    MoBA          40%    19%   1.393 (15%)    58% (56-62)  33% (29-48)  1.328 (26%)
    best tokens   92%    85%   1.284 (13%)    92% (90-96)  88% (88-88)  1.280 (25%)

Single tokens, if they were known, lose nothing; what chooses blocks, or by a tree,
loses 27 to 60 points of the answers at a quarter of the pairs (FlexPrefill 75 and 85),
where text costs 4 to 6 hundredths of a bit, and a window loses nearly all of them. Who
is best differs by the task: needles are found by blocks' mean keys (MoBA, best blocks),
keys of a dictionary by a gate that learned for 40 steps (Seer). (MoBA,
arXiv:2502.13189; SeerR, arXiv:2506.08889, is a gate for decoding, so that its texts are
read token by token. Neither is in the table below.)

The first took 50 minutes with its three seeds on 2 cores beside many other jobs (25 of
computing). Medians; exact attention recalls 95.2% (89.7 to 99.8) and reads text at
2.468 bits per byte:

    share read     6%            12%           25%           50%
    window       1% 2.690      3% 2.576      8% 2.505     25% 2.466
    and sinks       -         25% 2.620     29% 2.517     41% 2.468
    S2           8% 3.020      8% 2.971     22% 2.836     50% 2.638
    FlexPrefill 24% 2.958     42% 2.744     63% 2.617     75% 2.551
    best blocks     -         41% 2.520     65% 2.485     79% 2.472
    HiP         31% 2.941     53% 2.595     69% 2.501     87% 2.473
    Seer        31% 2.957     58% 2.599     92% 2.491     95% 2.470
    best tokens 95% 2.487     95% 2.473     95% 2.469     95% 2.468

What is recalled stands in single tokens: a sixteenth of them, if it were known which,
loses 0.6 points. A gate that has learned the task comes within 4 at a quarter, and
is the only one to; it beats the best blocks, which are judged by the mean of their
keys. For text a window does as well as any at a quarter or more, and S2, untrained
here, whose shards have holes next to the query, does worst. Seeds differ by 10 points
of recall, of HiP and FlexPrefill by up to 40.

FlexPrefill's choice follows the last queries of a row, and HiP's and Seer's those of
the query's own block, which a stream does not have yet.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import flax.linen as nn
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attn.softmax import Softmax
from experiments import lm, recall
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus, Text
from experiments.measure import budgets, charts, less, report, seeds
from experiments.measure.budgets import METHODS, as_read
from experiments.measure.less import Network
from experiments.measure.placing import LeftOut
from experiments.measure.provenance import provenance
from experiments.sources import loaded
from experiments.training.loop import check, evaluate
from experiments.training.mesh import whole
from experiments.training.runs import locked, open_folder, write_whole

TASKS = {"recall": "recall", "bits": "text, bits per byte"}
ASKED = {"needles": "needles", "recall": "keys of a dictionary",
         "bits": "text, bits per byte"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is read, and the two networks."""

    model: str | None = option(None, "a folder or name, to be asked in its own words")
    facts: int = option(8, "needles or keys in a row, for a model that is given")
    rows: int = option(16, "rows of each task that it is judged by")
    methods: tuple = option(tuple(METHODS), "what replaces exact attention, by name")
    shares: tuple = option((1 / 16, 1 / 8, 1 / 4, 1 / 2), "of the causal pairs")
    block: int = option(8, "tokens of a block")
    length: int = option(256, "tokens of a row, of both tasks")
    pairs: int = option(16, "keys with values of the recall task")
    heads: int = option(4, "heads H of both networks")
    recall_steps: int = option(800, "training steps on recall", most=STEPS)
    text: Corpus = option(
        Text(length=256), "the text; its rows have `length` tokens, of a model that is "
        "given in its own words")
    text_steps: int = option(300, "training steps on text", most=STEPS)
    gate_steps: int = option(200, "training steps of a gate", most=STEPS)
    batch: int = option(16, "sequences a step")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(3, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars and no table", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE
    )

    def __post_init__(self):
        seeds.check(self)
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"methods: {name!r}: expected of {tuple(METHODS)}")
        if not self.methods or not self.shares:
            raise ValueError("methods or shares: expected one or more, not ()")
        for share in self.shares:
            if not 0 < share <= 1:
                raise ValueError(f"shares: {share!r}: expected in (0, 1]")

    @property
    def recall(self) -> recall.Config:
        """The training on recall."""
        return recall.Config(
            pairs=self.pairs, length=self.length, heads=self.heads,
            vocab=max(256, 2 * self.length), steps=self.recall_steps, batch=self.batch,
            seed=self.seed, seeds=1, quiet=self.quiet,
        )

    @property
    def lm(self) -> lm.Config:
        """The training on text."""
        text = dataclasses.replace(self.text, length=self.length)
        return lm.Config(
            attention=(Softmax(),) * 2, text=text, heads=self.heads,
            steps=self.text_steps, batch=self.batch, seed=self.seed, seeds=1,
            quiet=self.quiet,
        )


TINY = Config(
    methods=("window", "HiP", "Seer"), shares=(1 / 4,), block=4, length=32, pairs=2,
    heads=2, recall_steps=2, text=Text(length=32), text_steps=2, gate_steps=2, batch=2,
    seeds=2, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Trains, replaces and measures -> for each task, method and share the quality and
    what was read: medians over seeds."""
    if config_.model is None:  # what cannot run ends here
        remember, read = config_.recall, config_.lm
        check(remember.model(), remember.plan(), remember.curriculum())
        check(read.model(), read.plan(), read.data)
    tasks = TASKS if config_.model is None else ASKED
    command = config.command(config_)
    folder = open_folder("sparse", config_.folder, command, config.settings(config_))
    left_out: dict[str, str] = {}
    with locked(folder):
        found = [once(one, left_out) for one in seeds.each(config_)]
        rows = merged(found)
        which = [one.seed for one in seeds.each(config_)]
        result = provenance(command, which) | {"rows": rows, "left_out": left_out}
        write_whole(folder / "sparse.json", json.dumps(result, indent=1) + "\n")
        charts.shares_picture(rows, tasks, folder / "sparse.png")
    if not config_.quiet:
        Console().print(table(rows, tasks), *left_out.values(), sep="\n")
    numbers = {f"{row['method']} {row['asked']:.3g} {name}": row[name]
               for row in rows for name in ("read", *tasks) if name in row}
    return numbers | {"folder": str(folder)}


def networks(config_: Config) -> dict[str, Network]:
    """What is judged, by task."""
    if config_.model is None:
        return {"recall": trained_on_recall(config_), "bits": trained_on_text(config_)}
    return less.given(
        config_.model, loaded(config_.model), config_.text, config_.length,
        config_.facts, config_.rows, config_.batch, config_.seed)


def once(config_: Config, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """A row for exact attention and for each method and share, with one seed. left_out:
    methods that have no place in the model, and why; they are added."""
    tasks = networks(config_)
    gates: dict[Any, dict] = {}
    rows = [row(config_, tasks, gates, "exact", 1.0)]
    each = [(name, share) for name in config_.methods for share in config_.shares]
    for name, share in track(each, description="reading less", disable=config_.quiet):
        try:
            rows.append(row(config_, tasks, gates, name, share))
        except LeftOut as reason:
            left_out[name] = f"{name} is left out: {reason}"
    return [one for one in rows if one is not None]


def trained_on_recall(config_: Config) -> Network:
    """The network that recalls: right answers, all tokens at once."""
    one = config_.recall
    valid = one.task(one.pairs, "valid")

    def score(model, params):
        return evaluate(as_read(model), params, valid, 4, config_.batch)["accuracy"]

    return Network(one.model(), whole(recall.trained(one).params),
                   one.task(one.pairs), valid, score)


def trained_on_text(config_: Config) -> Network:
    """The network that reads text: bits per byte of held-out rows."""
    one = config_.lm
    valid = dataclasses.replace(one.data, split="valid")

    def score(model, params):
        found = evaluate(as_read(model), params, valid, 4, config_.batch)
        return found["loss"] / math.log(2) / valid.bytes_per_token

    return Network(one.model(), whole(lm.trained(one).params), one.data, valid, score)


def row(config_: Config, tasks: dict[str, Network], gates: dict, name: str,
        share: float) -> dict[str, Any] | None:
    """Quality and share read, by task; None if the method cannot read so little. gates:
    those that have learned, by method and what they learn from; they are added."""
    found: dict[str, Any] = {"method": name, "asked": share}
    reads = []
    for task, network in tasks.items():
        attention = Softmax()
        if name != "exact":
            attention = METHODS[name](
                network.budget(share, config_.length, config_.block))
        if attention is None:
            return None
        try:
            model = network.with_attention(attention)
        except ValueError as reason:  # it has no place for a softcap or sinks
            raise LeftOut(str(reason)) from None
        params = network.params
        if isinstance(attention, nn.Module):
            # a gate learns the same whatever share of it is read
            if (known := (name, id(network.train))) not in gates:
                gates[known] = less.learned(
                    network, model, config_.gate_steps, config_.batch, config_.seed)
            params = less.joined(params, gates[known])
        tokens = network.valid.batch(0, 1)["tokens"]
        read = budgets.share_read(model, params, tokens)
        found |= {task: network.score(model, params), f"{task}_read": read}
        reads.append(read)
    return found | {"read": float(np.mean(reads))}


def merged(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several seeds as medians, with the numbers of each seed beside them."""
    rows = []
    for each in zip(*found, strict=True):
        names = [name for name, a in each[0].items() if isinstance(a, float)]
        values = {name: [one[name] for one in each] for name in names}
        medians = {name: float(np.median(values[name])) for name in names}
        spread = {f"{name}_seeds": values[name] for name in names}
        rows.append(each[0] | medians | spread)
    return rows


def table(rows: list[dict[str, Any]], tasks: dict[str, str]) -> Table:
    """The rows for the terminal, with the distance from exact attention."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    found.add_column("reads")
    for title in ("asked", "read"):
        found.add_column(title, justify="right")
    for title in tasks.values():
        found.add_column(title.replace(", ", "\n").replace(" of", "\nof"),
                         justify="right")
        found.add_column("lost", justify="right")
    for one in rows:
        cells = []
        for task in tasks:
            form = "{:.3f}" if task == "bits" else "{:.1%}"
            lost = (one[task] - rows[0][task]) * (1 if task == "bits" else -1) + 0.0
            cells += [report.cell(one, task, form), form.format(lost)]
        found.add_row(
            one["method"], f"{one['asked']:.1%}", f"{one['read']:.1%}", *cells)
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
