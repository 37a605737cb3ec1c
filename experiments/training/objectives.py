"""Objectives: what a model is trained for beside the next token, and its score."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments.training.step import Objective
from models.lm import loss


def label(model: Any, params: Any, batch: dict, key: Any) -> tuple[Any, Any]:
    """Cross entropy in nats of the labels [B] of pictures x: (sum, count)."""
    logits = model.apply(params, batch["x"], rngs={"dropout": key})
    return loss(logits, batch["labels"])


LABELS = Objective(label, "x")


def accuracy(model: Any, params: Any, batch: dict) -> float:
    """The share of the pictures whose label is the largest logit, 64 at a time."""
    best = jax.jit(lambda x: model.apply(params, x).argmax(-1))
    x, labels = batch["x"], batch["labels"]
    hits = [
        np.asarray(best(x[n:n + 64])) == labels[n:n + 64]
        for n in range(0, len(labels), 64)
    ]
    return float(np.concatenate(hits).mean())
