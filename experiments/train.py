"""Training: one loop for every model and every source of batches.

A batch is a pure function of the step, and so is the dropout; with the state in a
checkpoint nothing else is needed, so a run that was killed at any point and started
again ends bit-identical to one that never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import time
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.runs import Checkpoints, Metrics
from models.lm import loss

AXES = ("data", "seq", "model")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train: AdamW with linear warm-up and cosine decay, gradients clipped.

    rate: the peak learning rate; it ends at `final` times that. accumulate: a batch is
    split in so many parts, whose gradients are added up. decay: weight decay, on
    matrices only. mesh: devices along data, seq and model.
    """

    steps: int = 500
    batch: int = 16
    rate: float = 3e-3
    warmup: int = 50
    final: float = 0.1
    decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    log: int = 10
    save: int = 100
    mesh: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "log", "save"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: expected to divide batch={self.batch}"
            )
        if self.rate <= 0 or self.warmup < 0:
            raise ValueError(
                f"rate={self.rate}, warmup={self.warmup}: expected > 0 and >= 0"
            )
        if len(self.mesh) != 3 or min(self.mesh) < 1:
            raise ValueError(f"mesh={self.mesh}: expected sizes of data, seq, model")

    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of this plan."""
        warmup = min(self.warmup, self.steps // 2)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.rate, warmup, self.steps, self.rate * self.final
        )
        matrices = lambda params: jax.tree.map(lambda a: a.ndim > 1, params)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(schedule, b2=0.95, weight_decay=self.decay, mask=matrices),
        )


class State(NamedTuple):
    """All that a run needs to go on. bad: the first step with a loss that was not
    finite, -1 if there was none."""

    params: Any
    moments: Any
    step: jax.Array
    bad: jax.Array


class Fit(NamedTuple):
    """What training gives back: the parameters, the metrics (a row every `log` steps)
    and the median number of tokens per second, without compilation."""

    params: Any
    rows: list[dict[str, Any]]
    tokens_per_second: float


class Objective(NamedTuple):
    """What a model is trained for. loss(model, params, batch, key) gives the loss of a
    batch and what it is a mean over: (sum, count). inputs: the array of a batch that
    the model takes; its size is what speed is counted in."""

    loss: Callable[..., tuple[jax.Array, jax.Array]]
    inputs: str = "tokens"


def next_token(model, params, batch: dict, key) -> tuple[jax.Array, jax.Array]:
    """Cross entropy in nats of the targets: (sum, count)."""
    logits: Any = model.apply(
        params, batch["tokens"], segments=batch.get("segments"), rngs={"dropout": key}
    )
    return loss(logits, batch["targets"])


TEXT = Objective(next_token)


class NotFinite(ValueError):
    """The loss was not finite."""


@functools.partial(jax.jit, static_argnums=(0, 1, 4), donate_argnums=2)
def update(
    model: nn.Module, plan: Plan, state: State, batch: dict, objective: Objective = TEXT
) -> tuple:
    """One step of training -> state, mean loss."""
    parts = jax.tree.map(
        lambda a: a.reshape(plan.accumulate, -1, *a.shape[1:]), batch
    )
    key = jax.random.fold_in(jax.random.key(plan.seed), state.step)
    keys = jax.random.split(key, plan.accumulate)

    def add(carry, at):
        one = lambda params: objective.loss(model, params, *at)
        (total, count), grads = jax.value_and_grad(one, has_aux=True)(state.params)
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    first = jax.tree.map(lambda a: a[0], (parts, keys))
    kind = jax.eval_shape(lambda: objective.loss(model, state.params, *first)[1])
    zero = (jnp.float32(0), jnp.zeros((), kind.dtype), zeros)
    if plan.accumulate == 1:
        (total, count, grads), _ = add(zero, first)
    else:
        (total, count, grads), _ = jax.lax.scan(add, zero, (parts, keys))
    count = jnp.maximum(count, 1)
    mean = total / count
    grads = jax.tree.map(lambda g: g / count, grads)
    change, moments = plan.optimizer().update(grads, state.moments, state.params)
    params = optax.apply_updates(state.params, change)
    bad = jnp.where((state.bad < 0) & ~jnp.isfinite(mean), state.step, state.bad)
    return State(params, moments, state.step + 1, bad), mean


@functools.partial(jax.jit, static_argnums=0)
def measure(model: nn.Module, params: Any, batch: dict) -> tuple:
    """(nats, hits, targets): sums over the targets of one batch."""
    logits: Any = model.apply(params, batch["tokens"], segments=batch.get("segments"))
    nats, count = loss(logits, batch["targets"])
    hits = (logits.argmax(-1) == batch["targets"]) & (batch["targets"] >= 0)
    return nats, hits.sum(), count


def evaluate(
    model: nn.Module, params: Any, source: Any, batches: int, size: int
) -> dict[str, float]:
    """Mean loss in nats and accuracy over `batches` batches of `size` rows."""
    sums = np.zeros(3)
    for step in range(batches):
        sums += np.asarray(measure(model, params, source.batch(step, size)), np.float64)
    return {"loss": sums[0] / max(sums[2], 1), "accuracy": sums[1] / max(sums[2], 1)}


def start(
    model: nn.Module, plan: Plan, source: Any, objective: Objective = TEXT
) -> State:
    """The state before the first step."""
    inputs = jnp.zeros_like(source.batch(0, plan.mesh[0])[objective.inputs])
    params = jax.jit(model.init)(jax.random.key(plan.seed), inputs)
    moments = plan.optimizer().init(params)
    return State(params, moments, jnp.int32(0), jnp.int32(-1))


def fit(
    model: nn.Module,
    source: Any,
    plan: Plan,
    folder: pathlib.Path | None = None,
    *,
    objective: Objective = TEXT,
    label: str = "train",
    quiet: bool = False,
) -> Fit:
    """Trains `model` on `source`; with a folder, goes on from its newest checkpoint.

    `NotFinite` names the step at which the loss was not finite, and the last checkpoint
    before it. objective: what is made small; by default the loss of the next token.
    quiet: no progress bar.
    """
    checkpoints = Checkpoints(folder)
    with _mesh(plan.mesh) as place:
        state = place(start(model, plan, source, objective), False)
        if checkpoints.latest is not None:
            state = checkpoints.restore(state)
        done = int(state.step)
        metrics = Metrics(folder / "metrics.jsonl" if folder else None, done)
        rates: list[float] = []
        with _progress(label, plan.steps, done, quiet) as show:
            clock, since = time.perf_counter(), done
            for step in range(done, plan.steps):
                batch = source.batch(step, plan.batch)
                state, mean = update(
                    model, plan, state, place(batch, True), objective
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
        return Fit(state.params, metrics.rows, speed)


def _stop_if_bad(state: State, checkpoints: Checkpoints) -> None:
    if int(state.bad) < 0:
        return
    good = checkpoints.latest
    kept = "no checkpoint was written" if good is None else (
        f"the last good checkpoint is {checkpoints.folder}/{good}"
    )
    checkpoints.close()
    raise NotFinite(f"the loss was not finite at step {int(state.bad) + 1}; {kept}")


@contextlib.contextmanager
def _mesh(sizes: tuple[int, int, int]):
    """Puts the mesh in force and gives a function that lays arrays on it."""
    wanted = int(np.prod(sizes))
    if wanted > jax.device_count():
        raise ValueError(
            f"mesh={sizes} needs {wanted} devices: there are {jax.device_count()}"
        )
    if wanted == 1:
        yield lambda tree, split: tree
        return
    mesh = jax.make_mesh(
        sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:wanted],
    )
    rows, all_of_it = PartitionSpec("data", "seq"), PartitionSpec()

    def lay(tree, split):
        return jax.device_put(tree, NamedSharding(mesh, rows if split else all_of_it))

    with jax.set_mesh(mesh):
        yield lay


@contextlib.contextmanager
def _progress(label: str, steps: int, done: int, quiet: bool):
    """A progress bar on the error stream, with the loss and the speed."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/"),
        TextColumn("{task.total} steps"), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(label, total=steps, completed=done, note="compiling")

        def show(step: int, value: float, rate: float) -> None:
            note = f"loss {value:.3f}, {rate:,.0f} tok/s"
            bar.update(task, completed=step, note=note)

        yield show
