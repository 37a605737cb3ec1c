"""Linear attention by chunks: XLA's form of `attn/recurrent/linear.py`.

Inside a chunk of tokens the recurrence is written out as a small masked matrix of q.k,
for all chunks at once; between chunks only the state travels, by a scan. Only exponents
<= 0 are ever computed, as sums of the decays that lie between two tokens, so that any
decay, however strong, is safe.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.varying import varying
from attn.recurrent.chunks import (
    ChunkSegments, filled, from_chunks, only, pairs, pairs_by_channel, segments_of,
    to_chunks,
)
from attn.recurrent.lasp import CarryIn

# exp of it is 0 in float32, so a log decay below it says nothing more
FLOOR = -128.0
# decays by channel are paired within blocks of so many tokens
BLOCK = 8


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    segment: jax.Array | None,
    chunk: int,
    state: Any,
    carry_in: Callable | None = None,
) -> tuple[Any, jax.Array]:
    """The state after the last token, and o [B,T,H,V] float32.

    state [B,H,D,V]: what the first chunk begins with, of segment 1. Over a mesh
    carry_in(the state at this shard's end, its log decay) -> `CarryIn` says that, and
    the state is the one after all shards. That gather needs nothing of what the tokens
    of a chunk give each other, and can overlap with it.
    """
    t, h = q.shape[1:3]
    block = min(BLOCK, t) if log_decay is not None and log_decay.ndim == 4 else 1
    c = -(-min(chunk, t) // block) * block
    row = filled(segment, t, c)
    g = decays(log_decay, row, t, c)  # [N|1,B|1,H,c,1|D]
    q, k, v = to_chunks(q, c), to_chunks(k, c, h), to_chunks(v, c, h)  # [N,B,H,c,D|V]
    segments = segments_of(row, c, 0)
    # the backward pass computes a chunk again, and keeps no more of it than q, k and v
    intra = jax.checkpoint(functools.partial(intra_chunk, block=block))
    o, added = intra(q, k, v, g, segments)
    if carry_in is None:
        begun = CarryIn(state, 1, None)
    else:
        final, _ = carry(jnp.zeros_like(added[0]), added, g, segments)
        # a decay that all chunks share stands there once
        total = None if g is None else g.sum(3).sum(0) * (len(added) / len(g))
        begun = carry_in(final, total)
    segments = segments_of(row, c, begun.segment)
    after, states = carry(begun.state, added, g, segments)
    o = from_chunks(o + jax.checkpoint(inter_chunk)(q, g, segments, states), t)
    return after if carry_in is None else begun.after, o


def decays(log_decay, row, t: int, c: int) -> jax.Array | None:
    """Log decays as chunks [N|1,B|1,H,c,1|D], 0 at padding; row: of
    `attn.recurrent.chunks.filled`."""
    if log_decay is None:
        return None
    g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
    if g.ndim == 1:
        length = c if row is None else t  # without padding all chunks are alike
        g = jnp.broadcast_to(g[None, None], (1, length, *g.shape))
    g = to_chunks(g if g.ndim == 4 else g[..., None], c)
    if row is None:
        return g
    real = (row > 0).reshape(row.shape[0], -1, 1, c, 1).swapaxes(0, 1)
    return only(real, g)


def intra_chunk(
    q, k, v, g, segments: ChunkSegments, block: int
) -> tuple[jax.Array, jax.Array]:
    """What a chunk's tokens give each other [N,B,H,c,V], and what they add to the state
    [N,B,H,D,V]: with G_ij the decay between two tokens and c the last one,

        o_i = sum_(j<=i) exp(G_ij) (q_i.k_j) v_j,    sum_j exp(G_cj) k_j^T v_j
    """
    s = pairs(q, k, g) if block == 1 else pairs_by_channel(q, k, g, block)
    o = jnp.einsum("nbhij,nbhjv->nbhiv", only(segments.seen, s), v)  # [c,c] [c,V]
    if g is not None:
        later = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], 3)
        k = k * jnp.exp(jax.lax.cumsum(later, 3, reverse=True))
    return o, jnp.einsum(
        "nbhjd,nbhjv->nbhdv", only(segments.stays, k), v
    )  # [D,c] [c,V]


def inter_chunk(q, g, segments: ChunkSegments, states) -> jax.Array:
    """What the states [N,B,H,D,V] that chunks begin with give their tokens: o_i =
    exp(G_i) q_i S [N,B,H,c,V], G_i the decay from there to token i."""
    if g is not None:
        q = q * jnp.exp(jnp.cumsum(g, 3))
    return jnp.einsum(
        "nbhid,nbhdv->nbhiv", only(segments.enters, q), states
    )  # [c,D] [D,V]


def carry(state, added, g, segments: ChunkSegments) -> tuple[jax.Array, jax.Array]:
    """The last state [B,H,D,V] and those that chunks begin with [N,B,H,D,V]:
    S_(n+1) = exp(G_n) S_n + added_n, G_n the decay over chunk n."""
    factor = jnp.ones((1,) * 5, jnp.float32)
    factor = factor if g is None else jnp.exp(g.sum(3))[..., None]
    factor = only(segments.keeps, factor)  # [N|1,B|1,H|1,1|D,1]
    factor = jnp.broadcast_to(factor, (added.shape[0], *factor.shape[1:]))

    def pass_on(state, chunk):
        factor, added = chunk
        return factor * state + added, state

    chunks = factor, added
    return jax.lax.scan(pass_on, varying(state, chunks), chunks)
