"""A task of CAB: data, a network, what is learned, and what it is judged by."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np

from attn.contract.attention import said
from experiments.training.plan import TrainConfig
from models.places import Places

WIDTH, HEADS, LAYERS = 64, 4, 2


@dataclasses.dataclass(frozen=True)
class Task:
    """A task. patterns: where an attention can stand. measures: name -> whether more is
    better (1) or less (-1). data: rows of training and, with split "valid", of the
    test. steps, batch, rate: of the training, on `rows` rows. tests: rows of the test.
    """

    data: Any  # a Dataset
    steps: int = 300
    batch: int = 8
    rate: float = 2e-3
    rows: int = 512
    tests: int = 16
    name: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]
    measures: ClassVar[dict[str, int]]
    inputs: ClassVar[tuple[str, ...]]
    writes: ClassVar[bool] = False  # one token or frame after the other

    def plan(self, seed: int) -> TrainConfig:
        """The training: AdamW without decay."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, learning_rate=self.rate, seed=seed,
            warmup=self.steps // 10, weight_decay=0.0)

    def drawn(self, split: str, seed: int) -> dict[str, np.ndarray]:
        """The rows of a split."""
        data = dataclasses.replace(self.data, split=split, seed=seed)
        return data.batch(0, self.rows if split == "train" else self.tests)

    def network(self, places: Places) -> nn.Module:
        """The network with attentions at their places."""
        raise NotImplementedError

    @staticmethod
    def loss(model, params, batch: dict, key) -> jax.Array:
        """What the training makes small."""
        raise NotImplementedError

    def judged(self, model, params, rows: dict, key) -> dict[str, float]:
        """The measures on rows of the test."""
        raise NotImplementedError

    def check(self, attention: Any) -> None:
        """ValueError for an attention that cannot be judged here."""
        if self.writes and said(attention, "ahead") != 0:
            raise ValueError(
                f"{self.name}: {type(attention).__name__} chooses what it reads by "
                "later tokens, which are not written yet: expected ahead=0")


@functools.cache
def called(model: nn.Module) -> Any:
    """model.apply, compiled."""
    return jax.jit(model.apply)


@functools.cache
def lossed(loss: Any, model: nn.Module) -> Any:
    """loss(model, params, batch, key), compiled."""
    return jax.jit(functools.partial(loss, model))
