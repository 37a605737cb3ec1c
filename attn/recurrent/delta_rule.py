"""The delta rule, with and without decay: a memory that corrects what it holds.

    S' = exp(g_t) S_{t-1},  u_t = beta_t (v_t - k_t S'),  S_t = S' + k_t^T u_t,
    o_t = scale q_t S_t,    S [D,V] in float32

A linear attention adds v_t to whatever k_t already stood for; here only the difference
from what the memory answers to k_t is written, a share beta_t of it. Every u depends on
those before it, inside a chunk by a lower triangular system whose solution is linear in
the state that the chunk begins with (the WY form of a product of Householder matrices):

    (I + A) u = beta (v - exp(G) k S_0),    A_ij = beta_i exp(G_i - G_j) k_i.k_j, j < i

so all chunks are solved at once, and only the state travels between them, by a scan.
Only exponents <= 0 are computed, and the result does not depend on the chunk's size.

Sources: DeltaNet (Yang et al., 2024, arXiv:2406.06484); with the decay, Gated DeltaNet
(Yang et al., 2024, arXiv:2412.06464).
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.parallel.sharding import Axis
from attn.recurrent.chunks import only, unchunked
from attn.recurrent.delta_chunked import system, travel
from attn.recurrent.lasp import Before, prefix
from attn.recurrent.linear_chunked import FLOOR
from pallas_kernels.delta.api import WIDEST, delta

NONE = 2**30  # the first run of a shard that has no tokens, behind all others


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    run: jax.Array | None = None,
    chunk: int = 64,
    scale: float = 1.0,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The rule over T tokens -> state [B,H,D,V] float32, o [B,T,H,V] in `dtype`.

    beta [B,T,H] says what H is; q [B,T,.,D], k [B,T,.,D] and v [B,T,.,V] have H heads
    each, or a number that divides it and serves H/. neighbours: grouped keys and
    values, or, as Gated DeltaNet has them, fewer queries and keys than values.
    log_decay None, [H] or [B,T,H], at most 0; state [B,H,D,V] is seen by tokens of run
    1. run [B,T] as in `attn.segments`: padding writes nothing, does not decay, and its
    output is 0. Keys need not be unit vectors, but |k|^2 beta > 2 makes memories grow.
    chunk: of XLA's form; it changes the time, not the result.
    """
    _check(q, k, v, beta, log_decay, state, run, chunk)
    if state is None:
        (b, _, h), d = beta.shape, q.shape[3]
        state = jnp.zeros((b, h, d, v.shape[3]), jnp.float32)
    xla = lambda: _xla(q, k, v, beta, log_decay, state, run, chunk, scale)
    kernel = lambda backend: lambda: delta(
        q, k, v, beta, log_decay, state=state, run=run, scale=scale, backend=backend,
        interpret=interpreted(),
    )
    if implementation is None and q.shape[1] == 1:
        implementation = "xla"  # one token makes no chunk
    after, o = pick(implementation, xla=xla, gpu=kernel("triton"), tpu=kernel("tpu"))
    return after, o.astype(dtype)


def one(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    run: jax.Array | None = None,
    scale: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` for T = 1, as in decoding: no system is solved. -> state, o, both
    float32."""
    h = beta.shape[2]
    q, k, v = (
        jnp.repeat(a[:, 0].astype(jnp.float32), h // a.shape[2], 1) for a in (q, k, v)
    )
    old = state
    if run is not None:
        r = run[:, :, None, None]
        old = only(r <= 1, old)
    if log_decay is not None:
        g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
        g = g[None] if g.ndim == 1 else g[:, 0]
        old = old * jnp.exp(g)[..., None, None]
    answer = jnp.einsum("bhd,bhdv->bhv", k, old)
    u = beta[:, 0, :, None].astype(jnp.float32) * (v - answer)
    after = old + jnp.einsum("bhd,bhv->bhdv", k, u)
    if run is not None:
        after = jnp.where(r > 0, after, state)
        q = only(r[..., 0] > 0, q)
    return after, scale * jnp.einsum("bhd,bhdv->bhv", q, after)[:, None]


def across(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    run: jax.Array | None = None,
    chunk: int = 64,
    axis: Axis | None = None,
    scale: float = 1.0,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array]:
    """`delta_rule` where T is split over mesh axis `axis`, inside `shard_map` -> state,
    o. The form over a mesh is proposed here.

    A shard maps the state that comes in to A S + M: every shard gathers A and M, [D,D]
    and [D,V] a head of beta, of each, whatever T is, and in the backward pass one
    gradient of a state. state [B,H,D,V] is the same on all shards, and so is the one
    given back; it is None over an axis where none came in. Runs are numbered in the
    global view. Without an axis it is `delta_rule`.
    """
    options: dict[str, Any] = {"chunk": chunk, "implementation": implementation}
    if axis is None:
        return delta_rule(q, k, v, beta, log_decay, state=state, run=run, scale=scale,
                          dtype=dtype, **options)
    _check(q, k, v, beta, log_decay, state, run, chunk)
    first = last = None
    if run is not None:
        # what comes in can only matter to the shard's first run, which is 1 in here
        first, last = jnp.where(run > 0, run, NONE).min(1), run.max(1)
        run = only(run > 0, run - first[:, None] + 1)
    join = functools.partial(_joined, v.shape[3], first, last, axis, state)
    xla = lambda: _shard(q, k, v, beta, log_decay, run, chunk, scale, join)
    kernel = lambda backend: lambda: _kernel_shard(
        q, k, v, beta, log_decay, run, scale, join, backend)
    after, o = pick(implementation, xla=xla, gpu=kernel("triton"), tpu=kernel("tpu"))
    return after, o.astype(dtype)


def _joined(width: int, first, last, axis, state, final) -> Before:
    """What this shard's first run begins with, given [M | A] [B,H,D,V+D]."""
    found = prefix(final[..., :width], final[..., width:], last, axis, state=state)
    if first is None:
        return found
    own = (found.run == first)[:, None, None, None]
    return found._replace(state=only(own, found.state))


def _unknown(b: int, h: int, d: int, width: int) -> jax.Array:
    """[0 | I] [B,H,D,V+D]: as a state without values to write, its last columns become
    A, and what queries read there is how they depend on the state that comes in."""
    eye = jnp.broadcast_to(jnp.eye(d, dtype=jnp.float32), (b, h, d, d))
    return jnp.concatenate([jnp.zeros((b, h, d, width), jnp.float32), eye], -1)


def _shard(q, k, v, beta, log_decay, run, chunk: int, scale: float, join: Callable):
    (b, t, h), d, width = beta.shape, q.shape[3], v.shape[3]
    q, p, k, u, w, factor = system(q, k, v, beta, log_decay, run, chunk, scale)
    wide = jnp.pad(u, [(0, 0)] * 4 + [(0, d)])
    final, (states, _) = travel(_unknown(b, h, d, width), factor, k, wide, w)
    begun = join(final)
    states = states[..., :width] + states[..., width:] @ begun.state[None]
    return begun.after, unchunked(q @ states + p @ (u - w @ states), t)


def _kernel_shard(q, k, v, beta, log_decay, run, scale, join: Callable, backend: str):
    (b, _, h), d, width = beta.shape, q.shape[3], v.shape[3]
    rule = lambda v, state: delta(
        q, k, v, beta, log_decay, state=state, run=run, scale=scale, backend=backend,
        interpret=interpreted(),
    )
    state, silent = _unknown(b, h, d, width), jnp.zeros((*v.shape[:3], d), v.dtype)
    if width + d <= WIDEST:
        final, o = rule(jnp.concatenate([v, silent], -1), state)
    else:
        both = rule(v, state[..., :width]), rule(silent, state[..., width:])
        final, o = (jnp.concatenate(a, -1) for a in zip(*both))
    begun, o = join(final), o.astype(jnp.float32)
    entered = jnp.einsum("bthd,bhdv->bthv", o[..., width:], begun.state)
    return begun.after, o[..., :width] + entered


def _xla(q, k, v, beta, log_decay, state, run, chunk: int, scale: float):
    if beta.shape[1] == 1:
        return one(state, q, k, v, beta, log_decay, run=run, scale=scale)
    q, p, k, u, w, factor = system(q, k, v, beta, log_decay, run, chunk, scale)
    state, (states, u) = travel(state, factor, k, u, w)
    return state, unchunked(q @ states + p @ u, beta.shape[1])


def _check(q, k, v, beta, log_decay, state, run, chunk: int) -> None:
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
    if log_decay is not None and log_decay.shape not in ((h,), (b, t, h)):
        raise ValueError(
            f"log_decay has shape {log_decay.shape}: expected {(h,)} or {(b, t, h)}"
        )
    if state is not None and state.shape != (b, h, d, width):
        raise ValueError(
            f"state has shape {state.shape}: expected {(b, h, d, width)}"
        )
    if run is not None and run.shape != (b, t):
        raise ValueError(f"run has shape {run.shape}: expected {(b, t)}")
