"""Linear attention: the recurrence with decay that every linear mechanism rests on.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t,    o_t = q_t S_t,    S [D,V] in float32

Inside a chunk of tokens the recurrence is written out as a small masked matrix of q.k,
for all chunks at once; between chunks only the state travels, by a scan. Time and
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
from attn.contract.shapes import check
from attn.parallel.sharding import Axis
from attn.recurrent.chunks import only
from attn.recurrent.lasp import Before, prefix
from attn.recurrent.linear_chunked import FLOOR, recurred, travel
from pallas_kernels.linear import api as kernels


class LinearState(NamedTuple):
    """memory [B,H,D,V] float32, the state after the last token; end [B] int32 the next
    token's position; segment [B] int32 the last token's segment, -1 before the first.
    """

    memory: jax.Array
    end: jax.Array
    segment: jax.Array


def empty(size: int, batch: int, *shape: int) -> LinearState:
    """The state before the first token, memory [B,*shape]. It does not grow with
    `size`, the number of tokens to come."""
    if size < 1:
        raise ValueError(f"size: a memory for {size} tokens, expected 1 or more")
    return LinearState(
        jnp.zeros((batch, *shape), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.full((batch,), -1, jnp.int32),
    )


def check_state(state: LinearState, shape: tuple) -> None:
    """Raises ValueError unless the memory of `state` has this shape."""
    if not isinstance(state, LinearState):
        raise ValueError(f"state is a {type(state).__name__}: expected a LinearState")
    if state.memory.shape != shape:
        raise ValueError(f"state holds {state.memory.shape}: expected {shape}")


def recur(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    run: jax.Array | None = None,
    chunk: int = 64,
    scale: float = 1.0,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence over T tokens -> state [B,H,D,V] float32, scale o [B,T,H,V].

    q [B,T,H,D], k [B,T,K,D], v [B,T,K,V]; log_decay [H], [B,T,H] or [B,T,H,D], at most
    0; state [B,H,D,V] is seen by tokens of run 1. run [B,T] as in `attn.segments`:
    padding writes nothing, does not decay, and its output is 0. dtype: of o.
    """
    _check(q, k, v, log_decay, state, run, chunk)
    if state is None:
        b, _, h, d = q.shape
        state = jnp.zeros((b, h, d, v.shape[-1]), jnp.float32)

    def xla():
        if q.shape[1] == 1:
            return one(state, q, k, v, log_decay, run=run)
        begin = lambda local, g, runs: Before(state, 1, None)
        return recurred(q, k, v, log_decay, run, chunk, begin)[:2]

    def scaled():
        after, o = xla()
        return after, (o if scale == 1 else o * scale).astype(dtype)

    if q.shape[1] == 1 and implementation is None:
        return scaled()  # a chunk of one token would be padding
    kernel = lambda backend: lambda: kernels.linear(
        q, k, v, log_decay, state=state, run=run, scale=scale, dtype=dtype,
        backend=backend, interpret=interpreted(),
    )
    return pick(implementation, xla=scaled, tpu=kernel("tpu"), gpu=kernel("triton"))


def one(
    state: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    run: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`recur` for T = 1, as in decoding: no chunk is made."""
    h = q.shape[2]
    q, k, v = (
        jnp.repeat(a[:, 0].astype(jnp.float32), h // a.shape[2], 1) for a in (q, k, v)
    )
    new, old = jnp.einsum("bhd,bhv->bhdv", k, v), state
    if log_decay is not None:
        g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
        g = g[None] if g.ndim == 1 else g[:, 0]
        old = old * jnp.exp(g if g.ndim == 3 else g[..., None])[..., None]
    after = old + new
    if run is not None:
        r = run[:, :, None, None]
        after = jnp.where(r == 1, after, jnp.where(r > 1, new, state))
        q = only(r[..., 0] > 0, q)
    return after, jnp.einsum("bhd,bhdv->bhv", q, after)[:, None]


def across(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    run: jax.Array | None = None,
    chunk: int = 64,
    axis: Axis | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[jax.Array | None, jax.Array]:
    """`recur` where T is split over mesh axis `axis`, inside `shard_map` -> state, o
    (LASP-2, Sun et al., 2025, arXiv:2502.07563).

    Every shard gathers one state of each, whatever T is, and in the backward pass one
    gradient of a state. state [B,H,D,V] is the same on all shards, and so is the one
    given back; it is None over an axis where none came in. Runs are numbered in the
    global view. `reverse` reads from the last token to the first, without a state.
    Without an axis it is `recur`.
    """
    _check(q, k, v, log_decay, state, run, chunk)
    if reverse and state is not None:
        raise ValueError("reverse=True with a state: expected None, no stream ends so")
    flip = lambda a: jnp.flip(a, 1) if reverse else a
    q, k, v = flip(q), flip(k), flip(v)
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = flip(log_decay)
    if reverse and run is not None:
        run = flip(only(run > 0, 2**30 - run))  # runs have to rise, read this way too
    how: dict[str, Any] = {"chunk": chunk, "implementation": implementation}
    if axis is None:
        after, o = recur(
            q, k, v, log_decay, state=state, run=run, scale=scale, dtype=dtype, **how
        )
        return after, flip(o)
    join = functools.partial(
        _joined, run=run, state=state, axis=axis, reverse=reverse,
        copies=q.shape[2] // k.shape[2] if log_decay is None else 1,
        alike=run is None and (log_decay is None or log_decay.ndim == 1),
    )
    after, o = _split(q, k, v, log_decay, run, join, **how)
    return after, flip((o if scale == 1 else o * scale).astype(dtype))


def _joined(final, total, *, run, state, axis, reverse, copies, alike) -> Before:
    """What this shard begins with, given its state at the end [B,H,D,V] and log decay
    [B|1,H,1|D]. Without decay `copies` query heads have one state, and one is gathered;
    a decay is of query heads, and then so are the states that it makes."""
    factor = None if total is None else jnp.exp(total)
    last = None if run is None else run.max(1)
    found = prefix(
        final[:, ::copies], factor, last, axis, state=state, alike=alike,
        reverse=reverse,
    )
    copies = final.shape[1] // found.state.shape[1]
    return found._replace(state=jnp.repeat(found.state, copies, 1))


def _split(q, k, v, log_decay, run, join: Callable, chunk: int, implementation):
    """The state after all shards and o [B,T,H,V] float32 of this one. In XLA's form the
    gather needs nothing of what the tokens of a chunk give each other, and can overlap
    with it; a kernel makes both at once, and the gather follows it."""
    def before(local, g, runs):
        final, _ = travel(jnp.zeros_like(local[0]), local, g, runs)
        total = None if g is None else g.sum(3).sum(0) * (len(local) / len(g))
        return join(final, total)

    def kernel(backend):
        final, o = kernels.linear(
            q, k, v, log_decay, run=run, backend=backend, interpret=interpreted())
        begun, entered = entering(q, log_decay, run, functools.partial(join, final))
        return begun.after, o + entered

    def xla():
        after, o, begun = recurred(q, k, v, log_decay, run, chunk, before)
        return begun.after, o

    return pick(
        implementation, xla=xla, tpu=lambda: kernel("tpu"),
        gpu=lambda: kernel("triton"),
    )


def entering(q, log_decay, run, begin: Callable) -> tuple[Before, jax.Array]:
    """What `begin` gives, and o [B,T,H,V] float32 of that state alone. begin(total log
    decay [B|1,H,1|D] or None) -> `Before`."""
    g = None
    if log_decay is not None:
        g = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
        if g.ndim == 1:
            g = jnp.broadcast_to(g[None, None], (1, q.shape[1], *g.shape))
        g = g if g.ndim == 4 else g[..., None]
        g = g if run is None else only(run[..., None, None] > 0, g)
    begun = begin(None if g is None else g.sum(1))
    q = q.astype(jnp.float32)
    q = q if g is None else q * jnp.exp(jnp.cumsum(g, 1))
    if run is not None:
        present = jnp.broadcast_to(jnp.asarray(begun.run, run.dtype), run.shape[:1])
        q = only(((run == present[:, None]) & (run > 0))[..., None, None], q)
    return begun, jnp.einsum("bthd,bhdv->bthv", q, begun.state)


def _check(q, k, v, log_decay, state, run, chunk: int) -> None:
    check(q, k, v, aligned=True)
    (b, t, h, d), width = q.shape, v.shape[-1]
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
    if run is not None and run.shape != (b, t):
        raise ValueError(f"run has shape {run.shape}: expected {(b, t)}")
