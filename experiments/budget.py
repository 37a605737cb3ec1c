"""What a cache forgets: quality against the memory that a policy keeps.

One model, with exact attention replaced by each policy at each budget, nothing trained
again. A prompt is read in one piece, and what is asked comes token by token: from then
on only what was kept is there. Asked are a needle at any depth, several needles, a
variable that was named twice, keys of a dictionary, random tokens that repeat, and text
(`experiments.evaluate` says how); beside them the bytes of the memory and the time of a
token.

    python -m experiments.budget --model=FOLDER

Policies that free memory keep a share of the prompt's tokens: StreamingLLM
(arXiv:2309.17453), H2O (2306.14048), TOVA (2401.06104), SnapKV (2404.14469), PyramidKV
(2406.02069) and AdaKV (2407.11550). Quest (2406.10774), Recycled Attention
(2411.05787), the best tokens (2506.05333), ActQKV (2502.13542), by whose rule the
prompt is read too, and RetrievalAttention (2409.10516, here with an exact search) keep
all and read a share. KIVI (2402.02750) and SAQ keep all, in codes. Razor (2407.15891)
and Duo (2410.10819) keep all tokens of some heads, which are found on the model first:
by its weights on random tokens that repeat, and by gates that are trained for
`--gate_steps` steps on numbers that are asked for.

The model that ships, of texts of 512 tokens (`--length=512 --trials=8
--shares='(0.0625, 0.25)'`, one draw of 8 rows a task; 27 minutes of computing, three
quarters of it compiling): with a quarter of the memory Razor and Duo, whose heads are
found on the model, keep what exact attention knows (a needle 100%, four needles 91%
of 94%, text 1.18 bits per byte of 1.17), codes of 4 bits as well with 44%; of those
that judge tokens alone AdaKV finds 88% of the needles and TOVA 38%, StreamingLLM 25%,
SnapKV 12%, H2O none, though their text loses at most 0.11 bits. With a sixteenth Razor
is the best of those that free memory (38%, needles 56%). Of those that keep all, the
best tokens and RetrievalAttention lose nearly nothing at a sixteenth of the reading,
Quest finds 38%, ActQKV and Recycled none.

Policies stand where exact attention sees everything, windows stay as they are. In a
model of windows alone they stand in these, but for Razor and Duo, which are left out;
so is what has no place for a window or a softcap. The command says which, and why.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data import Corpus
from experiments.data.retrieval import NOUNS
from experiments.measure import asked, charts
from experiments.measure.cache_budgets import NAMES
from experiments.measure.placing import LeftOut, of_policy
from experiments.measure.provenance import provenance
from experiments.measure.reading import HELD_OUT, LEAST, reader_of
from experiments.sources import SHIPPED, loaded
from experiments.training.cells import cell
from experiments.training.runs import locked, open_folder, write_whole
from models.lm import state_bytes

TASKS = {
    "needle": "a needle", "needles": "needles", "variables": "variables",
    "recall": "keys of a dictionary", "repeats": "repeated tokens",
    "bits": "text, bits per byte",
}
POINTS = ("needle", "needles", "recall", "bits")  # of the picture


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, the policies and what is asked."""

    model: str = option(SHIPPED, "folder, name on the hub, folder of a run, or small")
    policies: tuple[str, ...] = option(NAMES, "what replaces exact attention, by name")
    shares: tuple[float, ...] = option(
        (1 / 16, 1 / 8, 1 / 4, 1 / 2), "of the tokens of a row")
    tasks: tuple[str, ...] = option(tuple(TASKS), "what is asked")
    text: Corpus = option(HELD_OUT, "hay and text: the valid split, as words")
    length: int | None = option(
        None, "tokens of a row (None: the model's, at most 4096)", least=LEAST)
    trials: int = option(16, "rows a task")
    facts: int = option(4, "needles in a row of `needles`, keys of `recall`")
    gate_steps: int = option(200, "steps that gates of Duo are trained", most=STEPS)
    batch: int = option(4, "rows at once", FREE)
    seed: int = option(0, "of what is hidden where")
    quiet: bool = option(False, "no progress bar and no table", FREE)
    folder: str | None = option(
        None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        if unknown := set(self.tasks) - {*TASKS}:
            raise ValueError(f"tasks={sorted(unknown)}: expected of {tuple(TASKS)}")
        if unknown := set(self.policies) - {*NAMES}:
            raise ValueError(f"policies={sorted(unknown)}: expected of {NAMES}")
        if not self.policies or not self.tasks or not self.shares:
            raise ValueError("policies, tasks or shares: expected one or more, not ()")
        if self.facts > len(NOUNS):
            raise ValueError(f"facts={self.facts}: expected at most {len(NOUNS)}")
        for share in self.shares:
            if not 0 < share <= 1:
                raise ValueError(f"shares: {share!r}: expected in (0, 1]")


TINY = Config(
    model=str(pathlib.Path(__file__).parents[1] / "tests" / "checkpoints" / "llama"),
    policies=("TOVA",), shares=(1 / 2,), tasks=("repeats",), length=16, trials=1,
    batch=1, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Asks -> plain numbers of the smallest budget of each policy; all rows and the
    picture in a folder."""
    found = loaded(config_.model)
    folder = open_folder("budget", config_.folder, config.command(config_),
                         config.settings(config_))
    reader, _ = reader_of(
        found, config_.tasks, config_.text, config_.length, config_.seed, "tasks")
    cases: list = [("exact", 1.0, found.model)]
    left_out: dict[str, str] = {}
    for name in config_.policies:
        try:
            cases += [(name, *case) for case in of_policy(
                name, reader, config_.shares, config_.gate_steps, config_.facts)]
        except LeftOut as reason:
            left_out[name] = f"{name} is left out: {reason}"
            if not config_.quiet:
                Console().print(left_out[name])
    rows: list[dict[str, Any]] = []
    texts = questions(config_, reader)
    with locked(folder):
        for name, share, model in track(cases, "budget", disable=config_.quiet):
            one = dataclasses.replace(reader, model=model)
            made, _ = cell(folder, f"{name} {share:g}",
                           functools.partial(row, config_, one, texts))
            rows.append({"policy": name, "asked": share} | made)
    exact = rows[0]["state_bytes"]
    rows = [one | {"memory": one["state_bytes"] / exact} for one in rows]
    result = {"rows": rows, "left_out": left_out, "provenance": provenance(
        config.command(config_), [config_.seed])}
    write_whole(folder / "budget.json", json.dumps(result, indent=1) + "\n")
    points = {task: TASKS[task] for task in POINTS if task in config_.tasks}
    if points:
        charts.memory_picture(rows, points, folder / "budget.png")
    if not config_.quiet:
        Console().print(table(rows, config_.tasks))
    return numbers(rows, config_.tasks) | {"folder": str(folder)}


def questions(config_: Config, reader: asked.Reader) -> dict[str, list[asked.Row]]:
    """What is asked in each task, the same of all policies."""
    length, many = reader.length, config_.facts
    made: dict[str, Callable[[asked.Reader, int], asked.Row]] = {
        "needle": lambda own, n: asked.needle(own, length, n / config_.trials, n),
        "needles": lambda own, n: asked.needles(own, many, n),
        "variables": lambda own, n: asked.variables(own, 1, n),
        "recall": lambda own, n: asked.recall(own, many, n, length),
    }
    told = [task for task in config_.tasks if task in made]
    trials = range(config_.trials)

    def draw(own: asked.Reader) -> list[asked.Row]:
        return [made[task](own, n) for task in told for n in trials]

    drawn = iter(asked.aligned(draw, reader) if told else ())
    found = {task: [next(drawn) for _ in trials] for task in told}
    if "repeats" in config_.tasks:
        ids = reader.model.vocab
        found["repeats"] = [asked.repeats(reader, ids, n) for n in trials]
    return found


def row(config_: Config, reader: asked.Reader, texts: dict[str, list[asked.Row]]
        ) -> dict[str, float]:
    """Every task, bytes of the memory of a row, those of the program of a token at its
    peak, and milliseconds a token."""
    found: dict[str, float] = {}
    for task in config_.tasks:
        if task == "bits":
            nats, tokens = asked.streamed_nats(reader, config_.trials, config_.batch)
            found[task] = nats / math.log(2) / tokens / bytes_per_token(reader)
            continue
        whole, right = asked.score(reader, texts[task], config_.batch)
        found[task] = right if task == "repeats" else whole
    return found | {
        "state_bytes": float(state_bytes(reader.model, reader.length,
                                         reader.length * 3 // 4)),
        "peak_bytes": float(peak_bytes(reader)),
        "ms_per_token": milliseconds(reader),
    }


def peak_bytes(reader: asked.Reader) -> int:
    """Bytes that the compiled program of one token holds at most, beside the parameters
    and for one row: the memory, which is written in place, and what it works in."""
    prompt = jax.ShapeDtypeStruct((1, reader.length * 3 // 4), jnp.int32)
    state = jax.eval_shape(lambda: reader.model.init_state(reader.length, prompt))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    memory = jax.jit(reader.model.apply, donate_argnums=2).lower(
        reader.params, token, state).compile().memory_analysis()
    assert memory is not None
    held = sum(a.nbytes for a in jax.tree.leaves(reader.params))
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes - held)


def bytes_per_token(reader: asked.Reader) -> float:
    """Of the hay, in UTF-8."""
    return len(reader.text.decode(reader.hay.tolist()).encode()) / len(reader.hay)


def milliseconds(reader: asked.Reader, tokens: int = 16) -> float:
    """Of one token after a prompt of three quarters of a row: the median of five runs
    of `tokens`, without compilation."""
    prompt = reader.length * 3 // 4
    rng = reader.rng(6)
    text = jnp.asarray(rng.integers(reader.model.vocab, size=(1, prompt)), jnp.int32)
    state = reader.model.init_state(reader.length, text)
    state, _ = jax.jit(reader.model.apply)(reader.params, text, state)

    @jax.jit
    def decode(params, state, token):
        def one(carry, _):
            state, token = carry
            state, logits = reader.model.apply(params, token, state)
            return (state, logits.argmax(-1)), None

        return jax.lax.scan(one, (state, token), None, min(tokens, prompt // 4))[0][1]

    spent = []
    for _ in range(6):
        clock = time.perf_counter()
        decode(reader.params, state, text[:, :1]).block_until_ready()
        spent.append((time.perf_counter() - clock) * 1e3 / min(tokens, prompt // 4))
    return statistics.median(spent[1:])


def numbers(rows: list[dict[str, Any]], tasks: tuple[str, ...]) -> dict[str, float]:
    """Of exact attention, and of each policy what it has at its smallest budget."""
    least: dict[str, dict[str, Any]] = {}
    for one in rows:
        name = one["policy"]
        if name not in least or one["asked"] < least[name]["asked"]:
            least[name] = one
    return {f"{name} {what}": one[what] for name, one in least.items()
            for what in (*tasks, "memory")}


def table(rows: list[dict[str, Any]], tasks: tuple[str, ...]) -> Table:
    """The rows for the terminal."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    found.add_column("policy")
    for title in ("asked", "memory", *tasks, "peak, MB", "ms/token"):
        found.add_column(title, justify="right")
    for one in rows:
        shown = [f"{one[task]:.3f}" if task == "bits" else f"{one[task]:.0%}"
                 for task in tasks]
        found.add_row(one["policy"], f"{one['asked']:.1%}", f"{one['memory']:.1%}",
                      *shown, f"{one['peak_bytes'] / 1e6:.2f}",
                      f"{one['ms_per_token']:.2f}")
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
