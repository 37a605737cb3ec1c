"""Ring: exact attention while keys and values travel from shard to shard.

Every shard keeps its queries. The keys and values of the others come by, from both
neighbours at once, and while one shard's are attended to the next ones are already on
their way. What they give is one online softmax state, in float32. Going back they
travel again, with their gradients one step behind them, which at last are sent home.
No shard ever holds more of the others than two pieces of each direction (Ring
Attention, Liu et al., 2023, arXiv:2310.01889; that the two directions share the way is
proposed here). What the mask hides from every shard does not travel at all: of a window
shorter than a shard only as many keys as it is long.

In a causal ring the first shard has little to do and the last one everything. Zigzag
gives shard p of P the p-th and the (2P-1-p)-th of 2P pieces, so that each does the same
work in every step; the tokens are exchanged when the attention begins and when it ends.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attn.exact.attend import attend
from attn.exact.online import OnlineSoftmax, join, logsumexp, output, state_of
from attn.masks import FOREVER, Causal
from attn.parallel.ring_loop import (
    Keys, move, over_pairs, put, ring_loop, take, travelling
)
from attn.parallel.ring_schedule import (
    MANY, Pair, RingPlan, halo, last_steps, own_pair
)
from attn.parallel.zigzag import from_zigzag, to_zigzag
from pallas_kernels.logits import LogitSpec, Where
from pallas_kernels.tile import base_and_factor


def ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec,
    where: Where,
    *,
    axis: str,
    sink: jax.Array | None = None,
    counted: bool = False,
    balanced: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attend` over all shards of mesh axis `axis`, inside `shard_map` -> o [B,T,H,V]
    in v's dtype and lse [B,H,T] float32 of this shard's queries.

    Arguments are those of `attn.exact.attend` for this shard. counted: positions are
    0, 1, 2, ... over the shards, there are no segments, and T = S. balanced: zigzag,
    for a causal mask that never forgets; the work of other masks is even as it is.
    ValueError if it cannot cut a shard in two.
    """
    shards, mask = jax.lax.axis_size(axis), spec.mask
    # a window's work is even as it is
    balanced &= shards > 1 and mask.causal and mask.reach().left >= FOREVER
    zigzag = balanced and counted and mask == Causal() and not spec.score
    # with a score every step is a program of its own: many shards would be many, and
    # so arrays say where their tokens stand
    loops = not spec.score or shards <= MANY
    counted &= zigzag or (mask.relative and not balanced and loops)
    plan = RingPlan(axis, shards, spec, implementation, counted, zigzag)
    if balanced:
        _check_halves(q, k, axis, shards)
        q, k, v, where = _to_zigzag(q, k, v, where, axis)
    if counted:
        # shift says it all: neither positions nor segments have to travel
        where = Where(head=where.head)
    o, lse = _ring(plan, where, q, k, v, sink)
    return (from_zigzag(o, axis), from_zigzag(lse, axis, 2)) if balanced else (o, lse)


def _check_halves(q, k, axis: str, shards: int) -> None:
    for name, a in (("T", q), ("S", k)):
        if a.shape[1] % 2:
            raise ValueError(
                f"{name}={shards * a.shape[1]} cannot be dealt in zigzag to the "
                f"{shards} devices of mesh axis {axis!r}: expected a multiple of "
                f"{2 * shards}"
            )


def _to_zigzag(q, k, v, where: Where, axis: str):
    tokens = where.q_pos, where.kv_pos, where.q_segment, where.kv_segment
    q, k, v, q_pos, kv_pos, q_segment, kv_segment = jax.tree.map(
        lambda a: to_zigzag(a, axis), (q, k, v, *tokens)
    )
    return q, k, v, Where(q_pos, kv_pos, q_segment, kv_segment, where.head)


def _meet(
    plan: RingPlan, where: Where, pair: Pair, q, keys: Keys, sink=None, given=None
):
    """o, m and l of a pair's queries with its keys, as a function of both and `sink`;
    with the lse of all keys `given`, o and that."""
    cut = Keys(*(take(a, pair.columns) for a in keys))
    if pair.shift is None:
        q_pos, q_segment = (take(a, pair.rows) for a in (where.q_pos, where.q_segment))
        here = Where(q_pos, cut.pos, q_segment, cut.segment, where.head)
    else:
        # positions count, so how far the queries stand behind the keys says it all
        here = Where(head=where.head, shift=pair.shift)
    spec = dataclasses.replace(plan.spec, mask=pair.mask)
    if given is not None:
        given = take(given, pair.rows, 2)

    def f(q, k, v, sink):
        how = plan.implementation
        return attend(
            q, k, v, spec, here, sink=sink, given=given, split_lse=given is None,
            implementation=how,
        )

    return f, (take(q, pair.rows), cut.k, cut.v, sink)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: RingPlan, where: Where, q, k, v, sink):
    return _forward(plan, where, q, k, v, sink)[0]


def _forward(plan: RingPlan, where: Where, q, k, v, sink):
    keys = Keys(k, v, where.kv_pos, where.kv_segment)
    f, args = _meet(plan, where, own_pair(plan, q, k), q, keys, sink)
    start = state_of(*f(*args))  # m, l [B,T,H], acc [B,T,H,V]

    def add(state, pair, keys):
        f, args = _meet(plan, where, pair, q, keys)
        old = OnlineSoftmax(*(take(a, pair.rows) for a in state))
        new = join(old, state_of(*f(*args)))
        return OnlineSoftmax(*(put(a, b, pair.rows) for a, b in zip(state, new)))

    def visit(state, n, step, arrived):
        return over_pairs(plan, n, step, arrived, q.shape[1], state, add)

    state = ring_loop(plan, keys, q.shape[1], start, visit)
    # o [B,T,H,V]; lse [B,T,H] -> [B,H,T]
    o, lse = output(state).astype(v.dtype), logsumexp(state).swapaxes(1, 2)
    return (o, lse), (where, q, k, v, sink, o, state.m, state.l)


def _backward(plan: RingPlan, saved, cotangents):
    where, q, k, v, sink, o, m, l = saved
    keys = Keys(k, v, where.kv_pos, where.kv_segment)
    # keys travel again: those that came by before are not kept until now
    keys, cotangents = jax.lax.optimization_barrier((keys, cotangents))
    t = q.shape[1]
    do, dlse = cotangents
    # what the gradients of all pairs share is made once: d(lse) - rowsum(do o)
    do = do.astype(jnp.float32)
    dlse -= (do * o.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    # weights are exp(s - base); do and d(lse) are times factor, exp(base - lse)
    base, factor = base_and_factor(m, l)  # [B,T,H]
    do = (do * factor[..., None]).astype(v.dtype)
    base, factor = (a.swapaxes(1, 2) for a in (base, factor))
    dlse *= factor

    def gradients(pair, keys, sink=None):
        f, args = _meet(plan, where, pair, q, keys, sink, base)
        return jax.vjp(f, *args)[1]((take(do, pair.rows), take(dlse, pair.rows, 2)))

    def zeros(direction):
        there = travelling(plan, keys[:2], t, direction)
        # summed over the shards in float32
        return tuple(jnp.zeros_like(a, jnp.float32) for a in there)

    def add(found, pair, keys):
        parts = gradients(pair, keys)  # of q, k, v
        pieces = pair.rows, pair.columns, pair.columns
        return tuple(
            put(a, take(a, piece) + part.astype(jnp.float32), piece)
            for a, part, piece in zip(found, parts, pieces)
        )

    def visit(state, n, step, arrived):
        dq, sums = state
        new = {}
        for direction, mask_kind in zip(step.directions, step.mask_kinds):
            one = step._replace(directions=(direction,), mask_kinds=(mask_kind,))
            here = {direction: arrived[direction]}
            start = dq, *zeros(direction)
            dq, *found = over_pairs(plan, n, one, here, t, start, add)
            if direction in sums:
                # the sums of dk and dv are one step behind their keys
                before = move(plan, sums[direction], direction)
                found = [a + b for a, b in zip(found, before)]
            new[direction] = tuple(found)
        # of a direction that has ended, the sums stay where they are
        return dq, sums | new

    dq, dk, dv, dsink = gradients(own_pair(plan, q, k), keys, sink)
    dq, dk, dv = (a.astype(jnp.float32) for a in (dq, dk, dv))
    # the carry of a loop has one form from its first step on
    begun = {d: zeros(d) for d in last_steps(plan, t)} if plan.looped else {}
    dq, sums = ring_loop(plan, keys, t, (dq, begun), visit)
    dk, dv = _sent_home(plan, t, sums, (dk, dv))
    return None, dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsink


def _sent_home(plan: RingPlan, t: int, sums: dict, grads):
    """grads (dk, dv) with the sums that have travelled, back on the shard whose keys
    they are of."""
    for direction, far in last_steps(plan, t).items():
        piece = halo(plan, t, direction) or (0, grads[0].shape[1])
        home = move(plan, sums[direction], -direction * far)
        grads = tuple(put(a, take(a, piece) + b, piece) for a, b in zip(grads, home))
    return grads


_ring.defvjp(_forward, _backward)
