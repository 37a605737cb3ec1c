"""Probes: one query for a window of tokens, and how blocks and layers are weighed by it
(ActQKV, Xiao et al., 2025, arXiv:2502.13542)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def probe(h: jax.Array, real: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(weights [B,T], probe [B,C]) of queries h [B,T,C] float32, of which `real` [B,T]
    count. A single one is its own probe."""
    real = jnp.ones(h.shape[:2], bool) if real is None else real
    n = real.sum(1).astype(jnp.float32)[:, None]
    own = jnp.where(real[..., None], h, 0)
    mean = own.sum(1) / jnp.maximum(n, 1)
    gap = jnp.where(real[..., None], (h - mean[:, None]) ** 2, 0)
    s2 = gap.sum(1) / jnp.maximum(n - 1, 1)  # unbiased
    # dev_id = (h_id - mu_d)^2 / (s2_d + mean_d(s2) / 100)
    total = s2 + s2.mean(1, keepdims=True) / 100
    dev = (gap / jnp.where(total > 0, total, 1)[:, None]).mean(2)  # beta [B,T]
    # of one token, or of equal ones, the mean
    even = real.astype(jnp.float32) / jnp.maximum(n, 1)
    whole = dev.sum(1, keepdims=True)
    w = jnp.where(whole > 0, dev / jnp.where(whole > 0, whole, 1), even)
    # [B,T] x [B,T,C] -> [B,C]
    return w, jnp.einsum("bt,btc->bc", w, own)


def represented(k: jax.Array, score: jax.Array, many: int) -> jax.Array:
    """z [...,N,H D]: the mean of the `many` keys with the greatest score, by head, of
    blocks k [...,N,H,b,D] with scores [...,N,H,b]."""
    _, best = jax.lax.top_k(score, many)  # [...,N,H,many]
    z = jnp.take_along_axis(k, best[..., None], -2).mean(-2)  # [...,N,H,D]
    return z.reshape(*z.shape[:-2], -1)


def block_scores(z: jax.Array, p: jax.Array) -> jax.Array:
    """cos(z_B, p) [B,N] of blocks z [B,N,C] and probes p [B,C]; 0 for one of zeros."""
    size = jnp.linalg.norm(z, axis=2) * jnp.linalg.norm(p, axis=1)[:, None]
    dot = jnp.einsum("bnc,bc->bn", z, p)  # [B,N,C] x [B,C] -> [B,N]
    return jax.lax.stop_gradient(dot / jnp.where(size > 0, size, 1))


def entropy(score: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H = -sum pi log(pi + 1e-10) of pi = softmax(score [...,N]), and H / log N; of one
    block 0."""
    pi = jax.nn.softmax(score)
    found = -(pi * jnp.log(pi + 1e-10)).sum(-1)
    n = score.shape[-1]
    return found, found / np.log(n) if n > 1 else jnp.zeros_like(found)


def entropy_of(score: jax.Array, many: jax.Array) -> jax.Array:
    """H / log N [B] of the first N = `many` [B] entries of score [B,n]; 0 of one."""
    there = jnp.arange(score.shape[1])[None] < many[:, None]
    top = jnp.where(there, score, -jnp.inf).max(1, keepdims=True)
    e = jnp.where(there, jnp.exp(score - jnp.where(many[:, None] > 0, top, 0)), 0)
    pi = e / jnp.maximum(e.sum(1, keepdims=True), 1)  # the greatest counts 1
    found = -jnp.where(there, pi * jnp.log(pi + 1e-10), 0).sum(1)
    size = jnp.log(jnp.maximum(many, 2).astype(jnp.float32))
    return jnp.where(many > 1, found / size, 0)


def shares(
    means: Any, layer: int, pool: float, least: int, most: int, warm: bool
) -> int:
    """How many blocks layer `layer` gets of what is left of the pool: by its mean
    normalised entropy [L] against those of the layers that follow, or, while not `warm`
    (too few samples, or in a prompt), as many as each of those. Rounds half to even."""
    left = len(means) - layer
    share = means[layer] / sum(means[layer:]) if warm else 1 / left
    return int(np.clip(np.round(share * pool), least, most))


class Pool(NamedTuple):
    """What layers share in one step: left [B,W] float32, blocks of the pool of each
    window of the step that no layer has taken yet; means [B,L] of the layers' entropies
    before it; warm [B]: shares go by them; layer [] int32: whose turn it is."""

    left: jax.Array
    means: jax.Array
    warm: jax.Array
    layer: jax.Array


def pooled_share(
    pool: Pool, left: jax.Array, mean: jax.Array, least: jax.Array, most: jax.Array
) -> jax.Array:
    """`shares` under a trace: blocks [B] int32 of one window for the layer whose turn
    it is, of left [B] blocks; mean [B]: of its entropy now. least, most [B]."""
    layers = pool.means.shape[1]
    later = jnp.arange(layers)[None] > pool.layer
    total = mean + jnp.where(later, pool.means, 0).sum(1)
    even = 1 / (layers - pool.layer).astype(jnp.float32)
    share = jnp.where(pool.warm, mean / jnp.where(total > 0, total, 1), even)
    return jnp.clip(jnp.round(share * left), least, most).astype(jnp.int32)


class Running(NamedTuple):
    """Running mean and variance [C] of windows, and how many there were: the authors'
    statistics."""

    mean: jax.Array
    var: jax.Array
    windows: int


def running(state: Running | None, h: jax.Array, most: int = 1000) -> tuple:
    """(statistics, dev [n,C]) after a window h [n,C]. As in the authors' code dev is
    all ones, and the probe the mean, until more than `most` windows came before."""
    n = h.shape[0]
    mean = h.mean(0)
    if state is None:
        state = Running(mean, h.var(0, ddof=1), 1)
    else:
        c = min(state.windows, most)
        # s2 <- (s2 (c - 1/n) + v + (u - mu)^2 / (1 + 1/c)) / (c + 1 - 1/n)
        gap = (mean - state.mean) ** 2 / (1 + 1 / c)
        var = state.var * (c - 1 / n) + h.var(0) + gap
        state = Running((state.mean * c + mean) / (c + 1), var / (c + 1 - 1 / n),
                        state.windows + 1)
    if state.windows - 1 <= most:  # windows before this one
        return state, jnp.ones_like(h)
    total = state.var + state.var.mean() / 100
    return state, (h - state.mean[None]) ** 2 / total[None]
