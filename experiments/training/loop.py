"""Training: one loop for every model and every dataset.

A batch is a pure function of the step, and so is the dropout; with the state in a
checkpoint nothing else is needed, so a run that was killed at any point and started
again ends bit-identical to one that never stopped.
"""

from __future__ import annotations

import functools
import pathlib
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from experiments.training import mesh as meshes
from experiments.training.progress import progress
from experiments.training.runs import Checkpoints, Metrics
from experiments.training.step import (
    TEXT, Objective, State, TrainConfig, abstract, next_token, staged, start, trace,
    train_step,
)
from models.lm import loss

__all__ = [
    "TEXT", "Objective", "TrainConfig", "State", "abstract", "check", "evaluate", "fit",
    "next_token", "staged", "start", "train_step",
]


class TrainResult(NamedTuple):
    """What training gives back: the parameters, the metrics (a row every `log` steps)
    and the median number of tokens per second, without compilation."""

    params: Any
    rows: list[dict[str, Any]]
    tokens_per_second: float


class NotFinite(ValueError):
    """The loss was not finite."""


@functools.partial(jax.jit, static_argnums=0)
def measure(model: nn.Module, params: Any, batch: dict) -> tuple:
    """(nats, hits, targets): sums over the targets of one batch."""
    logits: Any = model.apply(params, batch["tokens"], segments=batch.get("segments"))
    nats, count = loss(logits, batch["targets"])
    hits = (logits.argmax(-1) == batch["targets"]) & (batch["targets"] >= 0)
    return nats, hits.sum(), count


def evaluate(
    model: nn.Module, params: Any, dataset: Any, batches: int, size: int,
    mesh: meshes.Sizes = (1, 1, 1),
) -> dict[str, float]:
    """Mean loss in nats and accuracy over `batches` batches of `size` rows, on the mesh
    that the parameters lie on."""
    sums = np.zeros(3)
    with meshes.in_force(mesh) as devices:
        model = meshes.spread(model, mesh)
        for step in range(batches):
            batch = dataset.batch(step, size)
            meshes.check(mesh, 1, batch)
            found = measure(model, params, meshes.put(batch, devices))
            sums += np.asarray(found, np.float64)
    return {"loss": sums[0] / max(sums[2], 1), "accuracy": sums[1] / max(sums[2], 1)}


def fit(
    model: nn.Module,
    dataset: Any,
    plan: TrainConfig,
    folder: pathlib.Path | None = None,
    *,
    objective: Objective = TEXT,
    label: str = "train",
    quiet: bool = False,
) -> TrainResult:
    """Trains `model` on `dataset`; with a folder, goes on from its newest checkpoint,
    which may come from another mesh.

    On a mesh every attention that names no axis of its own gets "seq". `NotFinite`
    names the step at which the loss was not finite, and the last checkpoint before it.
    objective: what is made small; by default the loss of the next token. quiet: no
    progress bar.
    """
    check(model, plan, dataset, objective)
    checkpoints = Checkpoints(folder)
    first = jax.process_index() == 0
    with meshes.in_force(plan.mesh) as mesh:
        model = meshes.spread(model, plan.mesh)
        state = _resumed(model, plan, dataset, objective, checkpoints, mesh)
        done = int(state.step)
        metrics = Metrics(folder / "metrics.jsonl" if folder and first else None, done)
        rates: list[float] = []
        with progress(label, plan.steps, done, quiet or not first) as show:
            clock, since = time.perf_counter(), done
            for step in range(done, plan.steps):
                batch = dataset.batch(step, plan.batch)
                state, mean = train_step(
                    model, plan, state, meshes.put(batch, mesh), objective
                )
                last = step + 1 == plan.steps
                if (step + 1) % plan.log == 0 or last:
                    value = float(mean)
                    spent, clock = time.perf_counter() - clock, time.perf_counter()
                    seen = (step + 1 - since) * batch[objective.inputs].size
                    rates.append(seen / spent)
                    since = step + 1
                    _stop_if_bad(state, checkpoints)
                    metrics.add(step=step + 1, loss=value)
                    show(step + 1, value, rates[-1])
                if (step + 1) % plan.save == 0 or last:
                    _stop_if_bad(state, checkpoints)
                    checkpoints.save(step + 1, state)
        checkpoints.close()
        speed = float(np.median(rates[1:] or rates or [0.0]))
        return TrainResult(state.params, metrics.rows, speed)


def check(
    model: nn.Module, plan: TrainConfig, dataset: Any, objective: Objective = TEXT
) -> None:
    """ValueError or NotImplementedError, in one sentence, if `fit` cannot run this plan
    on the devices there are: too few of them, sizes that they cannot split, an
    attention that cannot be split. The step is traced, which `fit` need not do again.
    """
    batch = dataset.batch(0, plan.batch)
    with meshes.in_force(plan.mesh) as mesh:
        meshes.check(plan.mesh, plan.accumulate, batch)
        trace(meshes.spread(model, plan.mesh), plan, mesh, batch, objective)


def _resumed(model, plan, dataset, objective, checkpoints, mesh) -> State:
    """The newest checkpoint, read straight to where it lies; else a new state."""
    if checkpoints.latest is None:
        return start(model, plan, dataset, objective)
    inputs = dataset.batch(0, plan.mesh[0])[objective.inputs]
    return checkpoints.restore(abstract(model, plan, inputs, mesh))


def _stop_if_bad(state: State, checkpoints: Checkpoints) -> None:
    if int(state.bad) < 0:
        return
    good = checkpoints.latest
    kept = "no checkpoint was written" if good is None else (
        f"the last good checkpoint is {checkpoints.folder}/{good}"
    )
    checkpoints.close()
    raise NotFinite(f"the loss was not finite at step {int(state.bad) + 1}; {kept}")
