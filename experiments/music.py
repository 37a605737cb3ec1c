"""Music: does it help to know how far back a note was, and what does it cost?

Music Transformer (Huang et al., 2018, arXiv:1809.04281) claims that attention with a
learned vector for each distance writes better music than one that knows absolute
places, goes on better beyond the length it was trained on, and needs memory linear in
it. Two networks of one size read made-up chorales (`experiments.data.music.Chorales`:
AABA phrases, moved by fourths), or Bach's (`--data='Bach()'`, which needs the extra
`music`); one has sinusoids added, the other relative attention alone. Both are judged
at the training length and at twice that, and the relative one writes a piece: piece.mid
and piece.png. The table of bytes compares the compiled backward pass of one head of
width 64 with the form that has a vector for every pair.

    python -m experiments.music

trains six networks, of three seeds, for 400 steps of 8 rows, in 3 minutes of computing
on 2 cores. Nats a token, medians, and bytes:

    tokens of a row     absolute    relative      gain
    128                    2.039       1.169     0.870 (0.863 to 0.909)
    256, not trained on    2.287       1.166     1.122 (1.066 to 1.196)

    tokens                               650     2,048     3,500
    MB, skewed by tiles                 4.48      4.23     10.75
    MB, a vector a pair                223.1   2,214.6   6,468.0

Both claims show, on rows that repeat phrases and begin anywhere in a piece: relative
attention reads twice the length as well, the sinusoids do not. So short a training is
not the end of either network. (2,048 tokens are whole tiles; other lengths are filled
up in copies, hence 4.48 for 650.)

    python -m experiments.music --data='Bach()' --memory=False

reads the 351 chorales of four parts that music21 10.5 has (minutes the first time;
it keeps them in a cache of its own), and trains as many networks. Nats a token of the
held-out pieces, medians of three seeds:

    tokens of a row     absolute    relative      gain
    128                    1.643       0.990     0.646 (0.643 to 0.711)
    256, not trained on    2.187       0.952     1.239 (1.205 to 1.245)

The claim shows here too, and relative attention makes use of twice the length. What it
wrote holds notes, moves by steps and keeps the voices apart for half of its 4 bars,
then the bass goes above the soprano: 400 steps make no Bach. Held-out pieces are whole
ones.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn.relative import Relative
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, STEPS, option
from experiments.data.dataset import Dataset
from experiments.data.music import REST, VOCAB, VOICES, Bach, Chorales, grid_of, midi
from experiments.measure import cost, seeds
from experiments.measure.provenance import provenance
from experiments.training.loop import TrainConfig, evaluate, fit
from experiments.training.mesh import whole
from experiments.training.runs import open_folder, write_whole
from models.feed import Feed
from models.generate import generate
from models.musictransformer import MusicTransformer

LENGTHS = 650, 2048, 3500  # tokens: those of the paper's table of memory
KINDS = "absolute", "relative"


@dataclasses.dataclass(frozen=True)
class Config:
    """The music, and the two networks."""

    data: Chorales | Bach = option(Chorales(), "Chorales() or Bach()")
    length: int = option(128, "tokens of a training row; judged at twice that, too")
    width: int = option(64, "model width E")
    heads: int = option(4, "heads H")
    layers: int = option(2, "layers of each network")
    reach: int = option(128, "distances that have a vector")
    steps: int = option(400, "training steps of each network", most=STEPS)
    batch: int = option(8, "rows a step")
    rate: float = option(3e-3, "peak learning rate", above=0)
    memory: bool = option(True, "also compile the table of bytes")
    write: int = option(256, "tokens of the piece that is written")
    seed: int = option(0, "of data and parameters; the first of several")
    seeds: int = option(3, "networks trained, with seeds one after the other")
    quiet: bool = option(False, "no progress bars and no table", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        seeds.check(self)
        for name in ("length", "write"):
            value = getattr(self, name)
            if value < 2 * VOICES or value % VOICES:
                raise ValueError(f"{name}={value}: expected a multiple of 4, 8 or more")

    def task(self, split: str = "train", times: int = 1) -> Dataset:
        """The rows."""
        return dataclasses.replace(
            self.data, length=times * self.length, split=split,
            seed=self.data.seed + self.seed)

    def model(self, kind: str) -> MusicTransformer:
        """A network."""
        relative = kind == "relative"
        layer = Relative(self.reach) if relative else Softmax()
        return MusicTransformer(
            vocab=VOCAB, width=self.width, heads=self.heads,
            attention=(layer,) * self.layers, sinusoids=None if relative else "add",
            embed_scale=self.width**0.5,  # as large as the sinusoids beside them
            feed=Feed(4 * self.width, "relu", gated=False, bias=True))

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, seed=self.seed,
            warmup=self.steps // 10)


TINY = Config(
    length=16, width=8, heads=2, layers=1, reach=8, steps=2, batch=2, memory=False,
    write=8, seeds=1, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Trains, judges, writes -> nats a token of both networks at the training length
    and at twice that, and bytes by length: medians over seeds."""
    command = config.command(config_)
    config_.task().batch(0, 1)  # Bach's need a package: said before there is a folder
    folder = open_folder("music", config_.folder, command, config.settings(config_))
    each = [once(one, folder) for one in seeds.each(config_)]
    found = seeds.merged(each, ("gain",))
    if config_.memory:
        for t in LENGTHS:
            ours, theirs = memory(t)
            found |= {f"bytes_{t}_skewed": ours, f"bytes_{t}_pairs": theirs}
    which = [one.seed for one in seeds.each(config_)]
    result = provenance(command, which) | {"rows": each, "found": found}
    write_whole(folder / "music.json", json.dumps(result, indent=1) + "\n")
    if not config_.quiet:
        for one in tables(config_, found):
            Console().print(one)
    return found | {"folder": str(folder)}


def once(config_: Config, folder: pathlib.Path) -> dict[str, Any]:
    """The losses with one seed; the first one's piece goes to the folder."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        model = config_.model(kind)
        fitted = fit(model, config_.task(), config_.plan(), label=kind,
                     quiet=config_.quiet)
        for times in (1, 2):
            held_out = config_.task("valid", times)
            score = evaluate(model, fitted.params, held_out, 8, config_.batch)
            found[f"{kind}_{times * config_.length}"] = score["loss"]
        found["falling"] = seeds.falling(fitted.rows)
    for times in (1, 2):
        n = times * config_.length
        found[f"gain_{n}"] = found[f"absolute_{n}"] - found[f"relative_{n}"]
    if not (folder / "piece.mid").exists():
        grid = written(config_, model, whole(fitted.params))
        (folder / "piece.mid").write_bytes(midi(grid))
        picture(grid, folder / "piece.png")
    return found


def written(config_: Config, model: MusicTransformer, params: Any) -> np.ndarray:
    """A new piece [T,4] after the first chord of a held-out one. What is no pitch is a
    rest."""
    prompt = config_.task("valid").batch(0, 1)["tokens"][0, :1 + VOICES].tolist()
    new = generate(model, params, [prompt], length=config_.write - VOICES,
                   temperature=0.9, seed=config_.seed)[0]
    return np.minimum(grid_of([*prompt[1:], *new]), REST)


def loss(attention: Relative) -> Callable:
    """(params, q, k, v) -> sum of squares of the output."""
    def squares(params, q, k, v):
        o: Any = attention.apply(params, q, k, v)
        return (o**2).sum()

    return squares


def of_pairs(table, q, k, v) -> jax.Array:
    """The same, of one head, with a vector for every pair: [T,T,D] (Shaw et al., 2018,
    arXiv:1803.02155)."""
    t, d = q.shape[1], q.shape[3]
    at = t - 1 - (jnp.arange(t)[:, None] - jnp.arange(t)[None])
    e = table[jnp.clip(at, 0, t - 1)]  # [T,T,D]
    # in the form of Shaw's code: [T,B H,D] x [T,D,T]
    far = jnp.matmul(q[0].reshape(t, 1, d), e.swapaxes(1, 2))[:, 0]
    s = (q[0, :, 0] @ k[0, :, 0].T + far) * d**-0.5
    p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), s, -jnp.inf))
    return ((p @ v[0, :, 0]) ** 2).sum()


def memory(t: int, width: int = 64) -> tuple[int, int]:
    """Bytes that the compiled backward pass of one head needs for t tokens: skewed tile
    by tile, and with a vector for every pair."""
    q = jax.ShapeDtypeStruct((1, t, 1, width), jnp.float32)
    table = jax.ShapeDtypeStruct((1, t, width), jnp.float32)
    ours = jax.jit(jax.grad(loss(Relative(t)), (0, 1, 2, 3)))
    theirs = jax.jit(jax.grad(of_pairs, (0, 1, 2, 3)))
    return (cost.memory(ours, {"params": {"distances": table}}, q, q, q),
            cost.memory(theirs, jax.ShapeDtypeStruct((t, width), jnp.float32), q, q, q))


def tables(config_: Config, found: dict[str, Any]) -> list[Table]:
    """The losses and the bytes for the terminal."""
    losses = Table(title="nats a token, held out", box=box.SIMPLE_HEAD)
    losses.add_column("tokens of a row")
    for name in (*KINDS, "gain"):
        losses.add_column(name, justify="right")
    for n in (config_.length, 2 * config_.length):
        losses.add_row(str(n), *(seeds.spread(found, f"{kind}_{n}", "{:.3f}")
                                 for kind in (*KINDS, "gain")))
    if not config_.memory:
        return [losses]
    spent = Table(title="MB of one head of width 64, backward", box=box.SIMPLE_HEAD)
    for name in ("tokens", "skewed by tiles", "a vector a pair", "times"):
        spent.add_column(name, justify="right")
    for t in LENGTHS:
        ours, theirs = found[f"bytes_{t}_skewed"], found[f"bytes_{t}_pairs"]
        spent.add_row(f"{t:,}", f"{ours / 1e6:,.2f}", f"{theirs / 1e6:,.1f}",
                      f"{theirs / ours:,.0f}")
    return [losses, spent]


def picture(grid: np.ndarray, path: pathlib.Path) -> None:
    """The piano roll of a grid [T,4], a colour a voice."""
    from experiments.measure.report import plt

    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for voice, name in enumerate(("soprano", "alto", "tenor", "bass")):
        pitches = grid[:, voice]
        steps = np.nonzero(pitches != REST)[0]
        axes.barh(pitches[steps], 1, left=steps, height=0.9, color=f"C{voice}",
                  label=name)
    axes.set(xlabel="step (a sixteenth)", ylabel="MIDI pitch")
    axes.set_title("a written piece", loc="left")
    # above the notes, whose highest voice may be at the top right
    axes.legend(frameon=False, ncols=VOICES, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
