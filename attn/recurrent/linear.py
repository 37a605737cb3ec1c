"""Linear attention: the recurrence with decay that every linear mechanism rests on.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t,    o_t = q_t S_t,    S [D,V] in float32

`naive` is that loop. `recurrence` computes it by chunks: inside one the loop is written
out as a small masked matrix of q.k, for all chunks at once, and between chunks only the
state is carried, by a scan (`attn/recurrent/linear_chunked.py`, or a kernel). Time and
memory are linear in T, and the result does not depend on the chunk's size.

The log decay g <= 0 is absent, a constant of each head, one number a token and head, or
one a token, head and channel. Only exponents <= 0 are ever computed, as sums of the
decays that lie between two tokens, so that any decay, however strong, is safe.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.contract.varying import varying
from attn.parallel.sharding import Axis
from attn.recurrent.chunks import only
from attn.recurrent.lasp import CarryIn, carry_in
from attn.recurrent.linear_chunked import FLOOR, chunked
from pallas_kernels.linear import api as kernels


class LinearState(NamedTuple):
    """memory [B,H,D,V] float32, the state after the last token; end [B] int32 the next
    token's position; segment [B] int32 the last token's segment, -1 before the first.
    """

    memory: jax.Array
    end: jax.Array
    segment: jax.Array


def empty(batch: int, *shape: int) -> LinearState:
    """The state before the first token, memory [B,*shape]. It does not grow with the
    number of tokens to come."""
    return LinearState(
        jnp.zeros((batch, *shape), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.full((batch,), -1, jnp.int32),
    )


def naive(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: Any,
    segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence as it is written, token by token -> state [B,H,D,V], o [B,T,H,V],
    float32. Arguments as for `recurrence`, which is this one for T = 1."""
    t, h = q.shape[1:3]
    q, k, v = (jnp.repeat(a.astype(jnp.float32), h // a.shape[2], 2) for a in (q, k, v))
    g = token_decays(log_decay, t)

    def step(carry, token):
        state, present = carry  # [B,H,D,V], and its segment [B]
        q, k, v, g, segment = token  # [B,H,D] [B,H,D] [B,H,V] [B|1,H,1|D] [B]
        old = state if g is None else jnp.exp(g)[..., None] * state  # exp(g_t) S_{t-1}
        same = None if segment is None else (segment == present)[:, None, None, None]
        # S_t = exp(g_t) S_{t-1} + k_t^T v_t, where a new segment begins with 0
        new = only(same, old) + jnp.einsum("bhd,bhv->bhdv", k, v)
        o = jnp.einsum("bhd,bhdv->bhv", q, new)  # o_t = q_t S_t: [D] [D,V]
        if segment is None:
            return (new, present), o
        real = (segment > 0)[:, None, None]
        state = jnp.where(real[..., None], new, state)
        return (state, jnp.where(segment > 0, segment, present)), only(real, o)

    tokens = q, k, v, g, segment
    first = varying((state, jnp.ones(state.shape[:1], jnp.int32)), tokens)
    if t == 1:  # is no loop
        (state, _), o = step(first, jax.tree.map(lambda a: a[:, 0], tokens))
        return state, o[:, None]
    # [B,T,...] -> [T,B,...]
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens)
    (state, _), o = jax.lax.scan(step, first, tokens)
    return state, jnp.moveaxis(o, 0, 1)


def recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment: jax.Array | None = None,
    axis: Axis | None = None,
    chunk: int = 64,
    reverse: bool = False,
    scale: float = 1.0,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array]:
    """The recurrence over T tokens -> state [B,H,D,V] float32, scale o [B,T,H,V].

    q [B,T,H,D], k [B,T,K,D], v [B,T,K,V]; log_decay [H], [B,T,H] or [B,T,H,D], at most
    0; state [B,H,D,V] is seen by tokens of segment 1. segment [B,T] as in
    `attn.contract.segments`: padding writes nothing, does not decay, and its output is
    0. dtype: of o. `reverse` reads from the last token to the first, without a state.

    axis: the mesh axis that T is split over, inside `shard_map` (LASP-2, Sun et al.,
    2025, arXiv:2502.07563): every shard gathers one state of each, whatever T is, and
    in the backward pass one gradient of a state. The state is the same on all shards,
    and so is the one given back; it is None over an axis where none came in. Segments
    are numbered in the global view.
    """
    _check(q, k, v, log_decay, state, segment, chunk, reverse)
    if reverse:
        q, k, v, log_decay, segment = _turned(q, k, v, log_decay, segment)
    (b, t, h, d), join = q.shape, None
    if axis is not None:
        fixed = segment is None and (log_decay is None or log_decay.ndim == 1)
        join = functools.partial(
            _shard_carry_in, segment=segment, state=state, axis=axis, reverse=reverse,
            heads=k.shape[2], alike=fixed)
    elif state is None:
        state = jnp.zeros((b, h, d, v.shape[-1]), jnp.float32)
    alone = t == 1 and axis is None  # a chunk of one token would be padding

    def xla() -> tuple[Any, jax.Array]:
        if alone:
            found = naive(q, k, v, log_decay, state=state, segment=segment)
        else:
            found = chunked(q, k, v, log_decay, segment, chunk, state, join)
        return _scaled(found, scale, dtype)

    def kernel(backend):
        call = functools.partial(
            kernels.linear, q, k, v, log_decay, segment=segment, backend=backend,
            interpret=interpreted())
        if join is None:
            return call(state=state, scale=scale, dtype=dtype)
        found = _kernel_shard(
            call, q, token_decays(log_decay, t, segment), segment, join
        )
        return _scaled(found, scale, dtype)

    if alone and implementation is None:
        implementation = "xla"
    tpu, gpu = (functools.partial(kernel, name) for name in ("tpu", "triton"))
    after, o = pick(implementation, xla=xla, tpu=tpu, gpu=gpu)
    return after, jnp.flip(o, 1) if reverse else o


def _scaled(found: tuple, scale: float, dtype) -> tuple[Any, jax.Array]:
    after, o = found
    return after, (o if scale == 1 else o * scale).astype(dtype)


def _kernel_shard(call: Callable, q, g, segment, join: Callable) -> tuple:
    """A shard reads its tokens from an empty state; what the state that comes in gives
    them is added. The gather follows the kernel, which makes state and o at once."""
    final, o = call()
    begun = join(final, None if g is None else g.sum(1))
    # o is linear in the state: what it gives alone is added
    return begun.after, o + inter_shard(q, g, segment, begun)


def _turned(q, k, v, log_decay, segment):
    """The same tokens from the last to the first."""
    q, k, v = (jnp.flip(a, 1) for a in (q, k, v))
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = jnp.flip(log_decay, 1)
    if segment is not None:  # segments have to rise, read this way too
        segment = jnp.flip(only(segment > 0, 2**30 - segment), 1)
    return q, k, v, log_decay, segment


def _shard_carry_in(
    final, total, *, segment, state, axis, reverse, heads, alike
) -> CarryIn:
    """What this shard begins with, given its state at the end [B,H,D,V] and log decay
    [B|1,H,1|D]. Without decay the query heads of a key head have one state, and one is
    gathered; a decay is of query heads, and then so are the states that it makes."""
    # without decay those of a group are alike: [B,H,D,V] -> [B,K,D,V]
    copies = final.shape[1] // heads if total is None else 1
    factor = None if total is None else jnp.exp(total)
    found = carry_in(
        final[:, ::copies], factor, None if segment is None else segment.max(1), axis,
        state=state, alike=alike, reverse=reverse,
    )
    copies = final.shape[1] // found.state.shape[1]
    # [B,K,D,V] -> [B,H,D,V]
    return found._replace(state=jnp.repeat(found.state, copies, 1))


def token_decays(
    log_decay, t: int, segment: jax.Array | None = None
) -> jax.Array | None:
    """Log decays [B|1,T,H,1|D] float32 of T = t tokens, 0 at the padding of segment."""
    if log_decay is None:
        return None
    g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
    if g.ndim == 1:
        g = jnp.broadcast_to(g[None, None], (1, t, *g.shape))
    g = g if g.ndim == 4 else g[..., None]  # [B,T,H] -> [B,T,H,1]
    return g if segment is None else only((segment > 0)[..., None, None], g)


def inter_shard(q, g, segment, begun: CarryIn) -> jax.Array:
    """o [B,T,H,V] float32 of the state alone that a shard begins with: o_t = exp(g_1 +
    .. + g_t) q_t S. g of `token_decays`."""
    q = q.astype(jnp.float32)
    q = q if g is None else q * jnp.exp(jnp.cumsum(g, 1))  # exp(g_1 + .. + g_t) q_t
    if segment is not None:
        present = jnp.broadcast_to(
            jnp.asarray(begun.segment, segment.dtype), segment.shape[:1]
        )
        q = only(((segment == present[:, None]) & (segment > 0))[..., None, None], q)
    # only tokens of the segment that the state is of see it: [T,D] [D,V]
    return jnp.einsum("bthd,bhdv->bthv", q, begun.state)


def _check(q, k, v, log_decay, state, segment, chunk: int, reverse: bool) -> None:
    (b, t, h, d), width = q.shape, v.shape[-1]
    if not k.shape[1] == v.shape[1] == t:
        raise ValueError(f"{t} queries and {k.shape[1]} keys: T must be S")
    if reverse and state is not None:
        raise ValueError("reverse=True with a state: expected None, no stream ends so")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected 1 or more tokens")
    if log_decay is not None and log_decay.shape not in ((h,), (b, t, h), (b, t, h, d)):
        raise ValueError(
            f"log_decay has shape {log_decay.shape}: expected {(h,)}, {(b, t, h)} or "
            f"{(b, t, h, d)}"
        )
    if state is not None and state.shape != (b, h, d, width):
        raise ValueError(
            f"state has shape {state.shape}: expected {(b, h, d, width)}"
        )
    if segment is not None and segment.shape != (b, t):
        raise ValueError(f"segment has shape {segment.shape}: expected {(b, t)}")
