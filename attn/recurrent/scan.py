"""Scan: recurrences whose step is associative, though not linear.

If joining two neighbouring stretches of tokens is an associative operator, the result
for every prefix comes out of a tree of joins: work is linear in T and the depth is a
logarithm. `prefix_scan` does that for any operator. Softmax attention of a query that
stays the same is such a recurrence (Feng et al., 2024, arXiv:2405.13956): what has to
be known of a stretch A of tokens with scores s and values v is the online softmax's

    m_A = max s_i,   l_A = sum exp(s_i - m_A),   acc_A = sum v_i exp(s_i - m_A)

and o = acc/l. `prefix_softmax` is this one, in chunks whose tokens meet in a matrix
product (`attn/recurrent/prefix_softmax.py`) or as kernels.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.contract.varying import varying
from attn.exact.online import OnlineSoftmax, join
from attn.parallel.sharding import Axis
from attn.recurrent.lasp import exclusive_prefix, tagged
from attn.recurrent.prefix_softmax import chunked, einsum, exp
from pallas_kernels.scan import api as kernels


def empty(batch: int, heads: int, width: int) -> OnlineSoftmax:
    """The stretch without tokens, which `merge` leaves others as they are with: its m
    is -inf."""
    zeros = jnp.zeros((batch, heads), jnp.float32)
    acc = jnp.zeros((batch, heads, width), jnp.float32)
    return OnlineSoftmax(zeros - jnp.inf, zeros, acc)


def merge(a: OnlineSoftmax, b: OnlineSoftmax) -> OnlineSoftmax:
    """The state of a stretch and the one behind it, by the online softmax's `join`. No
    gradient flows through m, on which acc/l does not depend."""
    return join(*(x._replace(m=jax.lax.stop_gradient(x.m)) for x in (a, b)))


def prefix_scan(
    op: Callable,
    leaves: Any,
    *,
    state: Any = None,
    segment: jax.Array | None = None,
    chunk: int = 64,
    axis: Axis | None = None,
    ends: bool = True,
) -> tuple[Any, Any]:
    """The joins of all prefixes -> the last one [B,...], all of them [B,T,...].

    op(a, b): an associative join of a stretch with the one behind it, elementwise on
    leading axes. leaves: arrays [B,T,...], one stretch a token; state [B,...]: what
    came before, seen by segment 1. segment [B,T] as in `attn.contract.segments`: a new
    segment begins anew, padding changes nothing, and what stands at it is what came
    before it; where nothing did, its own leaf. axis: the mesh axis that T is split
    over, inside `shard_map`; shards gather one stretch each, and all give the last
    join, or None where it is not wanted (`ends`).
    """
    some = jax.tree.leaves(leaves)[0]
    (b, t), c = some.shape[:2], min(chunk, some.shape[1])
    segment = jnp.ones((b, t), jnp.int32) if segment is None else segment

    def cut(a):
        """[B,T,...] as chunks [N,B,c,...]."""
        a = jnp.pad(a, [(0, 0), (0, -t % c)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(b, -1, c, *a.shape[2:]).swapaxes(0, 1)

    def uncut(a):
        return a.swapaxes(0, 1).reshape(b, -1, *a.shape[3:])[:, :t]

    def to_each_token(a):
        return jnp.broadcast_to(a[:, :, None], (*a.shape[:2], c, *a.shape[2:]))

    def pass_on(before, tip):
        return step(before, tip), before

    step = tagged(op)
    # of each token: its chunk up to there [N,B,c,...]
    inside = jax.lax.associative_scan(
        step, jax.tree.map(cut, (segment, leaves)), axis=2
    )
    tips = jax.tree.map(lambda a: a[:, :, -1], inside)  # [N,B,...]: of whole chunks
    first = jnp.ones((b,), jnp.int32), state
    if state is None:
        # segment 0: a placeholder that the first real segment replaces
        first = jnp.zeros((b,), jnp.int32), jax.tree.map(lambda a: a[0], tips[1])
    after: Any = None
    first = varying(first, tips)
    if axis is not None:
        begin = jax.tree.map(lambda a: a[0], tips)
        rest = jax.tree.map(lambda a: a[1:], tips)
        own, _ = jax.lax.scan(pass_on, begin, rest)  # this shard's tip
        first, after = exclusive_prefix(op, own[0], own[1], axis, first, ends)
    last, starts = jax.lax.scan(pass_on, first, tips)
    _, found = step(jax.tree.map(to_each_token, starts), inside)  # [N,B,c,...]
    last = last if axis is None else after
    return last[1] if ends else None, jax.tree.map(uncut, found)


def total(
    scores: jax.Array, v: jax.Array, segment: jax.Array | None = None
) -> OnlineSoftmax:
    """The state of all tokens of the last segment. scores [B,T,H], v [B,T,K,V]."""
    s = scores.astype(jnp.float32)
    if segment is not None:
        own = (segment == segment.max(1, keepdims=True)) & (segment > 0)
        s = jnp.where(own[..., None], s, -jnp.inf)
    m = jax.lax.stop_gradient(s.max(1))
    p = exp(s, m[:, None])  # [B,T,H]
    b, t, h = s.shape
    grouped = p.reshape(b, t, v.shape[2], -1)  # [B,T,K,G]
    acc = einsum("btkg,btkv->bkgv", grouped, v.astype(jnp.float32))  # [G,T] [T,V]
    return OnlineSoftmax(m, p.sum(1), acc.reshape(b, h, -1))


def prefix_softmax(
    scores: jax.Array,
    v: jax.Array,
    *,
    state: OnlineSoftmax | None = None,
    segment: jax.Array | None = None,
    chunk: int = 16,
    axis: Axis | None = None,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[OnlineSoftmax | None, jax.Array]:
    """Softmax over every prefix -> the last state, o [B,T,H,V] in `dtype`.

    scores [B,T,H], v [B,T,K,V], H a multiple of K; state: that of the tokens before,
    [B,H], seen by segment 1. segment [B,T] as in `attn.contract.segments`; padding
    gives o = 0. The gradients of scores, v, and l and acc of the state come from one
    scan from the last token to the first; m is taken as a constant.

    axis: the mesh axis that T is split over, inside `shard_map`: every shard gathers
    one state of each, and one gradient of a state for the backward pass. The state is
    the same on all shards, and so is the one given back; it is None over an axis where
    none came in. Segments are numbered in the global view.
    """
    check(scores, v, state, segment, chunk)
    streams = state is not None
    b, t, h = scores.shape
    begun = empty(b, h, v.shape[-1]) if state is None else state
    after: Any = None
    if axis is not None:
        segment, begun, after = _begun(scores, v, segment, axis, begun, streams)

    def kernel(backend: str) -> Any:
        if t == 1 and implementation is None:
            return None  # a chunk of one token would be padding
        return lambda: kernels.scan(
            scores, v, (begun.m, begun.l, begun.acc), segment=segment, dtype=dtype,
            backend=backend, interpret=interpreted(),
        )

    last, o = pick(
        implementation, xla=lambda: chunked(
            chunk, dtype, *varying((scores, v, segment, *begun))),
        tpu=kernel("tpu"), gpu=kernel("triton"),
    )
    return OnlineSoftmax(*last) if axis is None else after, o


def _begun(scores, v, segment, axis: Axis, first: OnlineSoftmax, ends: bool) -> tuple:
    """This shard's segments, numbered from 1; the state that it begins with; and, if it
    `ends`, the state after all shards."""
    one = jnp.ones(scores.shape[:1], jnp.int32)
    last = one if segment is None else segment.max(1)
    own = total(scores, v, segment)
    (present, begun), after = exclusive_prefix(
        merge, last, own, axis, (one, first), ends)
    if segment is not None:
        # 1 is the segment of the state that comes in, as in a call without an axis
        segment = jnp.where(segment > 0, segment - present[:, None] + 1, 0)
    return segment, begun, after[1] if ends else None


def check(scores, v, state, segment, chunk: int) -> None:
    """Raises ValueError unless the arguments of `prefix_softmax` fit together."""
    if scores.ndim != 3 or v.ndim != 4 or scores.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"scores {scores.shape}, v {v.shape}: expected [B,T,H] and [B,T,K,V]"
        )
    (b, t, h), (_, _, k, width) = scores.shape, v.shape
    if h % k:
        raise ValueError(f"H={h} heads of scores: expected a multiple of K={k}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected 1 or more tokens")
    if segment is not None and segment.shape != (b, t):
        raise ValueError(f"segment has shape {segment.shape}: expected {(b, t)}")
    if state is None:
        return
    shapes = tuple(a.shape for a in state)
    if shapes != ((b, h), (b, h), (b, h, width)):
        raise ValueError(
            f"state holds {shapes}: expected {((b, h), (b, h), (b, h, width))}"
        )
