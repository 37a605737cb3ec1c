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
    `NotFinite` if the last loss or a parameter is not finite."""
    any_seed = dataclasses.replace(plan, seed=0)  # one program for all seeds
    rows = {name: jnp.asarray(a) for name, a in rows.items()}
    params, losses = _train(model, loss, inputs, any_seed, rows,
                            jax.random.key(plan.seed))
    losses = np.asarray(losses)
    finite = all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(params))
    if not (finite and np.isfinite(losses[-1])):
        bad = np.flatnonzero(~np.isfinite(losses))
        if not bad.size:  # the last step made it so
            raise NotFinite(f"a parameter was not finite after step {len(losses)}")
        raise NotFinite(f"the loss was not finite at step {bad[0] + 1}")
    return Trained(params, losses)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(model, loss, inputs, plan, rows, key):
    start, key = jax.random.split(key)
    params = model.init(start, *(rows[name][:1] for name in inputs))
    adam = plan.optimizer()
    many = next(iter(rows.values())).shape[0]

    def step(carry, key):
        params, moments = carry
        draw, noise = jax.random.split(key)
        at = jax.random.randint(draw, (plan.batch,), 0, many)
        batch = {name: a[at] for name, a in rows.items()}
        value, grads = jax.value_and_grad(
            lambda params: loss(model, params, batch, noise))(params)
        change, moments = adam.update(grads, moments, params)
        return (optax.apply_updates(params, change), moments), value

    keys = jax.random.split(key, plan.steps)
    (params, _), losses = jax.lax.scan(step, (params, adam.init(params)), keys)
    return params, losses
