"""Rounds: which keys arrive at a shard in which step, and what it computes with them.

In step n of a ring the keys of the shard n before and of the one n behind arrive. If
positions simply count and only their differences matter, how far apart they stand is
known before anything runs: steps in which the mask hides everything are left out, those
in which it hides nothing need no mask and can share one loop.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks import Full, Mask

WAYS = (1, -1)  # keys come from the shards before, and from those behind
MANY = 16  # shards; with more, steps share one program, else each has its own


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of one call. attend: the attention of a shard's queries to keys;
    options: what it is told; counted: positions are 0, 1, 2, ... over the shards and
    only their differences count; zigzag: pieces p and 2P-1-p are here, and the mask is
    `Causal()`."""

    attend: Callable
    axis: str
    shards: int
    mask: Mask
    options: tuple[tuple[str, Any], ...]
    counted: bool
    zigzag: bool

    @property
    def looped(self) -> bool:
        """Whether a loop is made of whatever can be: a smaller program, that moves a
        little more."""
        return self.shards > MANY


class Pair(NamedTuple):
    """A piece of the queries with a piece of the keys, each (first, how many). shift:
    how many tokens further on the last query stands, None where arrays say it; when:
    whether they meet, a traced bool or True."""

    rows: tuple[Any, int]
    columns: tuple[Any, int]
    mask: Mask
    shift: int | None
    when: Any = True


class Step(NamedTuple):
    """The step in which keys arrive from n shards away. ways: where from; kinds: of
    each, what is left of the mask if they stand before the queries, and if behind (None
    for nothing), or None where that is not known."""

    n: int
    ways: tuple[int, ...]
    kinds: tuple[Any, ...]


def schedule(call: Call, t: int) -> list[list[Step]]:
    """The steps behind a shard's own keys, where neighbours of one form, which one loop
    can do, stand together. t: tokens of a shard."""
    half = call.shards // 2
    lasts = half, call.shards - 1 - half
    every = [
        [kinds_of(call, n if way > 0 else call.shards - n, t)
         for n in range(1, last + 1)]
        for way, last in zip(WAYS, lasts)
    ]
    reach = [
        max((n + 1 for n, kinds in enumerate(e) if kinds != (None, None)), default=0)
        for e in every
    ]
    steps = []
    for n in range(1, max(reach) + 1):
        ways = tuple(way for way, far in zip(WAYS, reach) if n <= far)
        kinds = tuple(e[n - 1] for e, far in zip(every, reach) if n <= far)
        steps.append(Step(n, ways, kinds))
    return [list(same) for _, same in itertools.groupby(steps, functools.partial(
        _form, call))]


def _form(call: Call, step: Step) -> tuple:
    """Steps that are alike in this are of one form."""
    every = dict(call.options).get("score") is None and all(
        m in (None, Full()) for kinds in step.kinds if kinds for m in kinds
    )
    first = step.n == 1 and not call.looped
    return step.ways, step.kinds, 0 if every and not first else step.n


def kinds_of(call: Call, r: int, t: int) -> tuple | None:
    """What is left of the mask between queries and the keys of the shard r before, and,
    where the ring closes, of the shard so far behind; None if only arrays know."""
    if not call.counted or call.zigzag:
        return None
    left = []
    for shift in (r * t, (r - call.shards) * t):
        queries = np.int64(shift), np.int64(shift + t - 1)
        some, every = call.mask.bounds(queries, (np.int64(0), np.int64(t - 1)))
        seen = Full() if np.all(every) else call.mask
        left.append(seen if np.any(some) else None)
    return tuple(left)


def pairs(
    call: Call, r: Any, kinds: tuple | None, t: int, s: int, cut: int = 0
) -> list[Pair]:
    """What this shard computes with the s keys of the one r before it, cyclically, of
    which the first `cut` did not travel."""
    rows, columns = (0, t), (0, s)
    if not call.counted:
        return [Pair(rows, columns, call.mask, None)]
    later = jax.lax.axis_index(call.axis) >= r  # the keys stand before the queries
    if kinds is None:
        half = t // 2
        same = jnp.where(later, 0, half), half
        return [Pair((half, half), (0, half), Full(), 0), Pair(same, same, Full(), 0)]
    if kinds == (Full(), Full()) and dict(call.options).get("score") is None:
        return [Pair(rows, columns, Full(), 0)]
    exact = isinstance(r, int)  # in a loop all that is seen is seen whole
    after = t - s - cut  # so many did not travel: calls count from the last key
    shifts = (r * t + after, (r - call.shards) * t + after) if exact else (0, 0)
    found = zip(kinds, shifts, (later, ~later))
    return [Pair(rows, columns, m, at, when) for m, at, when in found if m is not None]


def alike(found: list[tuple[int, Pair]]) -> list[list[tuple[int, Pair]]]:
    """(way, pair) of one step, those that one program can do together."""
    form = lambda at: (at[1].rows[1], at[1].columns[1], at[1].mask, at[1].shift)
    return [list(same) for _, same in itertools.groupby(found, form)]


def own(call: Call, q, k) -> Pair:
    """A shard's queries with its own keys: dealt in zigzag, they still stand in order.
    """
    shift = 0 if call.counted else None
    return Pair((0, q.shape[1]), (0, k.shape[1]), call.mask, shift)


def halo(call: Call, t: int, way: int) -> tuple[int, int] | None:
    """Which of a shard's keys travel `way`, (first, how many), if they go to the
    neighbour only: just those that it can see. None for all."""
    if not call.counted or call.zigzag or ends(call, t).get(way) != 1:
        return None
    before, behind = kinds_of(call, way % call.shards, t) or (None, None)
    if (behind if way > 0 else before) is not None:
        return None  # the ring closes: these keys are seen from both sides
    queries = np.int64(way * t), np.int64(way * t + t - 1)

    def enough(n: int) -> bool:
        first, last = (0, t - n - 1) if way > 0 else (n, t - 1)
        left = np.int64(first), np.int64(last)
        return not np.any(call.mask.bounds(queries, left)[0])

    n = bisect.bisect_left(range(t), True, key=enough)
    return (t - n if way > 0 else 0), n


def ends(call: Call, t: int) -> dict[int, int]:
    """How many steps the keys of each way travel."""
    steps = [step for steps in schedule(call, t) for step in steps]
    return {way: step.n for step in steps for way in step.ways}
