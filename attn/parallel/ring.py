"""Ring: exact attention while keys and values travel from shard to shard.

Every shard keeps its queries. The keys and values of the others come by, from both
neighbours at once, and while one shard's are attended to the next ones are already on
their way. What each gives is joined by its log-sum-exp, in float32. Going back they
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

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from attn.masks import FOREVER, Causal, Mask
from attn.parallel.ring_loop import Keys, Side, each, journey, move, put, sent, take
from attn.parallel.ring_schedule import MANY, Call, Pair, ends, halo, own
from attn.parallel.zigzag import collected, dealt
from pallas_kernels.tile import NEVER


def ring(
    attend: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str,
    mask: Mask,
    head: Any,
    q_pos: Any,
    kv_pos: Any,
    q_run: Any = None,
    kv_run: Any = None,
    sink: jax.Array | None = None,
    counted: bool = False,
    balanced: bool = False,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`attend` over all shards of mesh axis `axis`, inside `shard_map` -> o [B,T,H,V]
    in v's dtype and lse [B,H,T] float32 of this shard's queries.

    Arguments are those of `attn.exact.attend` for this shard, options its others.
    counted: positions are 0, 1, 2, ... over the shards, there are no runs, and T = S.
    balanced: zigzag, for a causal mask that never forgets; the work of other masks is
    even as it is. ValueError if it cannot cut a shard in two.
    """
    shards = jax.lax.axis_size(axis)
    balanced &= shards > 1 and mask.causal and mask.reach().left >= FOREVER
    zigzag = balanced and counted and mask == Causal() and not options.get("score")
    # with a score every step is a program of its own
    loops = not options.get("score") or shards <= MANY
    counted &= zigzag or (mask.relative and not balanced and loops)
    told = tuple(sorted(options.items()))
    call = Call(attend, axis, shards, mask, told, counted, zigzag)
    if balanced:
        for name, a in (("T", q), ("S", k)):
            if a.shape[1] % 2:
                raise ValueError(
                    f"{name}={shards * a.shape[1]} cannot be dealt in zigzag to the "
                    f"{shards} devices of mesh axis {axis!r}: expected a multiple of "
                    f"{2 * shards}"
                )
        q, k, v, q_pos, kv_pos, q_run, kv_run = jax.tree.map(
            lambda a: dealt(a, axis), (q, k, v, q_pos, kv_pos, q_run, kv_run)
        )
    side, keys = Side(head, q_pos, q_run), Keys(k, v, kv_pos, kv_run)
    if counted:
        side, keys = Side(head, None, None), Keys(k, v, None, None)
    o, lse = _ring(call, side, keys.pos, keys.run, q, k, v, sink)
    return (collected(o, axis), collected(lse, axis, 2)) if balanced else (o, lse)


def join(o, lse, new_o, new_lse) -> tuple[jax.Array, jax.Array]:
    """o [B,T,H,V] and lse [B,H,T] of two sets of keys as those of both, in float32."""
    top = jnp.maximum(lse, new_lse)
    base = jnp.where(jnp.isfinite(top), top, 0)
    a, b = jnp.exp(lse - base), jnp.exp(new_lse - base)
    some = a + b > 0
    safe = jnp.where(some, a + b, 1)
    share = lambda w: (w / safe).swapaxes(1, 2)[..., None]
    o = o.astype(jnp.float32) * share(a) + new_o.astype(jnp.float32) * share(b)
    return o, jnp.where(some, base + jnp.log(safe), NEVER)


def _meet(call: Call, side: Side, pair: Pair, q, keys: Keys, sink=None, given=None):
    """o and lse of a pair's queries with its keys, as a function of both and `sink`."""
    cut = Keys(*(take(a, pair.columns) for a in keys))
    where: dict[str, Any] = {"shift": pair.shift}
    if pair.shift is None:
        where = {
            "q_pos": take(side.q_pos, pair.rows), "kv_pos": cut.pos,
            "q_run": take(side.q_run, pair.rows), "kv_run": cut.run,
        }
    if given is not None:
        where["given"] = take(given, pair.rows, 2)
    f = lambda q, k, v, sink: call.attend(
        q, k, v, mask=pair.mask, head=side.head, sink=sink, **where,
        **dict(call.options),
    )
    return f, (take(q, pair.rows), cut.k, cut.v, sink)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(call: Call, side: Side, kv_pos, kv_run, q, k, v, sink):
    return _forward(call, side, kv_pos, kv_run, q, k, v, sink)[0]


def _forward(call: Call, side: Side, kv_pos, kv_run, q, k, v, sink):
    keys = Keys(k, v, kv_pos, kv_run)
    f, args = _meet(call, side, own(call, q, k), q, keys, sink)
    o, lse = f(*args)

    def add(state, pair, keys):
        f, args = _meet(call, side, pair, q, keys)
        old = [take(a, pair.rows, d) for d, a in enumerate(state, 1)]
        new = join(*old, *f(*args))
        return tuple(
            put(a, b, pair.rows, d) for d, (a, b) in enumerate(zip(state, new), 1)
        )

    def visit(state, n, step, moving):
        return each(call, n, step, moving, q.shape[1], state, add)

    state = o.astype(jnp.float32), lse
    o, lse = journey(call, keys, q.shape[1], state, visit)
    o = o.astype(v.dtype)
    return (o, lse), (side, keys, q, sink, o, lse)


def _backward(call: Call, saved, cotangents):
    side, keys, q, sink, o, lse = saved
    # keys travel again: those that came by before are not kept until now
    keys, cotangents = jax.lax.optimization_barrier((keys, cotangents))
    t = q.shape[1]
    do, dlse = cotangents
    # what the gradients of all pairs share is made once
    dlse -= (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1).swapaxes(1, 2)

    def gradients(pair, keys, sink=None):
        f, args = _meet(call, side, pair, q, keys, sink, lse)
        return jax.vjp(f, *args)[1]((take(do, pair.rows), take(dlse, pair.rows, 2)))

    dq, dk, dv, dsink = gradients(own(call, q, keys.k), keys, sink)
    wide = lambda a: a.astype(jnp.float32)

    zeros = lambda way: tuple(
        jnp.zeros_like(a, jnp.float32) for a in sent(call, keys[:2], t, way))

    def visit(state, n, step, moving):
        dq, sums = state
        new = {}
        for way, kinds in zip(step.ways, step.kinds):
            def add(found, pair, keys):
                parts = gradients(pair, keys)
                pieces = pair.rows, pair.columns, pair.columns
                return tuple(
                    put(a, take(a, at) + wide(b), at)
                    for a, b, at in zip(found, parts, pieces)
                )

            one = step._replace(ways=(way,), kinds=(kinds,))
            here = {way: moving[way]}
            dq, *found = each(call, n, one, here, t, (dq, *zeros(way)), add)
            if way in sums:
                found = map(jnp.add, found, move(call, sums[way], way))
            new[way] = tuple(found)
        # of a way that has ended, the sums stay where they are
        return dq, sums | new

    dk, dv = wide(dk), wide(dv)
    begun = {way: zeros(way) for way in ends(call, t)} if call.looped else {}
    dq, sums = journey(call, keys, t, (wide(dq), begun), visit)
    for way, far in ends(call, t).items():
        at = halo(call, t, way) or (0, dk.shape[1])
        dk, dv = (
            put(a, take(a, at) + b, at)
            for a, b in zip((dk, dv), move(call, sums[way], -way * far))
        )
    low = lambda d, a: d.astype(a.dtype)
    return None, None, None, low(dq, q), low(dk, keys.k), low(dv, keys.v), dsink


_ring.defvjp(_forward, _backward)
