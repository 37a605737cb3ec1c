"""How fast a checkpoint writes: tokens a second beside the reference implementation.

Both read the same prompt and write the same number of tokens, greedily, in float32, in
turns: what disturbs the machine disturbs both. The reference is transformers on torch
(`pip install -e '.[peers]'`), which reads the folder itself; where it is not installed,
it is named and left out. The share of tokens that both wrote alike is printed with it.

    python -m experiments.decoding                        # the model that ships
    python -m experiments.decoding --model=FOLDER --prompt=512
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.sources import SHIPPED, folder_of
from models.checkpoint import load
from models.checkpoint.tokenizer import longest
from models.generate import generate

REFERENCE = "transformers"


@dataclasses.dataclass(frozen=True)
class Config:
    """Who writes, and how much."""

    model: str = option(SHIPPED, "folder, name on the hub, or small")
    prompt: int = option(128, "tokens of a prompt, drawn at random", least=1)
    length: int = option(128, "tokens that are written", least=1)
    batch: int = option(1, "prompts at once", least=1)
    rounds: int = option(5, "times that each one writes", least=1)
    seed: int = option(0, "of the prompts")
    quiet: bool = option(False, "no progress bar", FREE)


TINY = Config(prompt=4, length=2, rounds=1, quiet=True)


def ours(config_: Config, model: Any, params: Any, ids: np.ndarray
         ) -> Callable[[], np.ndarray]:
    """What writes `length` tokens behind ids [B,T] with this library: [B,length]."""
    # to float32 once, not in each step
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params)

    def write() -> np.ndarray:
        return np.asarray(generate(model, params, ids, length=config_.length))

    return write


def theirs(config_: Config, ids: np.ndarray) -> Callable[[], np.ndarray] | None:
    """The same of the reference; None where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in (REFERENCE, "torch")):
        return None
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder_of(config_.model), dtype=torch.float32).eval()
    tokens = torch.from_numpy(ids.astype(np.int64))

    def write() -> np.ndarray:
        with torch.inference_mode():
            found = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                max_new_tokens=config_.length, min_new_tokens=config_.length,
                eos_token_id=None, pad_token_id=0)
        return found[:, ids.shape[1]:].numpy()

    return write


def run(config_: Config) -> dict[str, Any]:
    """Writes in turns -> tokens a second of each, and the ratio."""
    model, params = load(folder_of(config_.model), dtype=jnp.float32)
    most = longest(model)
    if most is not None and config_.prompt + config_.length > most:
        raise ValueError(f"prompt={config_.prompt} and length={config_.length}: "
                         f"expected at most {most} tokens together")
    rng = np.random.default_rng(config_.seed)
    ids = rng.integers(model.vocab, size=(config_.batch, config_.prompt),
                       dtype=np.int32)
    writers = {"attn": ours(config_, model, params, ids)}
    if (other := theirs(config_, ids)) is not None:
        writers[REFERENCE] = other
    written = {name: write() for name, write in writers.items()}  # compiles
    spent: dict[str, list[float]] = {name: [] for name in writers}
    for _ in track(range(config_.rounds), "decoding", disable=config_.quiet):
        for name, write in writers.items():
            clock = time.perf_counter()
            write()
            spent[name].append(time.perf_counter() - clock)
    tokens = config_.batch * config_.length
    found: dict[str, Any] = {
        f"{name} tokens_per_second": tokens / statistics.median(each)
        for name, each in spent.items()}
    if other is None:
        return found | {f"{REFERENCE} left out": "not installed: pip install -e "
                        "'.[peers]'"}
    # of rounds, each of which is a pair
    ratio = [b / a for a, b in zip(spent["attn"], spent[REFERENCE])]
    same = (written["attn"] == written[REFERENCE]).mean()
    return found | {"ratio": statistics.median(ratio), "tokens alike": float(same)}


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
