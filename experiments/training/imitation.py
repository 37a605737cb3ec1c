"""Imitation: a network with other attention that learns what its teacher does.

The student begins with the teacher's parameters. It learns the teacher's logits and, in
each layer, what its heads give; attention that says itself how it learns from scores
and outputs (SEA's `distil`) does that in the place of the latter. The teacher lies
among the student's variables, as "teacher", where no gradient moves it, so that one
program serves all teachers (`experiments.training.scanned`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from attn.softmax import Softmax
from models.lm import LM
from models.view import look


def begun(model: LM, teacher: Any, tokens: Any, seed: int) -> dict[str, Any]:
    """A student's variables: drawn, but for what the teacher has; and the teacher's."""
    made = jax.jit(model.init)(jax.random.key(seed), tokens)
    old, new = (traverse_util.flatten_dict(p["params"]) for p in (teacher, made))
    params = traverse_util.unflatten_dict(new | old)
    return {**made, "params": params, "teacher": teacher["params"]}


def own(variables: Any) -> dict[str, Any]:
    """A student's variables without its teacher's."""
    return {name: a for name, a in variables.items() if name != "teacher"}


def inside(model: LM, params: Any, tokens: Any) -> tuple:
    """The logits, and q, k, v and outputs z of each layer's heads."""
    names = [f"{n}/{a}" for n in range(len(model.attention)) for a in "qkvz"]
    logits, seen = look(model, params, tokens, read=names)
    return logits, [[seen[f"{n}/{a}"] for a in "qkvz"]
                    for n in range(len(model.attention))]


def of_teacher(model: LM, params: Any, tokens: Any) -> tuple:
    """The teacher's logits, and its scores q.k D^-1/2 and outputs by layer."""
    exact = model.clone(attention=(Softmax(),) * len(model.attention))
    logits, layers = jax.lax.stop_gradient(inside(exact, {"params": params}, tokens))
    return logits, [(jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5, z)
                    for q, k, _, z in layers]


def imitated(model: Any, variables: Any, batch: dict, key: Any) -> Any:
    """The divergence from the teacher's logits, and in each layer the attention's own
    loss, or the mean squared difference of what heads give."""
    told, theirs = of_teacher(model, variables["teacher"], batch["tokens"])
    logits, mine = inside(model, own(variables), batch["tokens"])
    ours, told = jax.nn.log_softmax(logits), jax.nn.log_softmax(told)
    total = (jnp.exp(told) * (told - ours)).sum(-1).mean()
    for n, ((scores, context), (q, k, v, z)) in enumerate(zip(theirs, mine)):
        if hasattr(model.attention[n], "distil"):
            total += of_layer(model, own(variables), n, "distil", q, k, v, scores,
                              context)
        else:
            total += jnp.square(z - context).mean()
    return total


def of_layer(model: LM, variables: Any, n: int, method: Any, *args: Any) -> Any:
    """A method of the attention of layer n with its variables."""
    attention: Any = model.attention[n]
    return attention.apply({
        name: a["layers"][f"layer_{n}"]["mixer"]["attention"]
        for name, a in variables.items()}, *args, method=method)
