"""Less: networks of exact attention whose attention is replaced by one that reads less,
and how they are judged.

A network comes from a training, or from a folder (`given`): then it is judged by its
own text, facts and keys, in rows of one length.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from attn.layers import Layer
from experiments.data import Corpus
from experiments.data.dataset import Batch
from experiments.measure import asked, budgets
from experiments.measure.budgets import Budget
from experiments.measure.head_choice import everywhere
from experiments.measure.reading import Loaded, check_asked, reader_of

OTHERS = 2**20  # the seeds of what gates learn from, beside those of what is judged
WORDS = 2**20  # letters of text that gates learn from


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with exact attention, and how it is judged.

    train, valid: its data; score(model, params) -> its number, where one with the same
    layers stands in its place.
    """

    model: nn.Module
    params: Any
    train: Any
    valid: Any
    score: Callable[[Any, Any], float]

    def budget(self, share: float, length: int, block: int) -> Budget:
        """A share of the pairs of a row, for heads of this network."""
        model: Any = self.model
        width = model.head_dim or model.width // model.heads
        return Budget(share, length, block, width, model.position)

    def with_attention(self, attention: Any) -> nn.Module:
        """The network with another attention in the place of the exact one."""
        layers = tuple(a if isinstance(a, Layer) else attention
                       for a in self.model.attention)
        return self.model.clone(attention=layers)


class Given(Network):
    """A network that was loaded."""

    def with_attention(self, attention: Any) -> nn.Module:
        """The network with another attention where the exact one sees everything.
        ValueError for an attention that has no place for what these have."""
        if isinstance(getattr(attention, "rope", None), tuple):
            raise ValueError("layers differ in their positions: expected one for all")
        if getattr(self.model, "sinks", False) and "sink" not in inspect.signature(
                type(attention).__call__).parameters:
            raise ValueError(f"the model has sinks, and {type(attention).__name__} "
                             "takes none")
        return everywhere(self.model, attention)


def learned(network: Network, model: nn.Module, steps: int, batch: int, seed: int
            ) -> dict:
    """Parameters of gates that have learned what a network looks at, by path: nothing
    else is changed."""
    tokens = jnp.asarray(network.train.batch(0, batch)["tokens"])
    drawn = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
    old = traverse_util.flatten_dict(network.params["params"])
    gates = {path: a for path, a in traverse_util.flatten_dict(drawn).items()
             if path not in old}
    adam = optax.adam(3e-3)
    step = _gate_step(model, adam)
    state = adam.init(gates)
    for n in range(steps):
        tokens = jnp.asarray(network.train.batch(n, batch)["tokens"])
        gates, state = step(gates, state, old, tokens)
    return gates


def joined(params: Any, gates: dict) -> Any:
    """Parameters with those of gates among them."""
    own = traverse_util.flatten_dict(params["params"]) | gates
    return {"params": traverse_util.unflatten_dict(own)}


def _gate_step(model: nn.Module, adam: optax.GradientTransformation):
    def loss(gates, rest, tokens):
        params = {"params": traverse_util.unflatten_dict(rest | gates)}
        _, kept = model.apply(params, tokens, mutable=["gate"])
        # the authors' factor (their train.py), beside which Adam's epsilon is small
        return 10 * sum(jax.tree.leaves(kept["gate"]))

    @jax.jit
    def step(gates, state, rest, tokens):
        grads = jax.grad(loss)(gates, rest, tokens)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(gates, updates), state

    return step


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Rows of one kind, [T + 1] ids each: batch n has those of numbers n B to n B + B.
    """

    make: Callable[[int], asked.Row]

    def batch(self, step: int, size: int) -> Batch:
        """tokens [B,T], and targets [B,T], -1 where nothing is asked."""
        rows = [self.make(step * size + n) for n in range(size)]
        ids, told = (np.stack(part) for part in zip(*rows))
        return {"tokens": ids[:, :-1],
                "targets": np.where(told[:, 1:], ids[:, 1:], -1)}


@dataclasses.dataclass(frozen=True)
class InTurn:
    """Batches of several kinds in turn."""

    kinds: tuple[Drawn, ...]

    def batch(self, step: int, size: int) -> Batch:
        """That of the kind whose turn it is."""
        many = len(self.kinds)
        return self.kinds[step % many].batch(step // many, size)


def given(name: str, found: Loaded, text: Corpus, length: int, facts: int, rows: int,
          batch: int, seed: int) -> dict[str, Network]:
    """A model of that name, by what it is asked: needles, recall (`measure.asked`) and
    bits of text. Gates learn from text of the train split and other questions, all in
    turn. ValueError for one that has no words or no exact attention."""
    check_asked(name, found)
    if found.limit is not None and length > found.limit:
        raise ValueError(f"length={length}: expected at most {found.limit}, what the "
                         "model was made for")
    # a row has a token more than is read, of which it is the last target
    reader, _ = reader_of(found, ("needles",), text, length + 1, seed)
    words = "\n".join(text.parts["train"])[:WORDS]
    train = dataclasses.replace(
        reader, seed=seed + OTHERS, hay=np.asarray(asked.plain(found.text, words)))

    def kinds(reader: asked.Reader) -> dict[str, Drawn]:
        return {"needles": Drawn(functools.partial(asked.needles, reader, facts)),
                "recall": Drawn(lambda n: asked.recall(reader, facts, n, length + 1)),
                "bits": Drawn(functools.partial(_running, reader))}

    for one in kinds(reader).values():
        one.batch(0, 1)  # ValueError where a row has no room for what is asked
    learn = InTurn(tuple(kinds(train).values()))
    judge: dict[str, Callable[..., float]] = {
        "needles": answered, "recall": answered,
        "bits": functools.partial(bits, text=found.text)}
    return {task: Given(found.model, found.params, learn, own, functools.partial(
        judge[task], own.batch(0, rows), batch)) for task, own in kinds(reader).items()}


def _running(reader: asked.Reader, trial: int) -> asked.Row:
    """A row of text, all of which is asked."""
    room = reader.length - len(reader.start)
    ids = np.concatenate([reader.start, reader.piece(reader.rng(5, trial), room)])
    return asked.Row(ids.astype(np.int32), np.arange(len(ids)) >= len(reader.start))


def answered(rows: Batch, batch: int, model: Any, params: Any) -> float:
    """The share of answers of which all tokens are the likeliest."""
    hits, _ = _judged(rows, batch, model, params)
    counts = np.sum([asked.counted(good, targets >= 0)
                     for good, targets in zip(hits, rows["targets"])], 0)
    return float(counts[0] / counts[1])


def bits(rows: Batch, batch: int, model: Any, params: Any, text: Any) -> float:
    """Bits per byte of what is asked."""
    _, nats = _judged(rows, batch, model, params)
    size = sum(len(text.decode(own[own >= 0].tolist()).encode())
               for own in rows["targets"])
    return float(nats.sum() / math.log(2) / size)


def _judged(rows: Batch, batch: int, model: Any, params: Any):
    """Whether the likeliest token is the target [N,T], and nats [N]."""
    found, size = [], len(rows["tokens"])
    for at in asked.batches(size, batch):
        found.append([np.asarray(a) for a in _of_batch(
            budgets.as_read(model), params, rows["tokens"][at], rows["targets"][at])])
    return (np.concatenate(part)[:size] for part in zip(*found))


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(model, params, tokens, targets):
    logits = jax.nn.log_softmax(model.apply(params, tokens))
    own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], 2)[..., 0]
    return logits.argmax(-1) == targets, -jnp.where(targets >= 0, own, 0).sum(1)
