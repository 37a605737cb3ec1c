"""Speed: attentions against each other and against their peers, paired in one run.

Every candidate is timed in turn, round after round, so that what slows the machine down
slows all of them; a figure is the median of the rounds, a ratio the median of the
ratios to the `base`, jax.nn.dot_product_attention, in the same round: 2 is twice as
fast. Inputs are iid normal and attention is causal. The pass "both" is forward and
backward; "decode" is one token more for a memory of T, "prompt" all of T for an empty
one, with what a cache policy then keeps. Peers take part where they are installed:
cuDNN, tokamax and torch, ejkernel beside what is not exact, and titans-pytorch beside
MLPs that learn. What does the whole of causal attention is also given as a share of a
large matrix product that the same process timed, a decoding step by the bytes of its
memory as a share of a large copy. Attentions that learn something read tokens [B,T,H V]
as well, iid normal, and their backward pass is also that of their parameters. A second
table says from how many tokens on a candidate stays faster than the best exact one,
peers included: "< T" if from the first length on, "> T" if not even at the last, else
on a line between two lengths.

    python -m experiments.speed --lengths='(1024, 2048, 4096)' \\
        --passes='("forward", "both")' --attentions='(Softmax(),)'

takes half a minute on 2 cores (float32, B1 H4 D64). With torch 2.13 (its build for
CPUs) installed, milliseconds of two runs:

                           T = 1,024       T = 2,048        T = 4,096
    forward   torch SDPA    9.2  8.7      33.7  31.7        124   111
              Softmax()    16.5 13.6      30.6  43.9        124    94
              jax.nn       29.8 26.3      97.8 102.0        441   412
    both      torch SDPA   29.9 37.6       102   105        323   365
              Softmax()    51.5 36.7       123   120        359   397
              jax.nn       86.0 79.8       424   421      1,653 1,712

so that exact attention takes 0.8 to 1.1 times torch's time at 4,096 tokens and up to
1.8 times at 1,024: XLA starts the operations of a tile one by one, and some write an
array as large as its logits, where torch's loop is one program. Landmark() took 1.9,
1.5, 1.5 and 1.5 times as long as Softmax() at 64, 256, 1024 and 4096 tokens, with
backward 1.9, 1.4, 1.7 and 1.3 times. One token against a memory of 32,768,

    python -m experiments.speed --lengths='(32768,)' --passes='("decode",)' \\
        --attentions='(Softmax(),)'

10.1 ms where torch took 19.2 and jax.nn 36. All candidates over all lengths,

    python -m experiments.speed

take 2 to 6 minutes (5:59 while other programs ran, peers other than jax.nn not
installed); RetNet(), which is Lightning's recurrence, and Aaren() are left out to keep
it short.
From so many tokens on they were faster than exact attention, which was Softmax()
(GLA and Delta before their chunks became exact to 1e-5, not timed since):

                                    forward      with backward
    a window of 257                     582                568
    Landmark()                       > 4096             > 4096
    Lightning()                       < 512              < 512
    Based(feature_dim=16)               556                851
    Flow()                            < 512              < 512
    GLA()                              3271             > 4096
    Delta(gated=True)                   547             > 4096
    RAT()                             < 512              < 512

Memories that learn, beside the gated delta rule in one run (other programs ran): at
T = 2048 Titans(depth=1) took 44 ms forward and Delta(gated=True) 127, 1.9 times as fast
(the median of the rounds' ratios), with backward 1.8 times; Titans(norm=True), an MLP
of 2 layers, took 1.7 (forward) and 1.4 times as long as it:

    python -m experiments.speed --lengths='(2048,)' --rounds=5 \\
        --base='Delta(gated=True)' \\
        --attentions='(Delta(gated=True), Titans(depth=1), Titans(norm=True))'

Where titans-pytorch is installed its memory of the same sizes takes part. At T = 256,
in two rounds beside other programs, which torch's threads may have suffered from more,

    python -m experiments.speed --lengths='(256,)' --rounds=2 \\
        --base='titans-pytorch depth=2 chunk=16' --attentions='(Titans(norm=True),)'

Titans(norm=True) was 37 times as fast forward and 132 times with backward; with its
gradients at the weights of each chunk, as ours, titans-pytorch itself was 0.2 and 0.5
times as fast as without. (T = 2048 was not run to its end.)

What chooses blocks, at 12% of the causal pairs of T = 8192 (HiP 12.1%, FlexPrefill
11.6% of the 28% that it asks for, Seer 10% and the own block, PrFlash 12.1%, S2's
shards of the past 11.4%, MoBA's blocks of each token 10.7%), forward:

    python -m experiments.speed --lengths='(8192,)' --passes='("forward",)' \\
        --rounds=5 --attentions='(Softmax(), HiP(384, 256, 32),
        FlexPrefill(capacity=6, min_budget=128, gamma=0.5), PrFlash(),
        Seer(64, 64, ratio=0.1, last_dense=False, diagonal=True), S2(64, 1, 10),
        MoBA(128, 4))'

was 2.1 (MoBA), 2.8 (HiP), 4.1 (FlexPrefill), 4.8 (S2), 5.1 (Seer) and 5.5 times
(PrFlash) as fast as Softmax(), which took 547 ms on 2 cores; and one token against
32,768 keys,

    python -m experiments.speed --lengths='(32768,)' --passes='("decode",)' \\
        --rounds=5 --attentions='(Softmax(), TopK(), HiP())'

4.4 (TopK) and 2.5 times (HiP) as fast as Softmax(), 15 and 8.8 times as jax.nn. While
other programs run small operations wait, and all of these are slower (MoBA was 0.76).

Cache policies at a quarter of 8,192 tokens, one token more and a whole prompt:

    python -m experiments.speed --lengths='(8192,)' --rounds=5 \\
        --passes='("decode", "prompt")' --attentions='(Softmax(),
        SnapKV(capacity=2048), PyramidKV(capacity=2048), AdaKV(capacity=2048),
        H2O(heavy=1024, recent=1024), TOVA(capacity=2048),
        Duo(retrieval=(0,), sinks=4, recent=252), Quest(budget=2048))'

A token took 1.84 ms with Softmax(), and 4.4 (TOVA) to 5.3 (AdaKV) times less with what
frees memory; Quest(), which gathers pages of a whole cache, 1.7 times more. A prompt
took 472 ms with Softmax() and 406 (TOVA) to 473 (AdaKV) with all but H2O, which adds up
all rows in a second pass: 2,175.

On a GPU, the shapes of the field's tables:

    python -m experiments.speed --dtype=jnp.bfloat16 --heads=16 --width=128 \\
        --lengths='(2048, 4096, 8192, 16384)' --attentions='(Softmax(),)'
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from attn.based import Based
from attn.delta import Delta
from attn.flow import Flow
from attn.gla import GLA
from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.rat import RAT
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.measure import breakeven
from experiments.measure.dtypes import checked_dtype
from experiments.measure.peers import PEER, linear_peers, memory_peers, peers
from experiments.measure.speed_table import picture, tables
from experiments.measure.timing import (
    PASSES, PROMPT, Inputs, exact, flops, inputs, limits, prepared, repeats, seconds
)
from experiments.training.runs import open_folder
from models.stack import check_layers


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed, and on what shapes."""

    attentions: tuple = option(
        (Softmax(), Softmax(mask=Causal() & Window(256)), Landmark(), Lightning(),
         Based(feature_dim=16), Flow(), GLA(), Delta(gated=True), RAT()),
        "the candidates; jax.nn is always there, other peers where installed",
    )
    lengths: tuple[int, ...] = option((512, 1024, 2048, 4096), "sequence lengths T")
    batch: int = option(1, "batch B")
    heads: int = option(4, "query heads H")
    kv_heads: int | None = option(None, "key heads K (None: H)")
    width: int = option(64, "width of a head D")
    feature_dim: int = option(
        16, "width of q and k for attentions made for narrow ones"
    )
    dtype: Any = option(jnp.float32, "of q, k and v")
    passes: tuple[str, ...] = option(
        PASSES[:2], "forward, both (forward and backward), decode, prompt")
    rounds: int = option(7, "how often each is timed")
    base: str = option(PEER, "the candidate or peer that ratios are to, by name")
    quiet: bool = option(False, "no progress bar", FREE)
    folder: str | None = option(None, "where results go; None makes a new folder", FREE)

    def __post_init__(self):
        check_layers("attentions", self.attentions)
        checked_dtype("dtype", self.dtype)
        known = *PASSES, PROMPT
        if not self.passes:
            raise ValueError(f"passes=(): expected one or more of {known}")
        if unknown := set(self.passes) - set(known):
            raise ValueError(f"passes={sorted(unknown)}: expected some of {known}")
        if not self.lengths or min(self.lengths) < 1 or self.rounds < 1:
            raise ValueError(
                f"lengths={self.lengths}, rounds={self.rounds}: expected 1 or more"
            )


TINY = Config(
    attentions=(Softmax(), Lightning()), lengths=(16, 32), rounds=2, width=8, quiet=True
)


def run(config_: Config) -> dict[str, Any]:
    """Times all -> {"LENGTH PASS NAME": ratio to `base`}, {"break-even PASS NAME":
    tokens} and the folder."""
    folder = open_folder(
        "speed", config_.folder, config.command(config_), config.settings(config_)
    )
    console = Console(stderr=True)
    rates = limits(config_.dtype)
    rows = []
    jobs = [(t, p) for t in config_.lengths for p in config_.passes]
    absent: dict[str, str] = {}
    for t, which in track(jobs, "timing", disable=config_.quiet, console=console):
        rows += measure(config_, t, which, rates, absent)
    for name, why in absent.items():
        console.print(f"left out: {name}: {why}", highlight=False)
    device, crossed = jax.devices()[0], breakeven.break_even(rows)
    found = {
        "command": config.command(config_), "jax": jax.__version__,
        "device": device.device_kind, "dtype": jnp.dtype(config_.dtype).name,
        "matmul_flops": rates[0], "copy_bytes": rates[1], "absent": absent,
        "rows": rows, "break_even": crossed,
    }
    (folder / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(found, folder / "speed.png")
    Console().print(*tables(rows, config_.base), f"{device.device_kind}, jax "
                    f"{jax.__version__}; limits: matrix product {rates[0] / 1e12:.3g} "
                    f"TFLOP/s, copy {rates[1] / 1e9:.4g} GB/s", highlight=False)
    if crossed:
        Console().print(breakeven.table(crossed))
    numbers: dict[str, Any] = {
        f"{r['length']} {r['pass']} {r['name']}": r["ratio"] for r in rows
        if r["name"] != config_.base
    }
    for one in crossed:
        numbers[f"break-even {one['pass']} {one['name']}"] = one["length"]
    return numbers | {"folder": str(folder)}


def measure(config_: Config, t: int, which: str, rates: tuple[float, float],
            absent: dict[str, str]) -> list[dict[str, Any]]:
    """One row a candidate: median milliseconds and ratio to `base`, and shares of the
    `rates`; a peer that refuses goes into `absent` with its reason."""
    calls: dict[str, Callable] = {}
    works: dict[str, float | None] = {}
    makers = _makers(config_, which)
    for name, one in makers.items():
        x = _inputs(config_, one.subject, t)
        try:
            calls[name] = one.make(x.last if which == "decode" else x)
        except Exception as error:  # a peer's refusal may be of any kind
            if not one.peer:
                raise
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            absent.setdefault(name, text[:160])
            continue
        works[name] = flops(x.last if which == "decode" else x, which) \
            if one.exact else None
    if config_.base not in calls:
        raise ValueError(
            f"base={config_.base!r}: expected one of {', '.join(map(repr, calls))}")
    times = {name: repeats(call) for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(config_.rounds):
        for name, call in calls.items():
            spent[name].append(seconds(call, times[name]))
    base = np.asarray(spent[config_.base])
    rows = []
    for name, each in spent.items():
        median = float(np.median(each))
        row = {"length": t, "pass": which, "name": name, "ms": median * 1000,
               "ratio": float(np.median(base / np.asarray(each))),
               "exact": makers[name].exact}
        work = works[name]
        if which != "decode" and work is not None:
            row["share"] = work / median / rates[0]
        elif moved := getattr(calls[name], "moved", None):
            # bytes are read once; a copy reads and writes
            row["share"] = moved / median / rates[1]
        rows.append(row)
    return rows


class Maker(NamedTuple):
    """What prepares a candidate's call; subject: the attention, None for a peer; exact:
    whether it computes causal softmax attention."""

    make: Callable[[Inputs], Callable]
    subject: Any
    peer: bool
    exact: bool


def _makers(config_: Config, which: str) -> dict[str, Maker]:
    """All candidates of a pass by name, jax.nn first."""
    found = {name: Maker(make, None, name != PEER, True)
             for name, make in peers(which).items()}
    more = memory_peers(which, config_.attentions)
    # beside exact attention alone recurrences say nothing
    if not all(map(exact, config_.attentions)):
        more = linear_peers(which) | more
    for name, make in more.items():
        found[name] = Maker(make, None, True, False)
    for attention in config_.attentions:
        make = functools.partial(prepared, attention, which=which)
        found[config.format_value(attention)] = Maker(
            make, attention, False, exact(attention))
    return found


def _inputs(config_: Config, subject: Any, t: int) -> Inputs:
    """What a candidate is given: narrow q and k for attentions made for such."""
    narrow = getattr(subject, "feature_dim", None) is not None
    d = config_.feature_dim if narrow else config_.width
    heads = config_.heads
    return inputs(config_.batch, t, heads, config_.kv_heads or heads, d, config_.width,
                  config_.dtype)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
