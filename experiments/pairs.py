"""Pairs: which selections, storages and readings of a cache go together.

`Compose(selection=..., storage=..., reading=...)` (`attn/compose.py`) makes one policy
of three parts. This prints what every pair does, on random keys: the bytes of its
memory beside those of exact attention, and how far the outputs of the tokens behind the
prompt are from those of the pair's first part alone, which is what the second one adds;
or, where two do not go together, why, in the words of the class that cannot.

    python -m experiments.pairs

takes a minute of computing. There are 20 of 66 pairs that go together; codes of 4 bits
add 7% to 11%, and take 0.13 to 0.27 of the bytes. Random keys have no structure: this
says that parts are joined as they should be, not how good a policy is, which is what
`experiments.budget` asks of a model.
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
    a quarter, readings read an eighth of the whole."""
    keep, few = length // 4, length // 8
    return {
        "selection": {
            "SnapKV": SnapKV(capacity=keep, window=4),
            "PyramidKV": PyramidKV(capacity=keep, window=4),
            "AdaKV": AdaKV(capacity=keep, window=4),
            "H2O": H2O(heavy=keep // 2, recent=keep // 2),
            "TOVA": TOVA(capacity=keep),
            "Streaming": Streaming(window=keep - 2, sinks=2),
            "Razor": Razor(buffer=keep // 2, share=0.0, sinks=2),
            "Duo": Duo(recent=keep // 2, sinks=2),
        },
        "storage": {
            "KIVI": KIVI(bits=4, group=8, residual=8),
            "SAQ": SAQ(bits=(8, 4), tokens=8, group=8),
        },
        "reading": {
            "Quest": Quest(page=4, budget=few),
            "TopK": TopK(top_k=max(few // 8, 1), block=4, sink=2, local=few // 2),
            "Recycled": Recycled(capacity=keep),
            "Retrieval": Retrieval(recent=keep // 2, top_k=keep // 2, index="flat",
                                   sinks=2),
            "ActQKV": ActQKV(window=16, local=keep // 2, block=4, top_k=keep // 8,
                             sinks=2),
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
        tokens, alone = drawn(config_), {}
        for names, fields in track(there.items(), "pairs", disable=config_.quiet):
            if names[0] not in alone:
                place = next(iter(fields))
                alone[names[0]] = behind(
                    Compose(**{place: fields[place]}), tokens, config_.length)[0]
            o, share = behind(Compose(**fields), tokens, config_.length)
            first = alone[names[0]]
            error = float(jnp.linalg.norm(o - first) / jnp.linalg.norm(first))
            found[" ".join(names)], found[" ".join((*names, "bytes"))] = error, share
            shown[names] = f"{error:.1%} ({share:.0%})"
    if not config_.quiet:
        for left, right in itertools.combinations(PARTS, 2):
            Console().print(table(config_.length, left, right, every, shown))
        for (who, why), others in reasons(every).items():
            Console().print(f"{who} with {', '.join(others)}: {why}", highlight=False)
    return found


def drawn(config_: Config) -> tuple[jax.Array, ...]:
    """q [1,T,4,16], with which weights are uneven, k and v [1,T,2,16], normal."""
    keys = jax.random.split(jax.random.key(0), 3)
    t = config_.length + config_.more
    q, k, v = (jax.random.normal(key, (1, t, n, 16)) for key, n in zip(
        keys, (4, 2, 2)))
    return 4 * q, k, v


def reasons(every: dict) -> dict[tuple[str, str], list[str]]:
    """{(class, why it does not go with some): these}."""
    found: dict[tuple[str, str], list[str]] = {}
    for why in dict.fromkeys(why for _, why in every.values() if why):
        pair, _, reason = why.partition(": ")
        who, _, other = pair.partition(" with ")
        found.setdefault((who, reason), []).append(other)
    return found


def behind(policy: Any, tokens: tuple, length: int) -> tuple[jax.Array, float]:
    """(outputs of the tokens behind the prompt, bytes beside exact attention's)."""
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
    return jnp.concatenate(outs, 1), held / full


def table(length: int, left: str, right: str, every: dict, shown: dict) -> Table:
    """One place against another for the terminal."""
    own = parts(length)
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False,
                  title=f"{left} x {right}: what {right} adds (bytes)")
    found.add_column(left)
    for name in own[right]:
        found.add_column(name, justify="right")
    for a in own[left]:
        found.add_row(a, *(
            "no" if every[a, b][1] else shown.get((a, b), "yes") for b in own[right]))
    return found


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
