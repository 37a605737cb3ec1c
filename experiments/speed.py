"""Speed: attentions against each other and against jax.nn, paired in one run.

Every contender is timed in turn, round after round, so that what slows the machine down
slows all of them; a figure is the median of the rounds, a ratio the median of the
ratios to jax.nn.dot_product_attention in the same round: 2 is twice as fast. Inputs are
iid normal and attention is causal. The pass "both" is forward and backward.

    python -m experiments.speed --lengths='(2048, 4096)' --attentions='(Softmax(),)'

takes half a minute on 2 cores (float32, B1 H4 D64), where exact attention is 2.5 times
as fast as jax.nn forward and 2.7 times forward and backward at T = 2048, 3.1 and 3.4
times at T = 4096. All contenders over all lengths: `python -m experiments.speed`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attn.based import Based
from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.softmax import Softmax
from experiments import config
from experiments.config import knob
from experiments.runs import open_folder

PEER = "jax.nn"
PASSES = ("forward", "both")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed, and on what shapes."""

    attentions: tuple = knob(
        (Softmax(), Softmax(mask=Causal() & Window(256)), Landmark(), Lightning(),
         Based()),
        "the contenders; jax.nn is always there",
    )
    lengths: tuple[int, ...] = knob((512, 1024, 2048, 4096), "sequence lengths T")
    batch: int = knob(1, "batch B")
    heads: int = knob(4, "query heads H")
    kv_heads: int | None = knob(None, "key heads K (None: H)")
    width: int = knob(64, "width of a head D")
    feature_dim: int = knob(16, "width of q and k for attentions made for narrow ones")
    dtype: Any = knob(jnp.float32, "of q, k and v")
    passes: tuple[str, ...] = knob(PASSES, "forward, both (forward and backward)")
    rounds: int = knob(7, "how often each is timed")
    quiet: bool = knob(False, "no progress bar")
    folder: str | None = knob(None, "where results go; None makes a new folder")

    def __post_init__(self):
        if unknown := set(self.passes) - set(PASSES):
            raise ValueError(f"passes={sorted(unknown)}: expected some of {PASSES}")
        if not self.lengths or min(self.lengths) < 1 or self.rounds < 1:
            raise ValueError(
                f"lengths={self.lengths}, rounds={self.rounds}: expected 1 or more"
            )


TINY = Config(
    attentions=(Softmax(), Lightning()), lengths=(16, 32), rounds=2, width=8, quiet=True
)


def run(config_: Config) -> dict[str, Any]:
    """Times all -> {"LENGTH PASS NAME": {"ms": ..., "ratio": ...}} and the folder."""
    folder = open_folder("speed", config_.folder, config.command(config_))
    rows = []
    jobs = [(t, p) for t in config_.lengths for p in config_.passes]
    for t, which in track(jobs, "timing", disable=config_.quiet,
                          console=Console(stderr=True)):
        rows += measure(config_, t, which)
    device = jax.devices()[0]
    found = {
        "command": config.command(config_), "jax": jax.__version__,
        "device": device.device_kind, "dtype": jnp.dtype(config_.dtype).name,
        "rows": rows,
    }
    (folder / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(found, folder / "speed.png")
    Console().print(table(rows))
    numbers = {
        f"{r['length']} {r['pass']} {r['name']}": r["ratio"] for r in rows
        if r["name"] != PEER
    }
    return numbers | {"folder": str(folder)}


def measure(config_: Config, t: int, which: str) -> list[dict[str, Any]]:
    """One row a contender: median milliseconds and ratio to the peer."""
    named = {PEER: functools.partial(jax.nn.dot_product_attention, is_causal=True)}
    named |= {config.show(a): a for a in config_.attentions}
    calls = {name: prepared(config_, f, t, which) for name, f in named.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(config_.rounds):
        for name, call in calls.items():
            clock = time.perf_counter()
            jax.block_until_ready(call())
            spent[name].append((time.perf_counter() - clock) * 1000)
    peer = np.asarray(spent[PEER])
    return [
        {"length": t, "pass": which, "name": name, "ms": float(np.median(times)),
         "ratio": float(np.median(peer / np.asarray(times)))}
        for name, times in spent.items()
    ]


def prepared(config_: Config, f: Callable, t: int, which: str) -> Callable:
    """f of one contender on its inputs, compiled and run once."""
    keys = jax.random.split(jax.random.key(0), 4)
    narrow = getattr(f, "feature_dim", None) is not None
    d = config_.feature_dim if narrow else config_.width
    heads, kv = config_.heads, config_.kv_heads or config_.heads
    draw = lambda key, h, width: jax.random.normal(
        key, (config_.batch, t, h, width)
    ).astype(config_.dtype)
    v = config_.width
    args = draw(keys[0], heads, d), draw(keys[1], kv, d), draw(keys[2], kv, v)
    cotangent = draw(keys[3], heads, v)

    def both(*args):
        o, back = jax.vjp(f, *args)
        return back(cotangent)

    call = functools.partial(jax.jit(f if which == "forward" else both), *args)
    jax.block_until_ready(call())
    return call


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for the terminal, ratios to the peer in brackets."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = Table(title=f"milliseconds (times as fast as {PEER})")
    found.add_column("T", justify="right")
    found.add_column("pass")
    for name in names:
        found.add_column(name, justify="right", overflow="fold")
    for t, which in dict.fromkeys((row["length"], row["pass"]) for row in rows):
        own = {r["name"]: r for r in rows if (r["length"], r["pass"]) == (t, which)}
        cells = (f"{own[n]['ms']:.1f} ({own[n]['ratio']:.2f})" for n in names)
        found.add_row(f"{t:,}", which, *cells)
    return found


def picture(found: dict[str, Any], path) -> None:
    """Time against length, a line a contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    passes = list(dict.fromkeys(row["pass"] for row in found["rows"]))
    figure, axes = plt.subplots(1, len(passes), figsize=(5 * len(passes), 4.5),
                                layout="constrained", squeeze=False)
    for ax, which in zip(axes[0], passes):
        for name in dict.fromkeys(row["name"] for row in found["rows"]):
            own = [r for r in found["rows"] if (r["pass"], r["name"]) == (which, name)]
            ax.plot([r["length"] for r in own], [r["ms"] for r in own], marker="o",
                    label=name)
        ax.set(xscale="log", yscale="log", title=which, xlabel="tokens T",
               ylabel=f"ms ({found['dtype']}, {found['device']})")
        ax.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, frameon=False,
                  loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
