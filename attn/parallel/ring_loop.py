"""Ring loop: the steps in which keys travel around a ring of shards.

While the keys that are here are looked at, the next ones are on their way. Steps of one
form share a loop, and so do pairs of pieces, where there are many shards.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.parallel.ring_schedule import (
    DIRECTIONS, RingPlan, Step, alike, halo, pairs, schedule
)


class Keys(NamedTuple):
    """What travels: k and v of one shard, and where they stand [B,S]."""

    k: jax.Array
    v: jax.Array
    pos: Any
    segment: Any


def ring_loop(plan: RingPlan, keys: Keys, t: int, state: Any, visit: Callable) -> Any:
    """state after `visit(state, n, step, arrived)` of all steps; arrived: the keys that
    are here in step n, of each direction."""
    def advance(keys_of: dict, directions: tuple) -> dict:
        return {d: move(plan, keys_of[d], d) for d in directions}

    groups = schedule(plan, t)
    own = {direction: travelling(plan, keys, t, direction) for direction in DIRECTIONS}
    arrived = advance(own, groups[0][0].directions) if groups else {}
    for number, steps in enumerate(groups):
        first, last = steps[0], steps[-1]

        def loop(carry, n):
            state, arrived = carry
            # the next keys do not wait for what is computed with these
            in_flight = advance(arrived, first.directions)
            return (visit(state, n, first, arrived), in_flight), None

        looped = plan.looped and len(steps) > 1
        # unless it is a loop of its own, the group's last step stands behind the loop
        order = jnp.arange(first.n, last.n + looped)
        if len(order):
            (state, arrived), _ = jax.lax.scan(loop, (state, arrived), order)
        if not looped:
            # on their way before the last ones that are here are looked at
            rest = groups[number + 1:]
            in_flight = advance(arrived, rest[0][0].directions) if rest else {}
            state = visit(state, last.n, last, arrived)
            arrived = in_flight
    return state


def travelling(plan: RingPlan, tree: Any, t: int, direction: int) -> Any:
    """What travels in `direction` of keys, or of what is shaped like them."""
    part = halo(plan, t, direction)
    return tree if part is None else jax.tree.map(lambda a: take(a, part), tree)


def over_pairs(plan: RingPlan, n, step: Step, arrived, t: int, state, add: Callable):
    """state after `add(state, pair, keys)` of all pairs that meet in a step."""
    found = []
    for direction, mask_kind in zip(step.directions, step.mask_kinds):
        # keys from n shards behind are, around the ring, from P - n shards before
        r = n if direction > 0 else plan.shards - n
        s = arrived[direction].k.shape[1]
        # of a halo the first `cut` keys stayed at home
        cut, _ = halo(plan, t, direction) or (0, t)
        found += [(direction, p) for p in pairs(plan, r, mask_kind, t, s, cut)]
    for same in alike(found):
        if plan.looped and len(same) > 1:
            state = _loop_over_pairs(same, arrived, state, add)
            continue
        for direction, pair in same:
            f = functools.partial(add, pair=pair, keys=arrived[direction])
            state = _if(pair.when, f, state)
    return state


def _loop_over_pairs(same, arrived, state, add: Callable):
    """`over_pairs` of pairs that one program can do."""
    # [directions,B,S,...], of which each round of the loop takes one
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *arrived.values())
    source = [list(arrived).index(direction) for direction, _ in same]
    given = [(p.rows[0], p.columns[0], p.when) for _, p in same]
    row, column, when = (jnp.stack([*map(jnp.asarray, a)]) for a in zip(*given))
    one, always = same[0][1], all(p.when is True for _, p in same)

    def loop(state, at):
        n, row, column, when = at
        pair = one._replace(rows=(row, one.rows[1]), columns=(column, one.columns[1]))
        keys = jax.tree.map(lambda a: a[n], stacked)
        f = functools.partial(add, pair=pair, keys=keys)
        return _if(True if always else when, f, state), None

    return jax.lax.scan(loop, state, (jnp.array(source), row, column, when))[0]


def move(plan: RingPlan, tree: Any, distance: int) -> Any:
    """Everything goes `distance` shards on."""
    # from shard p to shard p + distance, around the ring
    to = [(p, (p + distance) % plan.shards) for p in range(plan.shards)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, plan.axis, to), tree)


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
