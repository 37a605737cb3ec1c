"""Constant time a token: linear attentions against length, with softmax beside them.

The claim of Lightning Attention (Qin et al., 2024, arXiv:2405.17381), and of all that
read a stream into a state of fixed size: a token costs the same however many came
before it, forward, backward and in decoding, where a token of softmax attention costs
in proportion to them. Time here is that of one call over its T tokens; all lengths and
attentions take turns, and of each the fastest round counts.

    python -m experiments.constant

takes 2 minutes on 2 cores (1:51 beside other jobs), float32, B1 H4 D32. From T = 256 to
16,384 the time of a token grows, slowest length over fastest, and as this power of T:

                 forward         with backward    decoding
    Lightning    1.47  T^0.04    2.85  T^0.22     1.02  T^0.00
    RetNet       1.75  T^0.07    3.16  T^0.24     1.20  T^0.02
    Flow         3.45  T^0.27    2.57  T^0.21     1.25  T^-0.02
    Softmax      30.8  T^0.82    57.4  T^0.95     47.1  T^0.91

In microseconds a token at T = 256 and 16,384: Lightning 0.72 and 0.80 forward, 1.73 and
4.26 with backward, 122 and 121 decoding; softmax 1.52 and 46.7, 3.93 and 226, 124 and
5,860. The claim holds forward and in decoding. With backward, and of Flow, a token is
not quite constant: up to 4,096 it costs Lightning 2.12 at most, then 4.26, presumably
where the arrays, 8 MB each, leave the cache.

That is with `keep`: without it glibc gives large arrays back to the system after every
call, and the next pays for all their pages again. An earlier run that did so, beside
more jobs, had Lightning grow by 3.91 forward, 3.11 with backward and 1.54 in decoding.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box, progress
from rich.console import Console
from rich.table import Table

from attn.flow import Flow
from attn.lightning import Lightning
from attn.retnet import RetNet
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.measure.timing import (
    PASSES, exact, inputs, keep_memory, prepared, repeats, seconds
)
from experiments.training.runs import open_folder
from models.stack import check_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed, and on what shapes."""

    attentions: tuple = option(
        (Lightning(), RetNet(), Flow(), Softmax()), "what is compared"
    )
    lengths: tuple[int, ...] = option((256, 1024, 4096, 16384), "tokens T, rising")
    limit: int = option(16384, "longest T of exact attention, forward and backward")
    passes: tuple[str, ...] = option(
        PASSES, "forward, both (forward and backward), decode (one token more)")
    batch: int = option(1, "batch B")
    heads: int = option(4, "heads H")
    width: int = option(32, "width of a head D")
    rounds: int = option(7, "how often each is timed")
    keep: bool = option(True, "keep freed memory in the process, where glibc is used")
    quiet: bool = option(False, "no progress bar and no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        check_layers("attentions", self.attentions)
        if list(self.lengths) != sorted(set(self.lengths)) or len(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths}: expected two or more, rising")
        if unknown := set(self.passes) - set(PASSES):
            raise ValueError(f"passes={sorted(unknown)}: expected some of {PASSES}")


TINY = Config(attentions=(Lightning(), Softmax()), lengths=(8, 16), heads=2, width=4,
              rounds=1, quiet=True)


def run(config_: Config) -> dict[str, Any]:
    """Times all -> for each pass and attention the exponent of a token's time in T, its
    growth (slowest over fastest T) and microseconds a token at the ends."""
    folder = open_folder(
        "constant", config_.folder, config.command(config_), config.settings(config_)
    )
    if config_.keep:
        keep_memory()
    rows = timed(config_)
    found = {
        "command": config.command(config_), "jax": jax.__version__,
        "device": jax.devices()[0].device_kind, "rows": rows,
    }
    (folder / "constant.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(rows, folder / "constant.png")
    if not config_.quiet:
        Console().print(table(config_, rows))
    numbers: dict[str, Any] = {}
    for row in rows:
        name = f"{row['pass']} {row['attention']}"
        numbers |= {f"{name} {key}": row[key] for key in ("exponent", "growth")}
    return numbers | {"folder": str(folder)}


def timed(config_: Config) -> list[dict[str, Any]]:
    """A row a pass and attention: lengths, us (microseconds a token at each), growth,
    exponent of us in T."""
    calls = {}
    jobs = [(p, a, t) for t in config_.lengths for p in config_.passes
            for a in config_.attentions
            if p == "decode" or not exact(a) or t <= config_.limit]
    track = functools.partial(
        progress.track, disable=config_.quiet, console=Console(stderr=True))
    for which, attention, t in track(jobs, "compiling"):
        x = _inputs(config_, attention, t)
        x = x.last if which == "decode" else x
        calls[which, attention, t] = prepared(attention, x, which)
    often = {job: repeats(call) for job, call in calls.items()}
    best = dict.fromkeys(calls, np.inf)
    for _ in track(range(config_.rounds), "timing"):
        for job, call in calls.items():
            best[job] = min(best[job], seconds(call, often[job]))
    rows = []
    for which in config_.passes:
        for a in config_.attentions:
            lengths = [t for t in config_.lengths if (which, a, t) in best]
            tokens = [1 if which == "decode" else t for t in lengths]
            us = [1e6 * best[which, a, t] / n for t, n in zip(lengths, tokens)]
            rows.append({
                "pass": which, "attention": config.format_value(a), "lengths": lengths,
                "us": us, "growth": max(us) / min(us),
                "exponent": float(np.polyfit(np.log(lengths), np.log(us), 1)[0])
                if len(us) > 1 else 0.0,
            })
    return rows


def _inputs(config_: Config, attention: Any, t: int):
    d = getattr(attention, "feature_dim", None) or config_.width
    heads = config_.heads
    return inputs(config_.batch, t, heads, heads, d, config_.width, jnp.float32)


def table(config_: Config, rows: list[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    found = Table(title="microseconds a token", box=box.SIMPLE_HEAD, pad_edge=False,
                  collapse_padding=True)
    found.add_column("pass")
    found.add_column("attention", overflow="fold", min_width=11)
    for title in (*(f"T={t:,}" for t in config_.lengths), "growth", "exponent"):
        found.add_column(title, justify="right")
    for row in rows:
        us = dict(zip(row["lengths"], row["us"]))
        cells = [f"{us[t]:.3g}" if t in us else "" for t in config_.lengths]
        found.add_row(row["pass"], row["attention"], *cells, f"{row['growth']:.2f}",
                      f"{row['exponent']:.2f}")
    return found


def picture(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time of a token against length, a line an attention."""
    from experiments.measure.panels import Panel, curves

    axes = {"xscale": "log", "yscale": "log", "xlabel": "tokens T",
            "ylabel": "microseconds a token"}
    curves([
        Panel(which, {row["attention"]: (row["lengths"], row["us"])
                      for row in rows if row["pass"] == which}, axes)
        for which in dict.fromkeys(row["pass"] for row in rows)], path)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
