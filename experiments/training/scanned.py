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

from experiments.training.loop import NotFinite
from experiments.training.plan import TrainConfig

Loss = Callable[[nn.Module, Any, dict, jax.Array], jax.Array]


class Trained(NamedTuple):
    """The parameters, and the loss of each step [steps]."""

    params: Any
    losses: np.ndarray


def train(model: nn.Module, loss: Loss, inputs: tuple[str, ...], rows: dict,
          plan: TrainConfig) -> Trained:
    """Trains on `rows`, arrays [n,...] by name, `plan.batch` of them a step.
    loss(model, params, batch, key) is a mean over the batch; inputs: the arrays that
    the model is called with. Of the plan steps, batch, seed and optimiser count.
    `NotFinite` if the last loss or a parameter is not finite; ValueError for weight
    decay."""
    if plan.weight_decay:
        raise ValueError(f"weight_decay={plan.weight_decay}: all parameters are one "
                         "vector here, expected 0")
    any_seed = dataclasses.replace(plan, seed=0)  # one program for all seeds
    rows = {name: jnp.asarray(a) for name, a in rows.items()}
    start, key = jax.random.split(jax.random.key(plan.seed))
    first = tuple(rows[name][:1] for name in inputs)
    variables = _jit(_begin, 0, 1)(model, start, first)
    params, losses = _jit(_train, 1, 3)(model, loss, any_seed, variables, rows, key)
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


def _train(model, loss, plan, variables, rows, key):
    fixed = {name: own for name, own in variables.items() if name != "params"}
    # one vector: an optimiser of a hundred small arrays compiles as long as a network
    flat, tree = ravel_pytree(variables["params"])
    whole = lambda params: fixed | {"params": tree(params["all"])}
    adam, params = plan.optimizer(), {"all": flat}
    many = next(iter(rows.values())).shape[0]

    def step(carry, key):
        params, moments = carry
        draw, noise = jax.random.split(key)
        at = jax.random.randint(draw, (plan.batch,), 0, many)
        batch = {name: a[at] for name, a in rows.items()}
        value, grads = jax.value_and_grad(
            lambda params: loss(model, whole(params), batch, noise))(params)
        change, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, change), moments), value

    keys = jax.random.split(key, plan.steps)
    (params, _), losses = jax.lax.scan(step, (params, adam.init(params)), keys)
    return whole(params), losses
