"""What reasoning costs when bytes are counted: a bigger model, or more tokens?

Kinetics (Sadhukhan et al., 2025, arXiv:2506.05333) adds to the operations of generation
the bytes of the cache, at I = 562.5 operations a byte (a B200: 4500 TFLOP/s over 8
TB/s), and finds that attention, not parameters, is what long answers cost. So a small
model is no bargain, up to about 14B parameters of Qwen3, and reading few keys is what
makes long answers and many trials pay.

    dense: C = N (2 P L + r D (2 L_in + L) L) + I D (2 L_in + N L) L
    top-k: C = N (2 P L + 4 B L H d) + I N 4 B L K d

with N trials of L tokens behind a prompt of L_in, P parameters, D = 2 K d elements of
the cache a token (d: head width times layers), r = H / K and B keys read. What a
frontier needs besides, how right an answer of L tokens is, is a law that is proposed
here and not the paper's: p = (1 - exp(-L / length)) sigmoid(12 (skill - difficulty)),
over questions of nine difficulties, with a skill and a length for each model. Its
frontier shows the shape of the argument, not AIME.

    python -m experiments.kinetics

takes a few seconds and prints, at L_in = 200, L = 32768 and N = 32, what each model
costs (8B: 27,432 TFLOP computed, 1,425,511 moved, 98% of all), and the frontiers.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, Callable, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import config
from experiments.cli.config import option

INTENSITY = 562.5  # operations a byte of a B200
TERA = 1e-12


class Model(NamedTuple):
    """Parameters in 1e9, query and key heads, head width, layers."""

    parameters: float
    heads: int
    key_heads: int
    head_dim: int
    layers: int

    @property
    def width(self) -> int:
        """Channels of one head in all layers."""
        return self.head_dim * self.layers


MODELS = {
    "0.6B": Model(0.752, 16, 8, 128, 28), "1.7B": Model(2.03, 16, 8, 128, 28),
    "4B": Model(4.02, 32, 8, 128, 36), "8B": Model(8.19, 32, 8, 128, 36),
    "14B": Model(14.77, 40, 8, 128, 40), "32B": Model(32.76, 64, 8, 128, 64),
}
# (skill, length) of the law of accuracy: proposed, for the shape alone
LAWS = {"0.6B": (0.15, 6e3), "1.7B": (0.3, 7e3), "4B": (0.5, 8e3),
        "8B": (0.58, 8e3), "14B": (0.68, 8e3), "32B": (0.72, 8e3)}


class Job(NamedTuple):
    """A prompt, tokens generated a trial, and trials."""

    prompt: int
    tokens: int
    trials: int = 1


class Cost(NamedTuple):
    """TFLOP computed, and TFLOP that could have been while bytes were moved."""

    computed: float
    moved: float

    @property
    def total(self) -> float:
        """Both."""
        return self.computed + self.moved


def dense(m: Model, job: Job, intensity: float = INTENSITY) -> Cost:
    """Every token reads all keys; the prompt's are shared by the trials. Parameters are
    read for many requests at once, and not counted, nor is the prompt."""
    own = 2 * job.prompt + job.tokens
    shared = 2 * job.prompt + job.trials * job.tokens
    work = 2 * m.parameters * 1e9 * job.tokens + (
        2 * own * job.tokens * m.heads * m.width)
    moved = intensity * 2 * m.key_heads * m.width * shared * job.tokens
    return Cost(job.trials * work * TERA, moved * TERA)


def top_k(
    m: Model, job: Job, budget: int, intensity: float = INTENSITY,
    official_sign: bool = True,
) -> Cost:
    """A token reads `budget` keys, found for nothing. The first tokens have fewer to
    read: the authors' function adds what they do not read; official_sign=False takes it
    away."""
    missing = 0.5 * max(0, budget - job.prompt) ** 2
    keys = budget * job.tokens + (missing if official_sign else -missing)
    return _few(m, job, keys, intensity)


def block_top_k(
    m: Model, job: Job, local: int, block: int, blocks: int,
    intensity: float = INTENSITY,
) -> Cost:
    """A token reads `local` keys and `blocks` blocks, which it finds by one mean key a
    block; the means of the prompt are shared by the trials."""
    budget = local + block * blocks
    keys = budget * job.tokens - 0.5 * max(0, budget - job.prompt) ** 2
    found = _few(m, job, keys, intensity)
    own = (2 * job.prompt + job.tokens) // block * job.tokens
    shared = (2 * job.prompt + job.trials * job.tokens) // block * job.tokens
    return Cost(found.computed + job.trials * own * m.heads * m.width * TERA,
                found.moved + intensity * shared * m.key_heads * m.width * TERA)


def _few(m: Model, job: Job, keys: float, intensity: float) -> Cost:
    work = 2 * m.parameters * 1e9 * job.tokens + 4 * keys * m.heads * m.width
    moved = intensity * 4 * keys * m.key_heads * m.width
    return Cost(job.trials * work * TERA, job.trials * moved * TERA)


def coverage(trials: int, right: int, k: int) -> float:
    """The chance that one of k trials is right, of `trials` of which `right` are:
    1 - C(n-c, k) / C(n, k)."""
    return 1 - math.comb(trials - right, k) / math.comb(trials, k)


def accuracy(name: str, job: Job) -> float:
    """The chance that one of the trials is right, in the mean over questions, by the
    law that is proposed here."""
    skill, length = LAWS[name]
    hard = np.arange(1, 10) / 10
    p = (1 - math.exp(-job.tokens / length)) / (1 + np.exp(-12 * (skill - hard)))
    return float((1 - (1 - p) ** job.trials).mean())


def frontier(cost: Callable, jobs: list[Job], budgets: np.ndarray) -> list[tuple]:
    """For each budget in TFLOP the best (accuracy, model, job) whose cost(model, job)
    fits; ("", None) where none does."""
    points = sorted(
        (cost(m, job), accuracy(name, job), name, job)
        for name, m in MODELS.items() for job in jobs)
    best: tuple = (0.0, "", None)
    found, at = [], 0
    for budget in budgets:
        while at < len(points) and points[at][0] <= budget:
            best = max(best, points[at][1:], key=lambda p: p[0])
            at += 1
        found.append(best)
    return found


@dataclasses.dataclass(frozen=True)
class Config:
    """The job that is priced, and the grid of the frontier."""

    prompt: int = option(200, "tokens of the prompt L_in")
    tokens: int = option(32768, "tokens generated a trial L")
    trials: int = option(32, "trials N")
    budget: int = option(1024, "keys that a token of top-k reads")
    points: int = option(8, "budgets of the frontier, a factor of four apart")
    quiet: bool = option(False, "no tables")


TINY = Config(points=2, quiet=True)
COSTS = ("dense", "top-k", "operations alone")


def run(config_: Config) -> dict[str, Any]:
    """Prices all models -> plain numbers: TFLOP, and frontiers."""
    job = Job(config_.prompt, config_.tokens, config_.trials)
    found: dict[str, Any] = {}
    for name, m in MODELS.items():
        full, few = dense(m, job), top_k(m, job, config_.budget)
        found |= {f"{name}_computed": full.computed, f"{name}_moved": full.moved,
                  f"{name}_share": full.moved / full.total,
                  f"{name}_top_k": few.total, f"{name}_saved": full.total / few.total}
    jobs = [Job(config_.prompt, n, 2**t) for n in range(2048, 32769, 2048)
            for t in range(6)]
    # a factor of four from what the smallest model needs for the shortest answer
    least = top_k(MODELS["0.6B"], jobs[0], config_.budget).total
    budgets = least * 4.0 ** np.arange(config_.points)
    kinds: tuple[Callable, ...] = (
        lambda m, job: dense(m, job).total,
        lambda m, job: min(top_k(m, job, config_.budget).total, dense(m, job).total),
        lambda m, job: dense(m, job).computed)
    for kind, cost in zip(COSTS, kinds):
        for n, (right, name, chosen) in enumerate(frontier(cost, jobs, budgets)):
            found[f"{kind}_{n}"] = float(right)
            found[f"{kind}_{n}_by"] = name and (
                f"{name}, {chosen.trials} x {chosen.tokens}")
    if not config_.quiet:
        _show(found, budgets)
    return found


def _show(found: dict[str, Any], budgets: np.ndarray) -> None:
    table = Table(box=box.SIMPLE_HEAD, caption="TFLOP; moved: at 562.5 FLOP a byte")
    for column in ("model", "computed", "moved", "share", "top-k", "saved"):
        table.add_column(column, justify="right")
    for name in MODELS:
        own = [found[f"{name}_{key}"] for key in (
            "computed", "moved", "share", "top_k", "saved")]
        table.add_row(name, f"{own[0]:,.0f}", f"{own[1]:,.0f}", f"{own[2]:.1%}",
                      f"{own[3]:,.0f}", f"{own[4]:.1f}x")
    Console().print(table)
    table = Table(box=box.SIMPLE_HEAD, caption="accuracy by the law proposed here, and "
                  "model, trials x tokens that reach it")
    for column in ("TFLOP", *COSTS):
        table.add_column(column, justify="right")
    for n, budget in enumerate(budgets):
        table.add_row(f"{budget:,.0f}", *(
            f"{found[f'{kind}_{n}']:.1%} {found[f'{kind}_{n}_by']}" for kind in COSTS))
    Console().print(table)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
