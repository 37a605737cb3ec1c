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
    Others than these and "params" stay.
    start: the variables to begin with, None for drawn ones.
    `NotFinite` if the last loss or a parameter is not finite."""
    # weights do not decay alike, nor learn alike in networks that were begun elsewhere
    alike = start is None and not plan.weight_decay
    any_seed = dataclasses.replace(plan, seed=0)  # one program for all seeds
    rows = {name: jnp.asarray(a) for name, a in rows.items()}
    own, key = jax.random.split(jax.random.key(plan.seed))
    if start is None:
        start = _jit(_begin, 0, 1)(model, own, tuple(rows[n][:1] for n in inputs))
    params, losses = _jit(_train, 1, 5)(
        model, loss, any_seed, moving, alike, start, rows, key)
    losses = np.asarray(losses)
    finite = all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(params))
    if not (finite and np.isfinite(losses[-1])):
        bad = np.flatnonzero(~np.isfinite(losses))
        if not bad.size:  # the last step made it so
            raise NotFinite(f"a parameter was not finite after step {len(losses)}")
        raise NotFinite(f"the loss was not finite at step {bad[0] + 1}")
    return Trained(params, losses)


@functools.cache
def _jit(f: Callable, level: int, static: int) -> Any:
    """f, compiled with its first `static` arguments. level: how hard the compiler
    tries: on a processor compiling costs more than it gains in a short training."""
    own = {"xla_backend_optimization_level": level}
    return jax.jit(f, static_argnums=range(static),
                   compiler_options=own if jax.default_backend() == "cpu" else None)


def _begin(model, key, first):
    return model.init(key, *first)


def _train(model, loss, plan, moving, alike, start, rows, key):
    params, moved = start["params"], {name: start[name] for name in moving}
    fixed = {name: own for name, own in start.items() if name not in moved}
    whole = lambda params, moved: {**fixed, "params": params, **moved}
    adam = plan.optimizer()
    if alike:  # one vector: a hundred small arrays compile as long as a network
        adam = optax.flatten(adam)
    many = next(iter(rows.values())).shape[0]

    def step(carry, key):
        params, moved, moments = carry
        draw, noise = jax.random.split(key)
        at = jax.random.randint(draw, (plan.batch,), 0, many)
        batch = {name: a[at] for name, a in rows.items()}

        def of(params):
            found = loss(model, whole(params, moved), batch, noise)
            return found if moving else (found, {})

        (value, moved), grads = jax.value_and_grad(of, has_aux=True)(params)
        change, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, change), moved, moments), value

    keys = jax.random.split(key, plan.steps)
    first = params, moved, adam.init(params)
    (params, moved, _), losses = jax.lax.scan(step, first, keys)
    return whole(params, moved), losses
