"""The delta rule by chunks: XLA's form of `attn/recurrent/delta_rule.py`.

All chunks are solved at once, each as a lower triangular system that is linear in the
state that it begins with; only the state is carried between them, by a scan.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.varying import varying
from attn.recurrent.chunks import (
    ChunkSegments, exact_pairs, filled, from_chunks, only, pair_decays, pairs,
    pairs_by_channel, segments_of, to_chunks,
)
from attn.recurrent.linear_chunked import BLOCK, decays
from attn.recurrent.triangular import solve


def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    segment: jax.Array | None,
    chunk: int,
    scale: float,
    state: Any,
    carry_in: Callable | None = None,
) -> tuple[Any, jax.Array]:
    """The state after the last token, and scale o [B,T,H,V] float32.

    state [B,H,D,V]: what the first chunk begins with, of segment 1. Over a mesh
    carry_in( [M | A]) -> `CarryIn` says that, given what the shard makes of
    `unknown_state`, and the state is the one after all shards.
    """
    (b, t, h), d, width = beta.shape, q.shape[3], v.shape[3]
    q, p, k, u, w, factor = system(q, k, v, beta, log_decay, segment, chunk, scale)
    if carry_in is None:
        after, (states, u) = carry(state, factor, k, u, w)
        return after, from_chunks(q @ states + p @ u, t)  # [c,D] [D,V] + [c,c] [c,V]
    wide = jnp.pad(u, [(0, 0)] * 4 + [(0, d)])  # [N,B,H,c,V+D]: A writes no values
    final, (states, _) = carry(unknown_state(b, h, d, width), factor, k, wide, w)
    begun = carry_in(final)
    # M + A S: what each chunk begins with, now that S is known
    states = states[..., :width] + states[..., width:] @ begun.state[None]
    return begun.after, from_chunks(q @ states + p @ (u - w @ states), t)


def unknown_state(b: int, h: int, d: int, width: int) -> jax.Array:
    """[0 | I] [B,H,D,V+D]: as a state without values to write, its last columns become
    A, and what queries read there is how they depend on the state that comes in."""
    eye = jnp.broadcast_to(jnp.eye(d, dtype=jnp.float32), (b, h, d, d))
    return jnp.concatenate([jnp.zeros((b, h, d, width), jnp.float32), eye], -1)


def system(q, k, v, beta, log_decay, segment, chunk: int, scale: float):
    """`intra_chunk` of all chunks, and the factors of the states that they begin with.
    """
    t, h = beta.shape[1:]
    # decays by channel are paired within blocks, of which a chunk has a whole number
    block = min(BLOCK, t) if log_decay is not None and log_decay.ndim == 4 else 1
    c = -(-min(chunk, t) // block) * block
    row = filled(segment, t, c)
    q, k, v = (to_chunks(a, c, h) for a in (q, k, v))
    beta, g = to_chunks(beta[..., None], c), decays(log_decay, row, t, c)
    if row is not None:
        beta = only((row > 0).reshape(row.shape[0], -1, 1, c, 1).swapaxes(0, 1), beta)
    segments = segments_of(row, c)
    # the backward pass solves a chunk again, and keeps no more of it than the solution
    intra = jax.checkpoint(functools.partial(intra_chunk, block=block))
    q, p, k, u, w = intra(q * scale, k, v, beta, g, segments)
    factor = jnp.ones((1,) * 5, jnp.float32)
    factor = factor if g is None else jnp.exp(g.sum(3))[..., None]
    factor = only(segments.keeps, factor)
    return q, p, k, u, w, jnp.broadcast_to(factor, (k.shape[0], *factor.shape[1:]))


def carry(state, factor, k, u, w):
    """The last state [B,H,D,V], the states that chunks begin with and what they then
    write: u_n = u_0 - w S_n [c,V],  S_(n+1) = factor_n S_n + k_n^T u_n."""
    def pass_on(state, chunk):
        factor, k, u, w = chunk
        u = u - w @ state  # [c,D] [D,V]
        return factor * state + k.swapaxes(-1, -2) @ u, (state, u)  # [D,c] [c,V]

    chunks = factor, k, u, w
    return jax.lax.scan(pass_on, varying(state, chunks), chunks)


def intra_chunk(q, k, v, beta, g, segments: ChunkSegments, block: int):
    """What does not depend on the state: q as it meets the state the chunk begins with,
    the weights p [N,B,H,c,c] of what is written, k as it writes into the state the
    chunk ends with, and u = u_0 - w S_0 as u_0 [N,B,H,c,V] and w [N,B,H,c,D]. block: of
    tokens whose channels decay by themselves, 1 where a head decays as one."""
    before = jnp.tril(jnp.ones((1, 1, 1, q.shape[3], q.shape[3]), bool), -1)
    if block == 1:
        decay = pair_decays(g)
        found, p = tuple(s * decay for s in exact_pairs(k)), pairs(q, k, g)
    else:
        own = pairs_by_channel(k, k, g, block)
        found, p = (own, jnp.zeros_like(own)), pairs_by_channel(q, k, g, block)
    a = tuple(only(before, only(segments.seen, s)) for s in found)
    p = only(segments.seen, p)
    early, late = k, k
    if g is not None:
        entered = jnp.exp(jnp.cumsum(g, 3))  # exp(G_i), from the chunk's beginning
        later = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], 3)
        q, early = q * entered, k * entered
        late = k * jnp.exp(jax.lax.cumsum(later, 3, reverse=True))
    # (I + A) [u_0 | w] = beta [v | exp(G) k]
    right = jnp.concatenate([v, only(segments.enters, early)], -1)
    solved, width = solve(beta, a, right), v.shape[-1]  # [c,V+D]
    u, w = solved[..., :width], solved[..., width:]
    return only(segments.enters, q), p, only(segments.stays, late), u, w
