"""Step: the state that a plan starts from, and the one function that training repeats.

The same step runs on one device, on a mesh and on many hosts. It can be lowered for
devices that are not there, to see what it would hold and move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.training import mesh as meshes
from experiments.training.plan import TrainConfig
from models.lm import loss
from models.placement import lay


class State(NamedTuple):
    """All that a run needs to go on. params: all of a model's variables, of which
    "params" are learned, "fixed" stay and others, such as "centroids", follow what the
    model reads. bad: the first step with a loss, a gradient or a
    parameter that was not finite, -1 if there was none. key: two words, from which
    each step draws its own."""

    params: Any
    moments: Any
    step: jax.Array
    bad: jax.Array
    key: jax.Array


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


def train_step(
    model: nn.Module, plan: TrainConfig, state: State, batch: dict,
    objective: Objective = TEXT,
) -> tuple[State, jax.Array]:
    """One step of training -> state, mean loss. The state that is given is used up."""
    return _step(model, _any_seed(plan), state, batch, objective)


def _any_seed(plan: TrainConfig) -> TrainConfig:
    """The plan that all seeds share, and one compiled program with it: what a seed
    decides is in the state."""
    return dataclasses.replace(plan, seed=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 4), donate_argnums=2)
def _step(model, plan, state, batch, objective):
    parts = _parts(batch, plan.accumulate)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    keys = jax.random.split(key, plan.accumulate)

    learned = _learned(state.params)

    def add(carry, at):
        one = lambda own: objective.loss(model, state.params | own, *at)
        (total, count), grads = jax.value_and_grad(one, has_aux=True)(learned)
        grads = meshes.constrain(grads, plan.fsdp)
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    zeros = meshes.constrain(jax.tree.map(jnp.zeros_like, learned), plan.fsdp)
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
    change, moments = plan.optimizer().update(grads, state.moments, learned)
    params = _followed(model, state.params, parts, keys, objective)
    params = params | optax.apply_updates(learned, change)
    good = jnp.isfinite(mean) & _finite(grads) & _finite(params)
    bad = jnp.where((state.bad < 0) & ~good, state.step, state.bad)
    after = State(params, moments, state.step + 1, bad, state.key)
    return meshes.constrain(after, plan.fsdp), mean


def _learned(params: Any) -> dict:
    """The variables that a gradient moves."""
    return {"params": params["params"]}


def _followed(model, params: Any, parts: dict, keys: Any, objective) -> dict:
    """The variables after the model has read the parts of a batch: those move that are
    neither learned nor fixed, such as the centroids of `attn.routing`."""
    moving = [name for name in params if name not in ("params", "fixed")]
    for n in range(len(keys) if moving else 0):
        part = jax.tree.map(lambda a: a[n], parts)
        more = {"segments": part["segments"]} if "segments" in part else {}
        _, moved = model.apply(params, part[objective.inputs], mutable=moving,
                               rngs={"dropout": keys[n]}, **more)
        params = params | moved
    return dict(params)


def _finite(tree: Any) -> jax.Array:
    """Whether the sum of the squares of all numbers is finite, as it is for numbers
    below 1e19: beyond, clipping would make an update 0."""
    squares = [jnp.square(a).sum() for a in jax.tree.leaves(tree)]
    return jnp.isfinite(functools.reduce(jnp.add, squares))


def _parts(batch: dict, many: int) -> dict:
    """[B,...] -> [many,B/many,...]. Part n has every row n mod `many`, so that a device
    keeps the rows that it has."""
    def split(a):
        a = a.reshape(-1, many, *a.shape[1:]).swapaxes(0, 1)
        return lay(a, ".BT" if a.ndim == 3 else ".B" + "." * (a.ndim - 2))

    return jax.tree.map(split, batch)


def start(
    model: nn.Module, plan: TrainConfig, dataset: Any, objective: Objective = TEXT
) -> State:
    """The state before the first step. On the mesh in force, if there is one, no device
    ever holds more of it than its own part."""
    like = _like(dataset.batch(0, plan.mesh[0])[objective.inputs])
    key = jax.random.key_data(jax.random.key(plan.seed))
    return _placed(model, _any_seed(plan), like, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _placed(model: nn.Module, plan: TrainConfig, like: Any, key: jax.Array) -> State:
    return meshes.constrain(_initial(model, plan, like, key), plan.fsdp)


def _initial(model: nn.Module, plan: TrainConfig, like: Any, key: jax.Array) -> State:
    inputs = jnp.zeros(like.shape, like.dtype)
    params = model.init(jax.random.wrap_key_data(key), inputs)
    moments = plan.optimizer().init(_learned(params))
    return State(params, moments, jnp.int32(0), jnp.int32(-1), key)


def _like(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(a.dtype))


def abstract(model: nn.Module, plan: TrainConfig, inputs: Any, mesh: Any) -> State:
    """The shapes of the state and where each lies on `mesh`, or on one device for None;
    inputs: the array that the model takes, or its shape. Nothing is computed."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        make = functools.partial(_initial, model, plan, _like(inputs))
        made = jax.eval_shape(make, key)
    return meshes.abstract(made, mesh, plan.fsdp)


def trace(
    model: nn.Module, plan: TrainConfig, mesh: Any, batch: dict,
    objective: Objective = TEXT,
) -> None:
    """Traces `train_step` on the mesh in force, or on one device for None, so that what
    the model refuses is raised; nothing is computed. jax keeps the trace for the
    steps."""
    state = abstract(model, plan, batch[objective.inputs], mesh)
    shapes = meshes.shapes(batch, mesh)
    _step.eval_shape(model, _any_seed(plan), state, shapes, objective)


def staged(
    model: nn.Module, plan: TrainConfig, mesh: Any, batch_shapes: dict,
    objective: Objective = TEXT,
) -> tuple[jax.stages.Traced, jax.stages.Lowered]:
    """`train_step`, the step that `fit` takes, traced and lowered for the devices of
    `mesh`, which need not be there; nothing is computed. mesh and batch_shapes, a shape
    and dtype for each array of a batch, take the place of `plan.mesh` and `plan.batch`.

    >>> staged(model, plan, mesh, shapes)[1].compile().memory_analysis()
    """
    sizes = meshes.sizes_of(mesh)
    batch = {name: _like(a) for name, a in batch_shapes.items()}
    meshes.check(sizes, plan.accumulate, batch)
    with jax.set_mesh(mesh):
        model = meshes.spread(model, sizes)
        state = abstract(model, plan, batch[objective.inputs], mesh)
        batch = meshes.shapes(batch, mesh)
        traced = _step.trace(model, _any_seed(plan), state, batch, objective)
        return traced, traced.lower()
