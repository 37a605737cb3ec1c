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
from experiments.training.plan import TrainConfig
from experiments.training.progress import progress
from experiments.training.runs import Checkpoints, Metrics, locked
from experiments.training.step import (
    TEXT, Objective, State, abstract, next_token, staged, start, trace,
    train_step,
)
from experiments.training.stopping import Clock, stopping
from models.lm import loss

__all__ = [
    "TEXT", "Objective", "TrainConfig", "State", "abstract", "check", "evaluate", "fit",
    "next_token", "staged", "start", "train_step",
]


class TrainResult(NamedTuple):
    """What training gives back: the parameters, the metrics (a row every `log` steps)
    and the median number of tokens per second, without compilation; of a run that had
    ended before, what it was then."""

    params: Any
    rows: list[dict[str, Any]]
    tokens_per_second: float


class NotFinite(ValueError):
    """The loss, a gradient or a parameter was not finite."""


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
    which may come from another mesh. Ctrl-C and SIGTERM leave one of the last step.

    On a mesh every attention that names no axis of its own gets "seq". `NotFinite`
    names the first step at which the loss, a gradient or a parameter was not finite,
    and the last checkpoint, which is from before it.
    objective: what is made small; by default the loss of the next token. quiet: no
    progress bar.
    """
    check(model, plan, dataset, objective)
    with locked(folder), meshes.in_force(plan.mesh) as mesh, stopping() as stop:
        checkpoints = Checkpoints(folder)
        model = meshes.spread(model, plan.mesh)
        state = _resumed(model, plan, dataset, objective, checkpoints, mesh)
        done, first = int(state.step), jax.process_index() == 0
        metrics = Metrics(folder / "metrics.jsonl" if folder and first else None, done)
        speed, clock = _Speed(done), Clock(plan.save_minutes)
        with progress(label, plan.steps, done, quiet or not first) as show:
            for step in range(done + 1, plan.steps + 1):
                batch = dataset.batch(step - 1, plan.batch)
                _check_ids(model, batch)
                state, mean = train_step(
                    model, plan, state, meshes.put(batch, mesh), objective
                )
                last, save = step == plan.steps or stop.asked(step), False
                if step % plan.log == 0 or step == plan.steps:
                    value = float(mean)
                    speed.add(step, batch[objective.inputs].size)
                    _stop_if_bad(state, checkpoints)
                    metrics.add(step=step, loss=value)
                    show(step, value, speed.latest)
                    save = clock.rings()
                if save or step % plan.save == 0 or last:
                    _stop_if_bad(state, checkpoints)
                    rate = speed.median(checkpoints)
                    checkpoints.save(step, state, tokens_per_second=rate)
                if stop.signal is not None:
                    break
        if stop.signal is not None:
            stop.end(int(state.step), folder is not None)
        rate = speed.median(checkpoints)
        checkpoints.close()
        return TrainResult(state.params, metrics.rows, rate)


class _Speed:
    """Tokens a second between two rows of metrics."""

    def __init__(self, step: int):
        self.step, self.time = step, time.perf_counter()
        self.rates: list[float] = []

    def add(self, step: int, tokens: int) -> None:
        """At `step` steps of so many tokens."""
        now = time.perf_counter()
        self.rates.append((step - self.step) * tokens / (now - self.time))
        self.step, self.time = step, now

    @property
    def latest(self) -> float:
        """Since the row before."""
        return self.rates[-1]

    def median(self, checkpoints: Checkpoints) -> float:
        """Of all but the first, which compiles; of a run that did nothing, what it had
        written."""
        rates = self.rates[1:] or self.rates
        if rates:
            return float(np.median(rates))
        return float(checkpoints.recorded.get("tokens_per_second", 0.0))


def check(
    model: nn.Module, plan: TrainConfig, dataset: Any, objective: Objective = TEXT
) -> None:
    """ValueError or NotImplementedError, in one sentence, if `fit` cannot run this plan
    on the devices there are: too few of them, sizes that they cannot split, an
    attention that cannot be split. The step is traced, which `fit` need not do again.
    """
    batch = dataset.batch(0, plan.batch)
    _check_ids(model, batch)
    with meshes.in_force(plan.mesh) as mesh:
        meshes.check(plan.mesh, plan.accumulate, batch)
        trace(meshes.spread(model, plan.mesh), plan, mesh, batch, objective)


def _check_ids(model: nn.Module, batch: dict) -> None:
    vocab = getattr(model, "vocab", None)
    for name in ("tokens", "targets"):
        most = int(batch[name].max()) if name in batch and vocab else -1
        if most >= (vocab or 0) and most >= 0:
            raise ValueError(f"{name} hold {most}: expected ids below vocab={vocab}")


def _resumed(model, plan, dataset, objective, checkpoints, mesh) -> State:
    """The newest checkpoint, read straight to where it lies; else a new state."""
    inputs = dataset.batch(0, plan.mesh[0])[objective.inputs]
    state = checkpoints.resumed(abstract(model, plan, inputs, mesh))
    if state is None:
        return start(model, plan, dataset, objective)
    if int(state.step) > plan.steps:
        raise ValueError(
            f"steps={plan.steps}: the run in {checkpoints.run} has done "
            f"{int(state.step)}: expected as many or more"
        )
    return state


def _stop_if_bad(state: State, checkpoints: Checkpoints) -> None:
    if int(state.bad) < 0:
        return
    good = checkpoints.latest
    kept = "no checkpoint was written" if good is None else (
        f"the last good checkpoint is {checkpoints.folder}/{good}"
    )
    checkpoints.close()
    raise NotFinite(
        "the loss, a gradient or a parameter was not finite at step "
        f"{int(state.bad) + 1}; {kept}"
    )
