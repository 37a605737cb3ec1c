"""Scale: will it fit, and how fast can it be, before a pod is rented.

The real training step, AdamW and all, is compiled for the chips of a TPU pod that is
not there, and read: memory a chip, what moves between chips by kind, the operations of
products and kernels, and the time that these take at least
(`experiments/measure/roofline.py` says how; elementwise work is left out, so a real
step is longer).

    pip install -e '.[aot]'
    python -m experiments.scale                 # 8B hybrid, 2M tokens, 256 chips of v5e

compiles a model of 8 billion parameters, Llama 3's sizes with three linear layers
(Lightning) before each exact one (a zigzag ring), for a sequence of 2,097,152 tokens.
The exchanges of exact attention side by side, all of whose layers are exact:

    python -m experiments.scale --every=1 --tokens=1048576 --topology=v5p:4x4x2 \\
        --exchanges='("ring", "zigzag", "swap", "gather")'

Linear layers alone (LASP-2), one exact layer (a ring) in four, and all of them exact:

    python -m experiments.scale --model=hybrid_1b --topology=v5p:4x4x4 \\
        --every='(0, 4, 1)' --exchanges='("ring",)'

One layer's attention alone, forward and backward:

    python -m experiments.scale --layer=True --tokens=65536 --topology=v5p:2x2x2 \\
        --exchanges='("ring", "zigzag", "swap", "gather")'

Its last line but one is the time of the products that the mask asks for, shared out
evenly and at the same rate, over the time of the step.

`--topology=cpu` compiles for the devices of this machine, without times;
`--page=experiments/SCALE.md --title='...'` puts the table on the page of results.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from attn.lightning import Lightning
from attn.parallel.exchange import EXCHANGES
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import option
from experiments.measure import page
from experiments.measure.roofline import roofline
from experiments.measure.scale_table import Row, markdown, metrics, show
from experiments.measure.topology import pod
from experiments.training.mesh import Sizes
from experiments.training.step import TrainConfig, staged
from models.hybrid import hybrid_1b, hybrid_8b
from models.lm import LM
from pallas_kernels.schedule import FULL, MASKED, Tiling, block_mask

MODELS = {"hybrid_8b": hybrid_8b, "hybrid_1b": hybrid_1b}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled, and for which chips."""

    model: str = option("hybrid_8b", "hybrid_8b, hybrid_1b, or a model as LM(...)")
    every: int | tuple[int, ...] = option(
        4, "of so many layers one is exact; 1: all, 0: none; several: one model each")
    linear: Any = option(Lightning(), "the other layers, of a model by name")
    exact: Any = option(Softmax(), "the exact layers, of a model by name")
    exchanges: tuple[str, ...] = option(("zigzag",), "how shards meet in exact layers")
    tokens: int = option(2**21, "tokens of a sequence")
    batch: int = option(1, "sequences")
    topology: str = option("v5e:16x16", "the pod, such as v5p:4x4x4, or cpu")
    mesh: tuple[int, int, int] | None = option(
        None, "chips along data, seq and model; None: all along seq")
    layer: bool = option(False, "the attention of one exact and one linear layer alone")
    page: str | None = option(None, "a Markdown page that gets the table, such as "
                              "experiments/SCALE.md")
    title: str = option("Scale", "of the table's section on that page")

    def __post_init__(self):
        for name in ("tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if bad := set(self.exchanges) - set(EXCHANGES):
            raise ValueError(f"exchanges={bad.pop()!r}: expected some of {EXCHANGES}")
        if min(self.shares, default=-1) < 0:
            raise ValueError(f"every={self.every}: expected 0 or more")
        names = ", ".join(MODELS)
        if self.model not in MODELS and not self.model.startswith("LM("):
            raise ValueError(f"model={self.model}: expected {names}, or LM(...)")

    @property
    def shares(self) -> tuple[int, ...]:
        """`every`, of each model."""
        return (self.every,) if isinstance(self.every, int) else tuple(self.every)


TINY = Config(
    model="LM(width=32, heads=4, attention=(Lightning(), Softmax()))", tokens=64,
    topology="cpu", exchanges=("gather",),
)


def run(config_: Config) -> dict[str, Any]:
    """Compiles every variant, prints the table -> the numbers."""
    chips = pod(config_.topology)
    sizes = config_.mesh or (1, len(chips.devices), 1)
    mesh = chips.mesh(sizes)
    rows: dict[str, Row] = {}
    console = Console(stderr=True)
    for name, (make, wanted) in variants(config_, sizes, mesh).items():
        with console.status(f"{name}: compiling for {config_.topology}"):
            begin = time.perf_counter()
            traced, lowered = make()
            one = roofline(chips, mesh, traced, lowered)
            took = time.perf_counter() - begin
        rows[name] = Row(one, took, wanted / len(chips.devices))
        console.print(f"{name}: compiled in {took:.0f} s")
    show(rows, chips)
    if config_.page:
        shown = config.command(dataclasses.replace(config_, page=None, title="Scale"))
        page.write(config_.page, config_.title, shown, markdown(rows))
    found: dict[str, Any] = {}
    for name, row in rows.items():
        label = name.replace(", ", "_").replace(" ", "_")
        found |= {f"{label}_{k}": v for k, v in metrics(row).items()}
    return found


def variants(config_: Config, sizes: Sizes, mesh: Any) -> dict[str, Any]:
    """What is compiled, by name: a function that traces and lowers, and the operations
    of the products that it is for, 0 where that is not known."""
    exact = {
        way: dataclasses.replace(config_.exact, exchange=way)
        if isinstance(config_.exact, Softmax) else config_.exact
        for way in config_.exchanges
    }
    if config_.layer:
        ways = {"linear": config_.linear} | exact
        return {
            name: (lambda a=a: alone(config_, model_of(config_, a, 1), a, mesh),
                   wanted(config_, model_of(config_, a, 1), a))
            for name, a in ways.items()
        }
    shape = jax.ShapeDtypeStruct((config_.batch, config_.tokens), jnp.int32)
    plan = TrainConfig(batch=config_.batch, mesh=sizes)
    found: dict[str, Any] = {}
    for every in config_.shares if config_.model in MODELS else (1,):
        for way, a in exact.items():
            several = every and len(config_.shares) > 1
            name = f"{way}, 1 in {every}" if several else way if every else "linear"
            make = lambda model=model_of(config_, a, every): staged(
                model, plan, mesh, {"tokens": shape, "targets": shape})
            found.setdefault(name, (make, 0.0))
    return found


def model_of(config_: Config, exact: Any, every: int) -> LM:
    """The model, with `exact` as its exact layers, one of `every`."""
    if config_.model not in MODELS:
        given = config.parse(config_.model)
        return given.clone(attention=tuple(
            exact if isinstance(a, type(exact)) else a for a in given.attention
        ))
    return MODELS[config_.model](every, config_.linear, exact)


def alone(config_: Config, model: LM, attention: Any, mesh: Any) -> tuple:
    """An attention with the model's heads, forward and backward, traced and lowered."""
    over = dataclasses.replace(attention, axis="seq")
    width = model.head_dim or model.width // model.heads
    lies = NamedSharding(mesh, PartitionSpec("data", "seq", "model"))
    heads = model.heads, model.kv_heads or model.heads
    q, k = (
        jax.ShapeDtypeStruct((config_.batch, config_.tokens, h, width), model.dtype,
                             sharding=lies) for h in heads
    )

    def both(q, k, v, do):
        o, pull = jax.vjp(lambda *a: over(*a), q, k, v)
        return o, pull(do)

    with jax.set_mesh(mesh):
        traced = jax.jit(both, out_shardings=lies).trace(q, k, k, q)
        return traced, traced.lower()


def wanted(config_: Config, model: LM, attention: Any) -> float:
    """Operations of the seven products, two forward and five backward, that the mask of
    an exact layer asks for; 0 for another layer."""
    if not isinstance(attention, Softmax):
        return 0.0
    size = -(-config_.tokens // 512)
    tiling = Tiling(config_.tokens, config_.tokens, size, size, 0)
    table = block_mask(attention.visible, tiling)
    pairs = size**2 * ((table == FULL).sum() + (table == MASKED).sum() / 2)
    width = model.head_dim or model.width // model.heads
    return float(7 * 2 * pairs * width * model.heads * config_.batch)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
