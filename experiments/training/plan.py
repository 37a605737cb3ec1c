"""Plan: how to train, and with which optimiser."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW with linear warm-up and cosine decay, gradients clipped.

    learning_rate: at its peak; it ends at `final_scale` times that. warmup: steps
    before the peak; the first of n takes 1/(n + 1) of it. accumulate: a batch is split
    in so many parts, whose gradients are added up. weight_decay: on the matrices that
    `decays` names. clip: the largest norm of all gradients together. log, save: steps
    between rows of metrics, and between checkpoints; save_minutes: a checkpoint after
    so many minutes too, at the next row. mesh: devices along data, seq and model. fsdp:
    parameters and moments are split over all devices and gathered where they are used,
    which moves at most half as much again as adding up gradients does; without it only
    `model` splits them.
    """

    steps: int = 500
    batch: int = 16
    learning_rate: float = 3e-3
    warmup: int = 50
    final_scale: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    log: int = 10
    save: int = 100
    save_minutes: float | None = None
    mesh: tuple[int, int, int] = (1, 1, 1)
    fsdp: bool = True

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log", "save"):
            value = self._whole(name)
            if not 1 <= value < 2**31:
                raise ValueError(f"{name}={value}: expected 1 or more, less than 2^31")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: expected to divide batch={self.batch}"
            )
        if self._whole("warmup") < 0:
            raise ValueError(f"warmup={self.warmup}: expected 0 or more")
        if not -(2**63) <= self._whole("seed") < 2**63:
            raise ValueError(f"seed={self.seed}: expected an integer of 64 bits")
        for name in ("learning_rate", "clip", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: expected a finite number above 0")
        for name in ("weight_decay", "final_scale"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: expected a finite number, 0 or more")
        if len(self.mesh) != 3 or not 1 <= min(self.mesh) <= max(self.mesh) < 2**31:
            raise ValueError(f"mesh={self.mesh}: expected sizes of data, seq, model")

    def _whole(self, name: str) -> int:
        value = getattr(self, name)
        try:
            return operator.index(value)
        except TypeError:
            raise ValueError(f"{name}={value}: expected a whole number") from None

    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of this plan."""
        warmup = min(self.warmup, self.steps // 2)
        schedule = optax.warmup_cosine_decay_schedule(
            self.learning_rate / (warmup + 1), self.learning_rate, warmup, self.steps,
            self.learning_rate * self.final_scale
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                schedule, b2=0.95, weight_decay=self.weight_decay, mask=decays
            ),
        )


@dataclasses.dataclass(frozen=True)
class Faster(TrainConfig):
    """The same, in which parameters whose last word is one of `names` learn `times` as
    fast as the others."""

    names: tuple[str, ...] = ()
    times: float = 1.0

    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of this plan."""
        def scaled(path, a):
            return self.times * a if getattr(path[-1], "key", None) in self.names else a

        return optax.chain(super().optimizer(), optax.stateless(
            lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)))


# what decays, by the last word of a parameter's path: kernels of dense layers and of
# convolutions over pictures, embeddings of tokens (the head too) and, as in BERT and
# nanoGPT, of the places of a text (`LM(learned=...)`), Linformer's maps of keys and
# values, the matrix over tokens of a mixer. What else there is does not: biases and
# scales of norms, whatever their shape, queries, angles, logits of gates and rates,
# tables of distances and, as in ViT, of the places of a picture, and the taps of
# convolutions along the tokens
MATRICES = ("kernel", "embedding", "keys", "values", "weight")


def decays(params: Any) -> Any:
    """Which parameters weight decay makes smaller: a tree of booleans, none of those
    that are one vector without a name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(path) and getattr(path[-1], "key", None) in MATRICES,
        params
    )


def plan_of(command: Any) -> TrainConfig:
    """What the fields steps, batch, rate and seed of a command's config say; a tenth of
    the steps is warm-up."""
    return TrainConfig(steps=command.steps, batch=command.batch, seed=command.seed,
                       learning_rate=command.rate, warmup=command.steps // 10)
