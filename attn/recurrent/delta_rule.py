"""The delta rule, with and without decay: a memory that corrects what it holds.

    S' = exp(g_t) S_{t-1},  u_t = beta_t (v_t - k_t S'),  S_t = S' + k_t^T u_t,
    o_t = scale q_t S_t,    S [D,V] in float32

A linear attention adds v_t to whatever k_t already stood for; here only the difference
from what the memory answers to k_t is written, a share beta_t of it. Every u depends on
those before it, inside a chunk by a lower triangular system whose solution is linear in
the state that the chunk begins with (the WY form of a product of Householder matrices):

    (I + A) u = beta (v - exp(G) k S_0),    A_ij = beta_i exp(G_i - G_j) k_i.k_j, j < i

so all chunks are solved at once, and only the state is carried between them, by a scan.
`naive` is the loop, `recurrence` the same by chunks (`attn/recurrent/delta_chunked.py`)
or by a kernel. Only exponents <= 0 are computed, and the result does not depend on the
chunk's size.

Sources: DeltaNet (Yang et al., 2024, arXiv:2406.06484); with the decay, Gated DeltaNet
(Yang et al., 2024, arXiv:2412.06464); with one of each key channel, exp(g_t) S then
being diag(exp(g_t)) S, Kimi Delta Attention (Kimi team, 2025, arXiv:2510.26692).
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.contract.varying import varying
from attn.parallel.sharding import Axis
from attn.recurrent.chunks import only
from attn.recurrent.delta_chunked import chunked, unknown_state
from attn.recurrent.lasp import CarryIn, carry_in
from attn.recurrent.linear import token_decays
from pallas_kernels.delta.api import WIDEST, delta

NONE = 2**30  # the first segment of a shard that has no tokens, behind all others


def naive(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: Any,
    segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The rule as it is written, token by token -> state [B,H,D,V], o [B,T,H,V],
    float32. Arguments as for `recurrence`, which is this one for T = 1."""
    t, h = beta.shape[1:]
    q, k, v = (jnp.repeat(a.astype(jnp.float32), h // a.shape[2], 2) for a in (q, k, v))
    g, beta = token_decays(log_decay, t), beta.astype(jnp.float32)

    def step(carry, token):
        state, present = carry  # [B,H,D,V], and its segment [B]
        q, k, v, beta, g, segment = token  # [B,H,D] [B,H,D] [B,H,V] [B,H] [B|1,H,1] [B]
        # S' = exp(g_t) S_{t-1}
        old = state if g is None else jnp.exp(g)[..., None] * state
        same = None if segment is None else (segment == present)[:, None, None, None]
        old = only(same, old)
        # u_t = beta_t (v_t - k_t S'): [D] [D,V]
        u = beta[..., None] * (v - jnp.einsum("bhd,bhdv->bhv", k, old))
        new = old + jnp.einsum("bhd,bhv->bhdv", k, u)  # S_t = S' + k_t^T u_t
        o = jnp.einsum("bhd,bhdv->bhv", q, new)  # o_t = q_t S_t
        if segment is None:
            return (new, present), o
        real = (segment > 0)[:, None, None]
        state = jnp.where(real[..., None], new, state)
        return (state, jnp.where(segment > 0, segment, present)), only(real, o)

    tokens = q, k, v, beta, g, segment
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
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment: jax.Array | None = None,
    axis: Axis | None = None,
    chunk: int = 32,
    scale: float = 1.0,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array]:
    """The rule over T tokens -> state [B,H,D,V] float32, scale o [B,T,H,V] in `dtype`.

    beta [B,T,H] says what H is; q [B,T,.,D], k [B,T,.,D] and v [B,T,.,V] have H heads
    each, or a number that divides it and serves H/. neighbours: grouped keys and
    values, or, as Gated DeltaNet has them, fewer queries and keys than values.
    log_decay None, [H], [B,T,H] or, of each channel of the key, [B,T,H,D], at most 0;
    state [B,H,D,V] is seen by tokens of segment 1. segment [B,T] as in
    `attn.contract.segments`: padding writes nothing, does not decay, and its output is
    0. Keys need not be unit vectors, but |k|^2 beta > 2 makes memories grow. chunk: of
    XLA's form; it changes the time, not the result.

    axis: the mesh axis that T is split over, inside `shard_map`, a form that is
    proposed here. A shard maps the state that comes in to A S + M: every shard gathers
    A and M, [D,D] and [D,V] a head of beta, of each, whatever T is, and in the backward
    pass one gradient of a state. The state is the same on all shards, and so is the one
    given back; it is None over an axis where none came in. Segments are numbered in the
    global view.
    """
    _check(q, k, v, beta, log_decay, state, segment, chunk)
    (b, t, h), join = beta.shape, None
    if axis is not None:
        segment, first, last = _renumbered(segment)
        join = functools.partial(_shard_carry_in, v.shape[3], first, last, axis, state)
    elif state is None:
        state = jnp.zeros((b, h, q.shape[3], v.shape[3]), jnp.float32)
    alone = t == 1 and axis is None  # a chunk of one token would be padding

    def xla():
        if alone:
            after, o = naive(q, k, v, beta, log_decay, state=state, segment=segment)
            return after, scale * o
        return chunked(q, k, v, beta, log_decay, segment, chunk, scale, state, join)

    def kernel(backend):
        call = functools.partial(
            delta, q, k, beta=beta, log_decay=log_decay, segment=segment, scale=scale,
            backend=backend, interpret=interpreted())
        if join is None:
            return call(v=v, state=state)
        return _kernel_shard(call, v, h, q.shape[3], join)

    if alone and implementation is None:
        implementation = "xla"
    tpu, gpu = (functools.partial(kernel, name) for name in ("tpu", "triton"))
    after, o = pick(implementation, xla=xla, gpu=gpu, tpu=tpu)
    return after, o.astype(dtype)


def _renumbered(segment) -> tuple:
    """This shard's segments from 1, and its first and last one in the global view: what
    comes in can only matter to the first."""
    if segment is None:
        return None, None, None
    first, last = jnp.where(segment > 0, segment, NONE).min(1), segment.max(1)
    return only(segment > 0, segment - first[:, None] + 1), first, last


def _shard_carry_in(width: int, first, last, axis, state, final) -> CarryIn:
    """What this shard's first segment begins with, given [M | A] [B,H,D,V+D]."""
    found = carry_in(final[..., :width], final[..., width:], last, axis, state=state)
    if first is None:
        return found
    # the state is dropped if this shard begins with another segment
    own = (found.segment == first)[:, None, None, None]
    return found._replace(state=only(own, found.state))


def _kernel_shard(call: Callable, v, h: int, d: int, join: Callable) -> tuple:
    """The kernel with [values | none] from [0 | I], in one call or, where these are too
    many columns, in two; what queries read of A then meets the state that comes in."""
    b, width = v.shape[0], v.shape[3]
    # [0 | I], and values of 0 for the columns that become A
    state, silent = unknown_state(b, h, d, width), jnp.zeros((*v.shape[:3], d), v.dtype)
    if width + d <= WIDEST:
        final, o = call(v=jnp.concatenate([v, silent], -1), state=state)
    else:
        # columns of a state do not mix: two calls give the same
        both = call(v=v, state=state[..., :width]), call(
            v=silent, state=state[..., width:])
        final, o = (jnp.concatenate(a, -1) for a in zip(*both))
    begun, o = join(final), o.astype(jnp.float32)
    # what queries read of A, times S: [T,D] [D,V]
    entered = jnp.einsum("bthd,bhdv->bthv", o[..., width:], begun.state)
    return begun.after, o[..., :width] + entered


def _check(q, k, v, beta, log_decay, state, segment, chunk: int) -> None:
    for name, a, letters in (("q", q, "[B,T,H,D]"), ("k", k, "[B,T,K,D]"),
                             ("v", v, "[B,T,K,V]"), ("beta", beta, "[B,T,H]")):
        if a.ndim != letters.count(",") + 1 or 0 in a.shape:
            raise ValueError(f"{name} has shape {a.shape}: expected {letters}, no 0")
    (b, t, h), d, width = beta.shape, q.shape[3], v.shape[3]
    for name, a, last in (("q", q, d), ("k", k, d), ("v", v, width)):
        if a.shape[:2] != (b, t) or a.shape[3] != last or h % a.shape[2]:
            raise ValueError(
                f"{name} has shape {a.shape}: expected {(b, t)}, heads that divide "
                f"H={h} (that of beta), and width {last}"
            )
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected 1 or more tokens")
    shapes = (h,), (b, t, h), (b, t, h, d)
    if log_decay is not None and log_decay.shape not in shapes:
        raise ValueError(
            f"log_decay has shape {log_decay.shape}: expected one of {shapes}"
        )
    if state is not None and state.shape != (b, h, d, width):
        raise ValueError(
            f"state has shape {state.shape}: expected {(b, h, d, width)}"
        )
    if segment is not None and segment.shape != (b, t):
        raise ValueError(f"segment has shape {segment.shape}: expected {(b, t)}")
