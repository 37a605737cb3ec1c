"""Linear attention by chunks: XLA's form of `attn/recurrent/linear.py`.

Inside a chunk of tokens the recurrence is written out as a small masked matrix of q.k,
for all chunks at once; between chunks only the state travels, by a scan. Only exponents
<= 0 are ever computed, as sums of the decays that lie between two tokens, so that any
decay, however strong, is safe.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp

from attn.recurrent.chunks import (
    Runs, chunked, filled, only, pairs, pairs_by_channel, runs_of, unchunked
)

# exp of it is 0 in float32, so a log decay below it says nothing more
FLOOR = -128.0
# decays by channel are paired within blocks of so many tokens
BLOCK = 8


def recurred(q, k, v, log_decay, run, chunk: int, begin: Callable):
    """The last state, o, and what `begin(local, g, runs)` gave: the state before the
    first chunk, and its run."""
    t, h = q.shape[1:3]
    block = min(BLOCK, t) if log_decay is not None and log_decay.ndim == 4 else 1
    c = -(-min(chunk, t) // block) * block
    row = filled(run, t, c)
    g = decays(log_decay, row, t, c)
    q, k, v = chunked(q, c), chunked(k, c, h), chunked(v, c, h)
    runs = runs_of(row, c, 0)
    # the backward pass computes a chunk again, and keeps no more of it than q, k and v
    o, local = jax.checkpoint(functools.partial(_inside, block=block))(q, k, v, g, runs)
    begun = begin(local, g, runs)
    runs = runs_of(row, c, begun.run)
    after, states = travel(begun.state, local, g, runs)
    o = unchunked(o + jax.checkpoint(_outside)(q, g, runs, states), t)
    return after, o, begun


def decays(log_decay, row, t: int, c: int) -> jax.Array | None:
    """Log decays as chunks [N|1,B|1,H,c,1|D], 0 at padding; row: of
    `attn.chunks.filled`."""
    if log_decay is None:
        return None
    g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
    if g.ndim == 1:
        length = c if row is None else t  # without padding all chunks are alike
        g = jnp.broadcast_to(g[None, None], (1, length, *g.shape))
    g = chunked(g if g.ndim == 4 else g[..., None], c)
    if row is None:
        return g
    real = (row > 0).reshape(row.shape[0], -1, 1, c, 1).swapaxes(0, 1)
    return only(real, g)


def _inside(q, k, v, g, runs: Runs, block: int) -> tuple[jax.Array, jax.Array]:
    """What a chunk's tokens give each other [N,B,H,c,V], and what they leave in the
    state [N,B,H,D,V]."""
    s = pairs(q, k, g) if block == 1 else pairs_by_channel(q, k, g, block)
    o = jnp.einsum("nbhij,nbhjv->nbhiv", only(runs.seen, s), v)
    if g is not None:
        later = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], 3)
        k = k * jnp.exp(jax.lax.cumsum(later, 3, reverse=True))
    return o, jnp.einsum("nbhjd,nbhjv->nbhdv", only(runs.stays, k), v)


def _outside(q, g, runs: Runs, states) -> jax.Array:
    """What the states [N,B,H,D,V] that chunks begin with give their tokens."""
    if g is not None:
        q = q * jnp.exp(jnp.cumsum(g, 3))
    return jnp.einsum("nbhid,nbhdv->nbhiv", only(runs.enters, q), states)


def travel(state, local, g, runs: Runs) -> tuple[jax.Array, jax.Array]:
    """The last state [B,H,D,V] and those that chunks begin with [N,B,H,D,V]."""
    factor = jnp.ones((1,) * 5) if g is None else jnp.exp(g.sum(3))[..., None]
    factor = only(runs.keeps, factor)
    factor = jnp.broadcast_to(factor, (local.shape[0], *factor.shape[1:]))

    def pass_on(state, chunk):
        factor, added = chunk
        return factor * state + added, state

    return jax.lax.scan(pass_on, state, (factor, local))
