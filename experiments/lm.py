"""A language model of any attentions: trained on text, bits per byte, samples.

The text is by default the source of the running Python's standard library, which every
machine has; `--text='Text(path="folder")'` takes files of your own and
`--text='HuggingFace(name="wikitext", subset="wikitext-2-raw-v1")'` a data set.

    python -m experiments.lm --attention='(Lightning(),) * 3 + (Softmax(),)' --steps=200

takes 50 seconds on 2 cores and ends at 3.34 bits per byte; a uniform guess is 8. With
`--mesh='(1, 4, 2)'` it runs on eight devices, and `experiments.distributed` runs it on
many hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import FREE, GROWS, STEPS, option
from experiments.data import Corpus, Text
from experiments.measure import seeds
from experiments.measure.dtypes import checked_dtype
from experiments.training.loop import TrainResult, TrainConfig, check, evaluate, fit
from experiments.training.mesh import whole
from experiments.training.runs import open_folder
from models.generate import LARGEST, Sampling, check_stream, generate, stream
from models.lm import LM, loss, state_bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """One network on one text."""

    attention: tuple = option((Softmax(),) * 4, "one entry per layer")
    text: Corpus = option(Text(length=256), "where the text comes from, and its rows")
    width: int = option(128, "model width E")
    heads: int = option(4, "heads H")
    kv_heads: int | None = option(None, "key heads K (None: H)")
    steps: int = option(
        200, "training steps; an old run may get more", GROWS, most=STEPS
    )
    batch: int = option(8, "rows a step")
    rate: float = option(3e-3, "peak learning rate", above=0)
    accumulate: int = option(1, "parts of a batch, one after the other")
    remat: bool = option(False, "compute layers again in the backward pass")
    dtype: Any = option(jnp.float32, "of the computation; parameters are float32")
    mesh: tuple[int, int, int] = option(
        (1, 1, 1), "devices along data, seq and model", FREE
    )
    fsdp: bool = option(
        True, "split parameters over all devices, not over model alone", FREE
    )
    seed: int = option(
        0, "of data (added to the text's own), parameters and sampling"
    )
    seeds: int = option(1, "networks trained, with seeds one after the other", FREE)
    prompt: str = option("def ", "what the sample begins with", FREE)
    sample: int = option(120, "tokens of the sample", FREE, 0, most=LARGEST)
    temperature: float = option(
        0.7, "of the sample; 0 takes the likeliest token", FREE
    )
    decode: int = option(
        64, "tokens over which decoding is timed", FREE, most=LARGEST
    )
    save_every: float | None = option(
        None, "minutes between checkpoints (None: by steps alone)", FREE
    )
    quiet: bool = option(False, "no progress bar", FREE)
    folder: str | None = option(
        None, "folder of the run; an old one goes on (None: new)", FREE
    )

    def __post_init__(self):
        seeds.check(self)
        Sampling(self.temperature).checked()
        if self.sample and not self.prompt:
            raise ValueError("prompt='': expected a text that a sample can begin with, "
                             "or sample=0")
        checked_dtype("dtype", self.dtype)

    @property
    def data(self) -> Corpus:
        """The text, drawn from with the seed of the run."""
        return dataclasses.replace(self.text, seed=self.text.seed + self.seed)

    def model(self) -> LM:
        """The network."""
        return LM(
            vocab=self.text.vocab, width=self.width, heads=self.heads,
            kv_heads=self.kv_heads, attention=self.attention, remat=self.remat,
            scan=len(self.attention) > 8, dtype=self.dtype,
        )

    def plan(self) -> TrainConfig:
        """The training."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate,
            warmup=self.steps // 10, accumulate=self.accumulate, seed=self.seed,
            mesh=self.mesh, fsdp=self.fsdp, save_minutes=self.save_every,
        )


TINY = Config(
    attention=(Softmax(),), text=Text(length=32), width=16, heads=2, steps=2, batch=2,
    sample=4, decode=2, quiet=True,
)


def run(config_: Config) -> dict[str, Any]:
    """Trains, evaluates and samples -> plain numbers, see `scores`; of several seeds
    their medians, with the least and the greatest."""
    # what cannot be read, split or streamed ends here, without a folder
    check(config_.model(), config_.plan(), config_.data)
    check_stream(config_.model(), config_.text.length)
    return seeds.repeated(config_, once, "lm", ("bits_per_byte",))


def once(config_: Config) -> dict[str, Any]:
    """The same with one seed."""
    folder = open_folder("lm", config_.folder, config.command(config_),
                         config.settings(config_))
    fitted = trained(config_, folder)
    model = config_.model()
    found = scores(config_, model, fitted)
    params = whole(fitted.params)
    if config_.sample:
        prompt = config_.text.encode(config_.prompt).tolist()
        new = generate(
            model, params, [prompt], length=config_.sample,
            temperature=config_.temperature, seed=config_.seed,
        )[0]
        found["sample"] = config_.prompt + config_.text.decode(np.asarray(new))
    return found | {"folder": str(folder)}


def trained(config_: Config, folder=None) -> TrainResult:
    """The training alone."""
    return fit(config_.model(), config_.data, config_.plan(), folder,
               label="text", quiet=config_.quiet)


def scores(config_: Config, model: LM, fitted: TrainResult) -> dict[str, Any]:
    """bits_per_byte and accuracy on held-out text, training tokens_per_second,
    decode_ms per token after a row of text, state_bytes of a row, parameters; falling,
    whether the loss still fell at the end of training."""
    held_out = dataclasses.replace(config_.data, split="valid")
    found = evaluate(
        model, fitted.params, held_out, 8, config_.batch, mesh=config_.mesh
    )
    row = held_out.batch(0, 1)["tokens"]
    return {
        "bits_per_byte": found["loss"] / math.log(2) / held_out.bytes_per_token,
        "accuracy": found["accuracy"],
        "tokens_per_second": fitted.tokens_per_second,
        "decode_ms": decode_ms(model, whole(fitted.params), row, config_.decode),
        "state_bytes": state_bytes(model, config_.text.length),
        "parameters": sum(a.size for a in jax.tree.leaves(fitted.params)),
        "falling": seeds.falling(fitted.rows),
    }


def streamed_bits(config_: Config, model: LM, fitted: TrainResult) -> float:
    """Bits per byte of the second half of held-out rows, which comes token by token
    after the first half was read in one piece: what a small memory really costs."""
    held_out = dataclasses.replace(config_.data, split="valid")
    half = config_.text.length // 2
    nats = count = 0.0
    params = whole(fitted.params)
    for step in range(4):
        batch = held_out.batch(step, config_.batch)
        logits = stream(model, params, batch["tokens"], half)
        found = loss(logits[:, half:], jnp.asarray(batch["targets"])[:, half:])
        nats, count = nats + float(found[0]), count + float(found[1])
    return nats / count / math.log(2) / held_out.bytes_per_token


def decode_ms(model: LM, params: Any, prompt: np.ndarray, tokens: int) -> float:
    """Milliseconds for one more token, greedily, after prompt [B,T]: the median of five
    runs of `tokens` tokens, compilation left out."""
    text = jnp.asarray(prompt)
    state = model.init_state(text.shape[1] + tokens, text)
    state, logits = jax.jit(model.apply)(params, text, state)
    first = logits[:, -1].argmax(-1)
    spent = []
    for _ in range(6):
        clock = time.perf_counter()
        _decode(model, params, state, first, tokens).block_until_ready()
        spent.append((time.perf_counter() - clock) * 1000 / tokens)
    return float(np.median(spent[1:]))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(model, params, state, token, length):
    def step(carry, _):
        state, token = carry
        state, logits = model.apply(params, token[:, None], state)
        return (state, logits[:, 0].argmax(-1)), token

    return jax.lax.scan(step, (state, token), None, length)[1]


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
