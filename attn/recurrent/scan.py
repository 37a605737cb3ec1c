"""Scan: recurrences whose step is associative, though not linear.

If joining two neighbouring stretches of tokens is an associative operator, the result
for every prefix comes out of a tree of joins: work is linear in T and the depth is a
logarithm. `prefix` does that for any operator. Softmax attention of a query that stays
the same is such a recurrence (Feng et al., 2024, arXiv:2405.13956): what has to be
known of a stretch A of tokens with scores s and values v is the triple

    m_A = max s_i,   u_A = sum exp(s_i - m_A),   w_A = sum v_i exp(s_i - m_A)

and o = w/u. `attend` and `across` are this one, in chunks whose tokens meet in a matrix
product (`attn/recurrent/prefix_softmax.py`) or as kernels.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.parallel.sharding import Axis
from attn.recurrent import prefix_softmax as triples
from attn.recurrent.lasp import before, tagged
from pallas_kernels.scan import api as kernels


class Triple(NamedTuple):
    """A stretch of tokens: m [...,H] its greatest score (-inf: it is empty), u [...,H]
    and w [...,H,V] the sums of exp(s - m) and of v exp(s - m), float32."""

    m: jax.Array
    u: jax.Array
    w: jax.Array


def empty(batch: int, heads: int, width: int) -> Triple:
    """The stretch without tokens, which `join` leaves others as they are with."""
    zeros = jnp.zeros((batch, heads), jnp.float32)
    return Triple(zeros - jnp.inf, zeros, jnp.zeros((batch, heads, width), jnp.float32))


def join(a: Triple, b: Triple) -> Triple:
    """The triple of a stretch and the one behind it. No gradient flows through m, on
    which w/u does not depend."""
    m = jax.lax.stop_gradient(jnp.maximum(a.m, b.m))
    fade_a, fade_b = (triples.exp(jax.lax.stop_gradient(x.m), m) for x in (a, b))
    w = a.w * fade_a[..., None] + b.w * fade_b[..., None]
    return Triple(m, a.u * fade_a + b.u * fade_b, w)


def prefix(
    op: Callable,
    leaves: Any,
    *,
    state: Any = None,
    run: jax.Array | None = None,
    chunk: int = 64,
    axis: Axis | None = None,
    ends: bool = True,
) -> tuple[Any, Any]:
    """The joins of all prefixes -> the last one [B,...], all of them [B,T,...].

    op(a, b): an associative join of a stretch with the one behind it, elementwise on
    leading axes. leaves: arrays [B,T,...], one stretch a token; state [B,...]: what
    came before, seen by run 1. run [B,T] as in `attn.segments`: a new run begins anew,
    padding changes nothing, and what stands at it is what came before it; where nothing
    did, its own leaf. axis: the mesh axis that T is split over, inside `shard_map`;
    shards gather one stretch each, and all give the last join, or None where it is not
    wanted (`ends`).
    """
    some = jax.tree.leaves(leaves)[0]
    (b, t), c = some.shape[:2], min(chunk, some.shape[1])
    run = jnp.ones((b, t), jnp.int32) if run is None else run
    fill = lambda a: jnp.pad(a, [(0, 0), (0, -t % c)] + [(0, 0)] * (a.ndim - 2))
    cut = lambda a: fill(a).reshape(b, -1, c, *a.shape[2:]).swapaxes(0, 1)
    step = tagged(op)
    inside = jax.lax.associative_scan(step, jax.tree.map(cut, (run, leaves)), axis=2)
    tips = jax.tree.map(lambda a: a[:, :, -1], inside)
    first = jnp.ones((b,), jnp.int32), state
    if state is None:
        first = jnp.zeros((b,), jnp.int32), jax.tree.map(lambda a: a[0], tips[1])
    after: Any = None
    if axis is not None:
        begin = jax.tree.map(lambda a: a[0], tips)
        rest = jax.tree.map(lambda a: a[1:], tips)
        own, _ = jax.lax.scan(lambda x, tip: (step(x, tip), None), begin, rest)
        first, after = before(op, own[0], own[1], axis, first, ends)
    last, starts = jax.lax.scan(lambda x, tip: (step(x, tip), x), first, tips)
    wide = lambda a: jnp.broadcast_to(a[:, :, None], (*a.shape[:2], c, *a.shape[2:]))
    _, found = step(jax.tree.map(wide, starts), inside)
    whole = lambda a: a.swapaxes(0, 1).reshape(b, -1, *a.shape[3:])[:, :t]
    last = last if axis is None else after
    return last[1] if ends else None, jax.tree.map(whole, found)


def total(scores: jax.Array, v: jax.Array, run: jax.Array | None = None) -> Triple:
    """The triple of all tokens of the last run. scores [B,T,H], v [B,T,K,V]."""
    s = scores.astype(jnp.float32)
    if run is not None:
        own = (run == run.max(1, keepdims=True)) & (run > 0)
        s = jnp.where(own[..., None], s, -jnp.inf)
    m = jax.lax.stop_gradient(s.max(1))
    p = triples.exp(s, m[:, None])
    b, t, h = s.shape
    grouped = p.reshape(b, t, v.shape[2], -1)
    w = triples.einsum("btkg,btkv->bkgv", grouped, v.astype(jnp.float32))
    return Triple(m, p.sum(1), w.reshape(b, h, -1))


def attend(
    scores: jax.Array,
    v: jax.Array,
    *,
    state: Triple | None = None,
    run: jax.Array | None = None,
    chunk: int = 64,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[Triple, jax.Array]:
    """Softmax over every prefix -> the last triple, o [B,T,H,V] in `dtype`.

    scores [B,T,H], v [B,T,K,V], H a multiple of K; state: the triple [B,H] of the
    tokens before, seen by run 1. run [B,T] as in `attn.segments`; padding gives o = 0.
    The gradients of scores, v, and u and w of the state come from one scan from the
    last token to the first; m is taken as a constant.
    """
    check(scores, v, state, run, chunk)
    b, _, h = scores.shape
    state = empty(b, h, v.shape[-1]) if state is None else state
    xla = lambda: triples.attend(chunk, dtype, scores, v, run, *state)
    one = scores.shape[1] == 1 and implementation is None
    kernel = lambda backend: None if one else lambda: kernels.scan(
        scores, v, (state.m, state.u, state.w), run=run, dtype=dtype, backend=backend,
        interpret=interpreted())
    (m, u, w), o = pick(
        implementation, xla=xla, tpu=kernel("tpu"), gpu=kernel("triton"))
    return Triple(m, u, w), o


def across(
    scores: jax.Array,
    v: jax.Array,
    *,
    state: Triple | None = None,
    run: jax.Array | None = None,
    chunk: int = 64,
    dtype: Any = jnp.float32,
    axis: Axis | None = None,
    implementation: str | None = None,
) -> tuple[Triple | None, jax.Array]:
    """`attend` where T is split over mesh axis `axis`, inside `shard_map`: every shard
    gathers one triple of each, and one gradient of a triple for the backward pass. The
    state is the same on all shards, and so is the one given back; it is None over an
    axis where none came in. Runs are numbered in the global view. Without an axis it is
    `attend`."""
    options: dict[str, Any] = {
        "chunk": chunk, "dtype": dtype, "implementation": implementation
    }
    if axis is None:
        return attend(scores, v, state=state, run=run, **options)
    check(scores, v, state, run, chunk)
    b, _, h = scores.shape
    one = jnp.ones((b,), jnp.int32)
    last = one if run is None else run.max(1)
    first = one, empty(b, h, v.shape[-1]) if state is None else state
    found = before(join, last, total(scores, v, run), axis, first, state is not None)
    (present, begun), after = found
    if run is not None:
        run = jnp.where(run > 0, run - present[:, None] + 1, 0)
    o = attend(scores, v, state=begun, run=run, **options)[1]
    return after[1] if after else None, o


def check(scores, v, state, run, chunk: int) -> None:
    """Raises ValueError unless the arguments of `attend` fit together."""
    if scores.ndim != 3 or v.ndim != 4 or scores.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"scores {scores.shape}, v {v.shape}: expected [B,T,H] and [B,T,K,V]"
        )
    (b, t, h), (_, _, k, width) = scores.shape, v.shape
    if h % k:
        raise ValueError(f"H={h} heads of scores: expected a multiple of K={k}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected 1 or more tokens")
    if run is not None and run.shape != (b, t):
        raise ValueError(f"run has shape {run.shape}: expected {(b, t)}")
    if state is None:
        return
    shapes = tuple(a.shape for a in state)
    if shapes != ((b, h), (b, h), (b, h, width)):
        raise ValueError(
            f"state holds {shapes}: expected {((b, h), (b, h), (b, h, width))}"
        )
