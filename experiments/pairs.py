"""Pairs: which selections, storages and readings of a cache go together.

`Compose(selection=..., storage=..., reading=...)` (`attn/compose.py`) makes one policy
of three parts. This prints what every pair does, on normal random keys: the bytes of
its memory beside those of exact attention, and how far the outputs of the tokens behind
the prompt are from exact ones; or, where two do not go together, why, in the words of
the class that cannot.

    python -m experiments.pairs

takes two minutes on 2 cores. Random keys have no structure that a selection could use:
errors say that parts are joined as they should be (a reading that covers what is kept
adds nothing to a selection's error, codes add theirs), not how good a policy is, which
is what `experiments.budget` asks of a model.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attn.actqkv import ActQKV
from attn.adakv import AdaKV
from attn.compose import PARTS, Compose, refused
from attn.duo import Duo
from attn.h2o import H2O
from attn.kivi import KIVI
from attn.pyramidkv import PyramidKV
from attn.quest import Quest
from attn.razor import Razor
from attn.recycled import Recycled
from attn.retrieval import Retrieval
from attn.saq import SAQ
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from attn.streaming import Streaming
from attn.topk import TopK
from attn.tova import TOVA
from experiments.cli import config
from experiments.cli.config import FREE, option


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of the prompt, and whether pairs are run."""

    length: int = option(256, "tokens of the prompt", least=32)
    more: int = option(4, "tokens behind it, one by one")
    measure: bool = option(True, "run each pair; if not, only say which there are")
    quiet: bool = option(False, "no progress bar and no tables", FREE)


TINY = Config(length=32, measure=False, quiet=True)


def parts(length: int) -> dict[str, dict[str, Any]]:
    """The parts by place and name, set for a prompt of so many tokens: selections keep
    a quarter, readings read a quarter of the whole."""
    keep, few = length // 4, {"sinks": 2}
    return {
        "selection": {
            "SnapKV": SnapKV(capacity=keep, window=4),
            "PyramidKV": PyramidKV(capacity=keep, window=4),
            "AdaKV": AdaKV(capacity=keep, window=4),
            "H2O": H2O(heavy=keep // 2, recent=keep // 2),
            "TOVA": TOVA(capacity=keep),
            "Streaming": Streaming(window=keep - 2, **few),
            "Razor": Razor(buffer=keep // 2, share=0.0, **few),
            "Duo": Duo(recent=keep // 2, **few),
        },
        "storage": {
            "KIVI": KIVI(bits=4, group=8, residual=8),
            "SAQ": SAQ(bits=(8, 4), tokens=8, group=8),
        },
        "reading": {
            "Quest": Quest(page=4, budget=keep),
            "TopK": TopK(top_k=keep // 8, block=4, sink=2, local=keep // 4),
            "Recycled": Recycled(capacity=keep),
            "Retrieval": Retrieval(recent=keep // 2, top_k=keep // 2, index="flat",
                                   **few),
            "ActQKV": ActQKV(window=16, local=keep // 2, block=4, top_k=keep // 8,
                             **few),
        },
    }


def pairs(length: int) -> dict[tuple[str, str], tuple[dict[str, Any], str | None]]:
    """(fields of `Compose`, why it is refused or None) of every two parts of different
    places, by their names."""
    found = {}
    for left, right in itertools.combinations(PARTS, 2):
        own = parts(length)
        for (a, x), (b, y) in itertools.product(own[left].items(), own[right].items()):
            fields = {left: x, right: y}
            found[a, b] = fields, refused(**fields)
    return found


def run(config_: Config) -> dict[str, Any]:
    """All pairs -> plain numbers: how many go together, and of each its error and its
    share of the bytes."""
    every = pairs(config_.length)
    there = {names: fields for names, (fields, why) in every.items() if why is None}
    found: dict[str, Any] = {"pairs": len(every), "together": len(there)}
    shown: dict[tuple[str, str], str] = {}
    if config_.measure:
        tokens = drawn(config_)
        want = jax.jit(Softmax())(*tokens)[:, config_.length:]
        for names, fields in track(there.items(), "pairs", disable=config_.quiet):
            error, share = measured(Compose(**fields), tokens, want, config_.length)
            found[" ".join(names)], found[" ".join((*names, "bytes"))] = error, share
            shown[names] = f"{error:.1%} ({share:.0%})"
    if not config_.quiet:
        for left, right in itertools.combinations(PARTS, 2):
            Console().print(table(config_.length, left, right, every, shown))
        for why in dict.fromkeys(why for _, why in every.values() if why):
            Console().print(why, highlight=False)
    return found


def drawn(config_: Config) -> tuple[jax.Array, ...]:
    """q [1,T,4,16], k and v [1,T,2,16], normal."""
    keys = jax.random.split(jax.random.key(0), 3)
    t = config_.length + config_.more
    return tuple(jax.random.normal(key, (1, t, n, 16)) for key, n in zip(
        keys, (4, 2, 2)))


def measured(policy: Any, tokens: tuple, want: jax.Array, length: int) -> tuple:
    """(|o - exact| / |exact| of the tokens behind the prompt, bytes beside exact)."""
    prompt = tuple(a[:, :length] for a in tokens)
    size = tokens[0].shape[1]
    state = policy.init_state(size, *prompt)
    step, outs = jax.jit(policy.step), []
    held = sum(a.nbytes for a in jax.tree.leaves(state))
    full = sum(a.nbytes for a in jax.tree.leaves(Softmax().init_state(size, *prompt)))
    state, _ = step(state, *prompt)
    for n in range(length, size):
        state, o = step(state, *(a[:, n:n + 1] for a in tokens))
        outs.append(o)
    gap = jnp.linalg.norm(jnp.concatenate(outs, 1) - want) / jnp.linalg.norm(want)
    return float(gap), held / full


def table(length: int, left: str, right: str, every: dict, shown: dict) -> Table:
    """One place against another for the terminal."""
    own = parts(length)
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False,
                  title=f"{left} x {right}: error of the next tokens (bytes)")
    found.add_column(left)
    for name in own[right]:
        found.add_column(name, justify="right")
    for a in own[left]:
        found.add_row(a, *(
            "no" if every[a, b][1] else shown.get((a, b), "yes") for b in own[right]))
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
