"""A learned memory as it is written down, token by token, in float64: the inner loop by
automatic differentiation of its loss, everything else by that of the loop.
"""

from __future__ import annotations

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
        y = (y - y.mean()) / jnp.sqrt(((y - y.mean()) ** 2).mean() + LN_EPS)
        y = y * weights["gamma"] + weights["beta"]
    if residual:
        y = y + jnp.pad(x, (0, max(len(y) - len(x), 0)))[:len(y)]
    return y


def loop(answer, loss, link, chunk, q, k, v, gates, initial, fixed):
    """o [T,V] of one head of one row. answer(weights, x); loss(answer, v, delta); link
    of matrices, or None; gates {step, keep, and momentum or delta: [T]}."""
    def primal(z):
        return {n: link(a) if link and a.ndim == 2 else a for n, a in z.items()} | fixed

    z = frozen = initial
    s, outs = {n: 0.0 for n in initial}, []
    for t in range(len(q)):
        if t % chunk == 0:
            frozen = z
        delta = gates["delta"][t] if "delta" in gates else None
        m = gates["momentum"][t] if "momentum" in gates else 0.0
        g = jax.grad(lambda w: loss(answer(w, k[t]), v[t], delta))(primal(frozen))
        for n in initial:
            s[n] = m * s[n] - gates["step"][t] * g[n]
        z = {n: gates["keep"][t] * z[n] + s[n] for n in initial}
        outs.append(answer(primal(z), q[t]))
    return jnp.stack(outs)


def heads(answer, loss, link, chunk, args, initial, fixed, do):
    """o [T,H,V], and the gradients of sum(o do) by args {name: [T,H,...]}, initial and
    fixed {name: [H,...]}, all float64."""
    double = lambda tree: jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)

    def run(args, initial, fixed):
        def one(args, initial, fixed):
            q, k, v = (args[n] for n in "qkv")
            gates = {n: a for n, a in args.items() if n not in "qkv"}
            return loop(answer, loss, link, chunk, q, k, v, gates, initial, fixed)

        across = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), args)
        return jnp.moveaxis(jax.vmap(one)(across, initial, fixed), 0, 1)

    with jax.enable_x64(True):
        o, back = jax.jit(lambda *a: jax.vjp(run, *a))(
            *map(double, (args, initial, fixed)))
        return jax.device_get((o, jax.jit(back)(double(do))))


def linear(args, chunk, factor, cotangents):
    """W, S [B,H,D,V] and o [B,T,H,V] of a linear memory, and the gradients of
    `cotangents` by args {q, k [B,T,H,D], v [B,T,H,V], step, log_keep, log_momentum
    [B,T,H], weights, momentum [B,H,D,V]}, all float64."""
    def run(args):
        def token(carry, x):
            w, s, frozen = carry
            t, q, k, v, step, keep, run = x  # [B,H,1,.], [B,H,1,1]
            frozen = jnp.where(t % chunk == 0, w, frozen)
            u = factor * k.swapaxes(-1, -2) * (k @ frozen - v)
            s = jnp.exp(run) * s - step * u
            w = jnp.exp(keep) * w + s
            return (w, s, frozen), (q @ w)[:, :, 0]

        # [B,T,H,...] -> [T,B,H,1,...]
        rows = [jnp.moveaxis(args[n], 1, 0)[:, :, :, None] for n in "qkv"]
        rows += [jnp.moveaxis(args[n], 1, 0)[..., None, None] for n in (
            "step", "log_keep", "log_momentum")]
        first = args["weights"], args["momentum"], args["weights"]
        (w, s, _), o = jax.lax.scan(token, first, (jnp.arange(len(rows[0])), *rows))
        return w, s, jnp.moveaxis(o, 0, 1)

    def double(tree):
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)

    with jax.enable_x64(True):
        def both(args, cotangents):
            out, back = jax.vjp(run, args)
            return out, back(cotangents)[0]

        return jax.device_get(jax.jit(both)(double(args), double(cotangents)))
