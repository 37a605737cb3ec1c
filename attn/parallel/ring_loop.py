"""The journey of keys around a ring, and what is done at each of its steps.

While the keys that are here are looked at, the next ones are on their way. Steps of one
form share a loop, and so do pairs of pieces, where there are many shards.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.parallel.ring_schedule import WAYS, Call, Step, alike, halo, pairs, schedule


class Side(NamedTuple):
    """Arrays of a call that have no gradient: head [H], q_pos [B,T], q_run [B,T]."""

    head: Any
    q_pos: Any
    q_run: Any


class Keys(NamedTuple):
    """What travels: k and v of one shard, and where they stand [B,S]."""

    k: jax.Array
    v: jax.Array
    pos: Any
    run: Any


def journey(call: Call, keys: Keys, t: int, state: Any, visit: Callable) -> Any:
    """state after `visit(state, n, step, moving)` of all steps; moving: the keys that
    are here in step n, of each way."""
    plan = schedule(call, t)
    on = lambda moving, ways: {way: move(call, moving[way], way) for way in ways}
    gone = {way: sent(call, keys, t, way) for way in WAYS}
    moving = on(gone, plan[0][0].ways) if plan else {}
    for place, steps in enumerate(plan):
        first, last = steps[0], steps[-1]

        def loop(carry, n):
            state, moving = carry
            return (visit(state, n, first, moving), on(moving, first.ways)), None

        looped = call.looped and len(steps) > 1
        order = jnp.arange(first.n, last.n + looped)
        if len(order):
            (state, moving), _ = jax.lax.scan(loop, (state, moving), order)
        if not looped:
            # on their way before the last ones that are here are looked at
            here, rest = moving, plan[place + 1:]
            moving = on(moving, rest[0][0].ways) if rest else {}
            state = visit(state, last.n, last, here)
    return state


def sent(call: Call, tree: Any, t: int, way: int) -> Any:
    """What travels `way` of keys, or of what is shaped like them."""
    part = halo(call, t, way)
    return tree if part is None else jax.tree.map(lambda a: take(a, part), tree)


def each(call: Call, n, step: Step, moving, t: int, state, add: Callable):
    """state after `add(state, pair, keys)` of all pairs that meet in a step."""
    found = []
    for way, kinds in zip(step.ways, step.kinds):
        r = n if way > 0 else call.shards - n
        s, (cut, _) = moving[way].k.shape[1], halo(call, t, way) or (0, t)
        found += [(way, pair) for pair in pairs(call, r, kinds, t, s, cut)]
    for same in alike(found):
        if not call.looped or len(same) == 1:
            for way, pair in same:
                state = _if(pair.when, functools.partial(
                    add, pair=pair, keys=moving[way]), state)
            continue
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *moving.values())
        at = [list(moving).index(way) for way, _ in same]
        told = [(p.rows[0], p.columns[0], p.when) for _, p in same]
        order = jnp.array(at), *(jnp.stack([*map(jnp.asarray, a)]) for a in zip(*told))
        one = same[0][1]

        def loop(state, told):
            n, row, column, when = told
            keys = jax.tree.map(lambda a: a[n], stacked)
            pair = one._replace(
                rows=(row, one.rows[1]), columns=(column, one.columns[1]))
            always = all(p.when is True for _, p in same)
            f = functools.partial(add, pair=pair, keys=keys)
            return _if(True if always else when, f, state), None

        state, _ = jax.lax.scan(loop, state, order)
    return state


def move(call: Call, tree: Any, way: int) -> Any:
    """Everything goes `way` shards on."""
    to = [(p, (p + way) % call.shards) for p in range(call.shards)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, call.axis, to), tree)


def take(a: Any, piece: tuple[Any, int], dim: int = 1) -> Any:
    """A piece of `a`, (first, how many) along `dim`; None stays None."""
    if a is None or a.shape[dim] == piece[1]:
        return a
    return jax.lax.dynamic_slice_in_dim(a, *piece, dim)


def put(a: jax.Array, part: jax.Array, piece: tuple[Any, int], dim: int = 1):
    """`a` with a piece of it replaced by `part`, in a's dtype."""
    part = part.astype(a.dtype)
    if a.shape[dim] == piece[1]:
        return part
    return jax.lax.dynamic_update_slice_in_dim(a, part, piece[0], dim)


def _if(when: Any, f: Callable, state: Any) -> Any:
    return f(state) if when is True else jax.lax.cond(when, f, lambda s: s, state)
