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
from jax.flatten_util import ravel_pytree

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
    moving: collections of variables that a call moves, such as centroids; the loss is
    then (mean, {collection: as it is after the call}). No gradient moves any but
    "params". start: the variables to begin with, None for drawn ones. `NotFinite` if
    the last loss or a parameter is not finite."""
    any_seed = dataclasses.replace(plan, seed=0)  # one program for all seeds
    rows = {name: jnp.asarray(a) for name, a in rows.items()}
    own, key = jax.random.split(jax.random.key(plan.seed))
    first = tuple(rows[name][:1] for name in inputs)
    variables = _jit(_begin, 0, 1)(model, own, first) if start is None else start
    params, losses = _jit(_train, 1, 4)(
        model, loss, any_seed, moving, variables, rows, key)
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


def _train(model, loss, plan, moving, variables, rows, key):
    moved = {name: variables[name] for name in moving}
    fixed = {name: own for name, own in variables.items() if name != "params"}
    params, tree = _as_one(variables["params"], plan)
    adam = plan.optimizer()
    many = next(iter(rows.values())).shape[0]

    def step(carry, key):
        params, moved, moments = carry
        draw, noise = jax.random.split(key)
        at = jax.random.randint(draw, (plan.batch,), 0, many)
        batch = {name: a[at] for name, a in rows.items()}

        def of(params):
            whole = fixed | moved | {"params": tree(params)}
            found = loss(model, whole, batch, noise)
            return found if moving else (found, {})

        (value, moved), grads = jax.value_and_grad(of, has_aux=True)(params)
        change, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, change), moved, moments), value

    keys = jax.random.split(key, plan.steps)
    first = params, moved, adam.init(params)
    (params, moved, _), losses = jax.lax.scan(step, first, keys)
    return fixed | moved | {"params": tree(params)}, losses


def _as_one(params, plan):
    """Parameters as the optimiser has them, and the way back. One vector, as an
    optimiser of a hundred small arrays compiles as long as a network; a tree where
    weights decay, which asks for their names."""
    if plan.weight_decay:
        return params, lambda params: params
    flat, tree = ravel_pytree(params)
    return {"all": flat}, lambda params: tree(params["all"])
