"""The delta rule by chunks: XLA's form of `attn/recurrent/delta_rule.py`.

All chunks are solved at once, each as a lower triangular system that is linear in the
state that it begins with; only the state travels between them, by a scan.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn.recurrent.chunks import Runs, chunked, filled, only, pairs, runs_of
from attn.recurrent.linear_chunked import decays
from attn.recurrent.triangular import inverse


def system(q, k, v, beta, log_decay, run, chunk: int, scale: float):
    """`_inside` of all chunks, and the factors of the states that they begin with."""
    t, h = beta.shape[1:]
    c = min(chunk, t)
    row = filled(run, t, c)
    q, k, v = (chunked(a, c, h) for a in (q, k, v))
    beta, g = chunked(beta[..., None], c), decays(log_decay, row, t, c)
    if row is not None:
        beta = only((row > 0).reshape(row.shape[0], -1, 1, c, 1).swapaxes(0, 1), beta)
    runs = runs_of(row, c)
    # the backward pass solves a chunk again, and keeps no more of it than the solution
    q, p, k, u, w = jax.checkpoint(_inside)(q * scale, k, v, beta, g, runs)
    factor = jnp.ones((1,) * 5) if g is None else jnp.exp(g.sum(3))[..., None]
    factor = only(runs.keeps, factor)
    return q, p, k, u, w, jnp.broadcast_to(factor, (k.shape[0], *factor.shape[1:]))


def travel(state, factor, k, u, w):
    """The last state, and those that chunks begin with and what they then write."""
    def pass_on(state, chunk):
        factor, k, u, w = chunk
        u = u - w @ state
        return factor * state + k.swapaxes(-1, -2) @ u, (state, u)

    return jax.lax.scan(pass_on, state, (factor, k, u, w))


def _inside(q, k, v, beta, g, runs: Runs):
    """What does not depend on the state: q as it meets the state the chunk begins with,
    the weights p [N,B,H,c,c] of what is written, k as it writes into the state the
    chunk ends with, and u = u_0 - w S_0 as u_0 [N,B,H,c,V] and w [N,B,H,c,D]."""
    before = jnp.tril(jnp.ones((1, 1, 1, q.shape[3], q.shape[3]), bool), -1)
    a = only(before, only(runs.seen, beta * pairs(k, k, g)))
    p = only(runs.seen, pairs(q, k, g))
    early, late = k, k
    if g is not None:
        fade = jnp.exp(jnp.cumsum(g, 3))
        later = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], 3)
        q, early = q * fade, k * fade
        late = k * jnp.exp(jax.lax.cumsum(later, 3, reverse=True))
    right = jnp.concatenate([v, only(runs.enters, early)], -1) * beta
    solved, width = inverse(a) @ right, v.shape[-1]
    u, w = solved[..., :width], solved[..., width:]
    return only(runs.enters, q), p, only(runs.stays, late), u, w
