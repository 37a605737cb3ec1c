"""Online streams: a linear memory learns a map from keys to values as they go by.

Nothing is trained around it: q, k and v are drawn, steps are constants of a stream, and
an error is that of answers to fresh keys. `size` has the fields tokens, keys (the width
D), streams, updates and seed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attn.recurrent.memory import Gates, Where, learn
from attn.recurrent.memory_axes import Bias
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_nets import MLP

STEPS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # eta, of which each error gets its best
BIASES = {
    "l2": Bias("l2"), "huber": Bias("huber_norm"), "yaad": Bias("huber_switch"),
    "lp": Bias("lp"),
}


def remembered(bias: Bias, q, k, v, step, log_keep=None):
    """o [B,T,V] of a linear memory that begins empty; q, k [B,T,D], step [B,T]."""
    d, width = k.shape[-1], v.shape[-1]
    one = lambda a: a[:, :, None]  # of one head
    delta = jnp.ones_like(one(step))
    gates = Gates(one(step), None if log_keep is None else one(log_keep), None, delta)
    where = Where(jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2]), None)
    _, o = learn(Rule(MLP(1), bias), one(q), one(k), one(v), gates,
                 {"W0": jnp.zeros((1, d, width))}, where, chunk=1)
    return o[:, :, 0]


def unit(rng, *shape) -> np.ndarray:
    """Random vectors of length 1."""
    a = rng.normal(size=shape)
    return (a / np.linalg.norm(a, axis=-1, keepdims=True)).astype(np.float32)


def relative(o, want) -> jax.Array:
    """Squared error over squared length, of the second half of streams [B,T,V]."""
    late = o.shape[1] // 2
    return ((o - want)[:, late:] ** 2).sum() / (want[:, late:] ** 2).sum()


def best(bias: Bias, q, k, v, want) -> float:
    """The least error over `STEPS`; the steps are chosen on one half of the streams and
    judged on the other."""
    @jax.jit
    def errors(step):
        o = remembered(bias, q, k, v, jnp.full(k.shape[:2], step))
        half = len(k) // 2
        return relative(o[:half], want[:half]), relative(o[half:], want[half:])

    found = np.asarray([errors(step) for step in STEPS], np.float64)
    found = np.where(np.isfinite(found), found, np.inf)  # a step that diverged
    return float(found[found[:, 0].argmin(), 1])


def mapped(size: Any, rng, halves: int = 1):
    """Keys and fresh queries, and both through maps A of each stream, of which there
    are `halves` one after the other."""
    b, t, d = size.streams, size.tokens, size.keys
    maps = rng.normal(size=(b, halves, d, d)).astype(np.float32) / d ** 0.5
    each = np.repeat(maps, -(-t // halves), 1)[:, :t]
    k, q = unit(rng, b, t, d), unit(rng, b, t, d)
    through = lambda a: np.einsum("btd,btdv->btv", a, each)
    return k, q, through(k), through(q)


def outliers(size: Any) -> dict[str, float]:
    """The error of each bias with outliers (wild) and without (calm)."""
    rng, found = np.random.default_rng(size.seed), {}
    k, q, v, want = mapped(size, rng)
    calm = v + 0.05 * rng.normal(size=v.shape).astype(np.float32)
    wild = np.where(rng.random(v.shape[:2])[..., None] < 0.05, 20 * calm, calm)
    for name in ("l2", "huber", "yaad"):
        for kind, seen in (("wild", wild), ("calm", calm)):
            found[f"{kind}_{name}_error"] = best(BIASES[name], q, k, seen, want)
    return found


def collisions(size: Any) -> dict[str, float]:
    """The error at the centres of noisy keys."""
    rng, found = np.random.default_rng(size.seed), {}
    b, t, d = size.streams, size.tokens, size.keys
    centres, values = unit(rng, b, 8, d), unit(rng, b, 8, d)
    pick = lambda a, at: np.take_along_axis(a, at[..., None], 1)
    stored, asked = rng.integers(8, size=(2, b, t))
    k = pick(centres, stored) + 0.3 * unit(rng, b, t, d)
    k, v = k / np.linalg.norm(k, axis=-1, keepdims=True), pick(values, stored)
    q, want = pick(centres, asked), pick(values, asked)
    for name in ("l2", "lp"):
        found[f"{name}_error"] = best(BIASES[name], q, k, v, want)
    return found


def redrawn(size: Any) -> dict[str, float]:
    """The error where the map changes halfway, of gates learned through the memory."""
    rng, found = np.random.default_rng(size.seed), {}
    k, q, v, want = mapped(size, rng, halves=2)

    def error(gates, rows, forgets):
        shape = k[rows].shape[:2]
        keep = jnp.full(shape, jax.nn.log_sigmoid(-gates["alpha"])) if forgets else None
        step = jnp.full(shape, jax.nn.sigmoid(gates["theta"]))
        o = remembered(BIASES["l2"], q[rows], k[rows], v[rows], step, keep)
        return ((o - want[rows]) ** 2).sum() / (want[rows] ** 2).sum()

    half, optimizer = size.streams // 2, optax.adam(0.1)
    for name, forgets in (("fixed", False), ("learned", True)):
        cost = functools.partial(error, forgets=forgets)

        @jax.jit
        def update(carry, cost=cost):
            gates, state = carry
            change, state = optimizer.update(
                jax.grad(cost)(gates, slice(half)), state)
            return optax.apply_updates(gates, change), state

        gates = {"alpha": jnp.asarray(-4.0), "theta": jnp.asarray(-2.0)}
        carry = gates, optimizer.init(gates)
        for _ in range(size.updates):
            carry = update(carry)
        found[f"{name}_error"] = jax.jit(functools.partial(
            cost, rows=slice(half, None)))(carry[0])
        if forgets:
            found["alpha"] = jax.nn.sigmoid(carry[0]["alpha"])
    return found
