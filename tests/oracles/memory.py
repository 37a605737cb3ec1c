"""A learned memory as it is written down, token by token, in float64: the inner loop by
automatic differentiation of its loss, and everything else by that of the loop.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

LN_EPS = 1e-5


def mlp(weights, x, activation="gelu", residual=True):
    """M(x) [V] of x [D], of as many layers as there are matrices."""
    matrices = [weights[n] for n in sorted(weights) if n.startswith("W")]
    y = x
    for n, w in enumerate(matrices):
        y = y @ w
        if n < len(matrices) - 1:
            y = y * jax.nn.sigmoid(y) if activation == "silu" else (
                0.5 * y * (1 + jax.lax.erf(y / np.sqrt(2))))
    if "gamma" in weights:
        y = (y - y.mean()) / jnp.sqrt(y.var() + LN_EPS)
        y = y * weights["gamma"] + weights["beta"]
    if residual:
        y = y + jnp.pad(x, (0, max(len(y) - len(x), 0)))[:len(y)]
    return y


def loop(answer, loss, q, k, v, gates, initial, fixed=None, link=None, chunk=1):
    """o [T,V] and Z of one head and row. answer(weights, x), loss(answer, v, delta);
    gates: arrays [T] step, keep, and momentum or delta or None; matrices of `initial`
    go through `link`."""
    step, keep, momentum, delta = gates
    fixed = fixed or {}

    def primal(z):
        return {n: link(a) if link and a.ndim == 2 else a for n, a in z.items()}

    z = frozen = initial
    s = jax.tree.map(jnp.zeros_like, initial)
    outs = []
    for t in range(len(q)):
        if t % chunk == 0:
            frozen = z
        cost = lambda w: loss(
            answer(w | fixed, k[t]), v[t], None if delta is None else delta[t])
        g = jax.grad(cost)(primal(frozen))
        m = 0.0 if momentum is None else momentum[t]
        s = jax.tree.map(lambda s, g: m * s - step[t] * g, s, g)
        rows = lambda a, n: a[:, None] if n == 2 and a.ndim else a
        z = jax.tree.map(lambda z, s: rows(keep[t], z.ndim) * z + s, z, s)
        outs.append(answer(primal(z) | fixed, q[t]))
    return jnp.stack(outs), z


def gradients(f, do, *args):
    """f(*args) -> o, and the gradients of sum(o do), all float64 numpy."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), args)

        @functools.partial(jax.jit)
        def run(args):
            o, back = jax.vjp(lambda *args: f(*args), *args)
            return o, back(jnp.asarray(np.asarray(do, np.float64)))

        return jax.device_get(run(args))
