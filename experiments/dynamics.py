"""A unified view: does context help, which mixers use it, and what do devices add?

Claims of "A Unified View of Long-Sequence Models towards Modeling Million-Scale
Dependencies", scaled down: whether long context helps depends on the task; plain
transformers make poor use of it; attention over four devices is almost 40 times as fast
as vanilla attention on one.

    python -m experiments.dynamics

took 14 minutes, 8 of them processor time, on 2 cores busy with other work. It leaves
dynamics.json and dynamics.png. One seed; steps and rate were chosen by a few tries.

Context: a sequence is cut into pieces, and only tokens of one piece meet; nothing else
is taken away. Digits of 64 pixels, named from the mean over all of them, do not need
more than 16 that meet: 90.3%, 89.4% and 88.6% with softmax at 16, 32 and 64, at most
1.9 points between contexts of any mixer (360 held out: 1 point is 4 digits). Which of
511 coins' sides came up more often, asked at the end, needs them all: 64.1%, 72.7% and
96.9% at 128, 256 and 512, where what is in sight allows 66.6%, 75.0% and 100%. So the
first claim shows. The second does not: softmax uses this context as well as linear
attention (96.9%), and better than a long convolution (81.8%) and Linformer (70.1%),
which have to learn a weight for every place. FNet's one layer brings the sum to token 0
only and a filter of 3 tokens sees one coin: 51.2% and 53.1%.

Devices, T = 4096, H2 D64, causal, on grids of 1 to 8 devices: outputs differ by 2e-7.
With all logits of a device in memory its temporary memory is 403, 202, 102 and 51 MB,
like 1/P; a step of a ring, T/P queries on T/P keys, takes 271, 68, 17 and 4.5 MB, like
1/P^2; tiles take 8.8 to 4.5 MB. Bytes of collectives in the compiled programs equal
those by hand. Modelled, not timed: at T = 131,072, four devices are 40 times as fast as
vanilla attention, of which 11.2 come from never writing the logits and 3.6 from the
devices; at T = 4096 they are slower than one, since the links are. The model takes
peaks for granted and float32 logits that cross memory four times; half as many bytes
would make the 11.2 about 6.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from attn.layers import Layer, MultiHead
from attn.lineartransformer import LinearTransformer
from attn.linformer import Linformer
from attn.masks import Full
from attn.mixers import Depthwise, FNet, LongConv
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data.images import Digits
from experiments.data.majority import Majority
from experiments.data.dataset import Cycle
from experiments.measure import grid_cost, seeds
from experiments.measure.grid_cost import Hardware
from experiments.training.loop import TrainConfig, evaluate, fit
from experiments.training.objectives import LABELS, accuracy
from experiments.training.runs import open_folder
from models.lm import LM
from models.pixels import PixelNet
from models.stack import check_layers

TASKS = ("digits", "majority")


class Pieces(Layer):
    """A mixer that sees pieces of `length` tokens, each as a sequence of its own."""

    mixer: Layer
    length: int

    def __call__(self, x, state=None, *, context=None, pos=None, segments=None):
        """x [B,T,E] -> [B,T,E]."""
        pieces = x.reshape(-1, self.length, x.shape[-1])
        return self.mixer(pieces, segments=segments).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Config:
    """The mixers, the two tasks, and the attention that is spread over devices."""

    mixers: tuple = option(
        (Softmax(mask=Full()), LinearTransformer(causal=False), Linformer(rank=32),
         FNet(), LongConv(), Depthwise()),
        "what is compared, each in all layers; `length` becomes that of the context",
    )
    tasks: tuple[str, ...] = option(TASKS, "digits, majority or both")
    cuts: tuple[int, ...] = option((4, 2, 1), "pieces that a sequence is cut into")
    width: int = option(32, "model width E")
    heads: int = option(2, "heads H")
    layers: int = option(2, "layers of the network that reads digits")
    coin_layers: int = option(1, "layers of the network that counts coins")
    length: int = option(512, "tokens of a row of coins")
    steps: int = option(150, "training steps on digits", most=STEPS)
    coin_steps: int = option(150, "training steps on coins", most=STEPS)
    batch: int = option(32, "digits a step")
    coin_batch: int = option(16, "rows of coins a step")
    rate: float = option(5e-3, "peak learning rate", above=0)
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(1, "networks trained, with seeds one after the other")
    tokens: int = option(
        4096, "tokens of the attention over devices, 0 for none", least=0
    )
    devices: int = option(8, "the most devices; on a CPU they are asked for")
    far: int = option(131072, "tokens in the model of time")
    hardware: Hardware = option(
        Hardware(), "peaks in the model of time, of an RTX 4090"
    )
    quiet: bool = option(False, "no progress bar and no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        seeds.check(self)
        check_layers("mixers", self.mixers)
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks={sorted(unknown)}: expected some of {TASKS}")
        for cut in self.cuts:
            if cut < 1 or self.length % cut or 64 % cut:
                raise ValueError(
                    f"cuts={cut}: expected to divide 64 and length={self.length}"
                )

    def layer(self, mixer: Any, context: int) -> Pieces:
        """The mixer over pieces of `context` tokens."""
        if hasattr(mixer, "length"):
            mixer = mixer.clone(length=context, parent=None)
        if not isinstance(mixer, Layer):
            mixer = MultiHead(mixer, self.heads, position=None, parent=None)
        return Pieces(mixer, context, parent=None)

    def majority(self, split: str = "train", bias: float = 0.0) -> Majority:
        """Coins of which the most frequent side is asked for."""
        return Majority(length=self.length, seed=self.seed, split=split, bias=bias)

    def curriculum(self) -> Cycle:
        """What is trained on: coins with a bias and fair ones in turn; of fair ones
        alone the difference is too small to begin with."""
        return Cycle((self.majority(bias=0.5), self.majority()))

    def plan(self, steps: int, batch: int) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=steps, batch=batch, learning_rate=self.rate, seed=self.seed,
            warmup=steps // 10, log=25,
        )


TINY = Config(
    mixers=(FNet(), Softmax(mask=Full())), cuts=(2, 1), width=8, heads=2, layers=1,
    length=16, steps=2, coin_steps=2, batch=2, coin_batch=2, tokens=32, devices=2,
    quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """The numbers of `once`: of several seeds their medians, with the least and the
    greatest."""
    return seeds.repeated(config_, once, "dynamics", ("digits", "majority"))


def once(config_: Config) -> dict[str, Any]:
    """Trains, counts and models -> accuracies by task, mixer and context, and the
    numbers of `grid_cost`."""
    grid_cost.many(config_.devices)
    folder = open_folder(
        "dynamics", config_.folder, config.command(config_), config.settings(config_)
    )
    scores = {task: learned(config_, task) for task in config_.tasks}
    if "majority" in scores:  # and what the coins in sight allow
        contexts = [config_.length // cut for cut in config_.cuts]
        scores["majority"]["the best possible"] = {
            at: config_.majority().best(at) for at in contexts}
    rows, times = [], {}
    if config_.tokens:
        width = 2 * config_.width
        rows = grid_cost.measured(
            config_.tokens, config_.heads, width, config_.devices)
        times = {t: grid_cost.modelled(t, config_.heads, width, config_.hardware)
                 for t in (config_.tokens, config_.far)}
    found = {"command": config.command(config_), "jax": jax.__version__,
             "scores": scores, "spread": rows, "times": times}
    (folder / "dynamics.json").write_text(json.dumps(found, indent=1) + "\n")
    if scores:
        from experiments.measure.report import context_picture

        context_picture(scores, folder / "dynamics.png")
    if not config_.quiet:
        show(scores, rows, times)
    return {"folder": str(folder)} | numbers(scores, rows, times)


def learned(config_: Config, task: str) -> dict[str, dict[int, float]]:
    """Mixer -> context -> the share of right answers on held-out data."""
    found: dict[str, dict[int, float]] = {}
    length = 64 if task == "digits" else config_.length
    for mixer in config_.mixers:
        name = config.format_value(mixer)
        for cut in config_.cuts:
            layer = config_.layer(mixer, length // cut)
            train = digits if task == "digits" else majority
            label = f"{task}, context {length // cut}, {name}"
            found.setdefault(name, {})[length // cut] = train(config_, layer, label)
    return found


def digits(config_: Config, layer: Pieces, label: str) -> float:
    """The share of held-out digits that are named rightly."""
    model = PixelNet(width=config_.width, heads=config_.heads, table=True,
                     attention=(layer,) * config_.layers)
    plan = config_.plan(config_.steps, config_.batch)
    dataset = Digits(seed=config_.seed)
    fitted = fit(model, dataset, plan, objective=LABELS, label=label,
                 quiet=config_.quiet)
    held = dataclasses.replace(dataset, split="valid").whole()
    return accuracy(model, fitted.params, held)


def majority(config_: Config, layer: Pieces, label: str) -> float:
    """The share of right answers about 512 held-out rows of coins."""
    held, size = config_.majority("valid"), config_.coin_batch
    model = LM(vocab=held.vocab, width=config_.width, heads=config_.heads,
               attention=(layer,) * config_.coin_layers)
    plan = config_.plan(config_.coin_steps, size)
    fitted = fit(model, config_.curriculum(), plan, label=label, quiet=config_.quiet)
    batches = min(512, 8 * config_.coin_steps) // size
    return evaluate(model, fitted.params, held, batches, size)["accuracy"]


def numbers(scores: dict, rows: list, times: dict) -> dict[str, Any]:
    """All of it as plain numbers."""
    found = {f"{task} {name} context {at}": score for task, each in scores.items()
             for name, by in each.items() for at, score in by.items()}
    for row in rows:
        found |= {f"{row['devices']} devices {key}": row[key]
                  for key in ("error", "tiles", "dense", "ring", "gathered", "reduced")}
    for t, each in times.items():
        found |= {f"T={t} {name} ms": 1e3 * value for name, value in each.items()}
    return found


def show(scores: dict, rows: list, times: dict) -> None:
    """The tables for the terminal."""
    for task, each in scores.items():
        contexts = list(next(iter(each.values())))
        table = Table(title=f"{task}: right answers by context", box=box.MARKDOWN)
        table.add_column("mixer", overflow="fold")
        for at in contexts:
            table.add_column(f"{at} tokens", justify="right")
        for name, by in each.items():
            table.add_row(name, *(f"{by[at]:.1%}" for at in contexts))
        Console().print(table)
    for table in grid_cost.tables(rows, times):
        Console().print(table)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
