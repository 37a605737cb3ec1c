"""Scanned: a whole training of a small network as one program.

For sweeps of many trainings that take seconds each: the training set is fixed and lies
on the device, each step draws rows of it, and a scan goes through the steps. There is
no checkpoint; what is killed is done again. `experiments.training.loop` is for all
longer ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.training import step as steps
from experiments.training.loop import NotFinite
from experiments.training.plan import TrainConfig

Loss = Callable[[nn.Module, Any, dict, jax.Array], Any]


class Trained(NamedTuple):
    """The parameters, and the loss of each step [steps]."""

    params: Any
    losses: np.ndarray


def next_token(model: nn.Module, params: Any, batch: dict, key: jax.Array) -> jax.Array:
    """The mean cross entropy in nats of the targets of a batch."""
    nats, count = steps.next_token(model, params, batch, key)
    return nats / count


def train(model: nn.Module, loss: Loss, inputs: tuple[str, ...], rows: dict,
          plan: TrainConfig, moving: tuple[str, ...] = (), start: Any = None
          ) -> Trained:
    """Trains on `rows`, arrays [n,...] by name, `plan.batch` of them a step.
    loss(model, params, batch, key) is a mean over the batch; inputs: the arrays that
    the model is called with. Of the plan steps, batch, seed and optimiser count.
    moving: collections of variables that no gradient moves but a call, such as
    centroids, or nothing; the loss is then (mean, {collection: as it is after it}).
    start: the variables to begin with, None for drawn ones.
    `NotFinite` if the last loss or a parameter is not finite."""
    any_seed = dataclasses.replace(plan, seed=0)  # one program for all seeds
    rows = {name: jnp.asarray(a) for name, a in rows.items()}
    params, losses = _train(model, loss, inputs, any_seed, moving, start, rows,
                            jax.random.key(plan.seed))
    losses = np.asarray(losses)
    finite = all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(params))
    if not (finite and np.isfinite(losses[-1])):
        bad = np.flatnonzero(~np.isfinite(losses))
        if not bad.size:  # the last step made it so
            raise NotFinite(f"a parameter was not finite after step {len(losses)}")
        raise NotFinite(f"the loss was not finite at step {bad[0] + 1}")
    return Trained(params, losses)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _train(model, loss, inputs, plan, moving, start, rows, key):
    own, key = jax.random.split(key)
    if start is None:
        start = model.init(own, *(rows[name][:1] for name in inputs))
    moved = {name: start[name] for name in moving}
    params = {name: start[name] for name in start if name not in moving}
    adam = plan.optimizer()
    many = next(iter(rows.values())).shape[0]

    def step(carry, key):
        params, moved, moments = carry
        draw, noise = jax.random.split(key)
        at = jax.random.randint(draw, (plan.batch,), 0, many)
        batch = {name: a[at] for name, a in rows.items()}

        def of(params):
            found = loss(model, {**params, **moved}, batch, noise)
            return found if moving else (found, {})

        (value, moved), grads = jax.value_and_grad(of, has_aux=True)(params)
        change, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, change), moved, moments), value

    keys = jax.random.split(key, plan.steps)
    first = params, moved, adam.init(params)
    (params, moved, _), losses = jax.lax.scan(step, first, keys)
    return {**params, **moved}, losses
