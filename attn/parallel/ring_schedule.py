"""Ring schedule: which keys arrive at a shard in which step, and what it computes with
them.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks import Full, Mask
from pallas_kernels.logits import LogitSpec

DIRECTIONS = (1, -1)  # keys come from the shards before, and from those behind
MANY = 16  # shards; with more, steps share one program, else each has its own


@dataclasses.dataclass(frozen=True)
class RingPlan:
    """What is known of one call before it runs. counted: positions are 0, 1, 2, ...
    over the shards and only their differences count; zigzag: pieces p and 2P-1-p are
    here, and the mask is `Causal()`."""

    axis: str
    shards: int
    spec: LogitSpec
    implementation: str | None
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
    """The step in which keys arrive from n shards away. directions: where from;
    mask_kinds: of each, what is left of the mask if they stand before the queries, and
    if behind (None for nothing), or None where that is not known."""

    n: int
    directions: tuple[int, ...]
    mask_kinds: tuple[Any, ...]


def schedule(plan: RingPlan, t: int) -> list[list[Step]]:
    """The steps behind a shard's own keys, where neighbours of one form, which one loop
    can do, stand together. t: tokens of a shard."""
    # the two directions share the way: P/2 steps instead of P - 1
    half = plan.shards // 2
    forward = [mask_kind_of(plan, n, t) for n in range(1, half + 1)]
    back = [
        mask_kind_of(plan, plan.shards - n, t) for n in range(1, plan.shards - half)
    ]
    kinds = dict(zip(DIRECTIONS, (forward, back)))
    # keys travel on until no shard further away sees any of them
    reach = {
        direction: max((n for n, kind in enumerate(own, 1) if kind != (None, None)),
                       default=0)
        for direction, own in kinds.items()
    }
    steps = []
    for n in range(1, max(reach.values()) + 1):
        going = tuple(d for d in DIRECTIONS if n <= reach[d])
        steps.append(Step(n, going, tuple(kinds[d][n - 1] for d in going)))
    form = functools.partial(_form, plan)
    return [list(same) for _, same in itertools.groupby(steps, form)]


def _form(plan: RingPlan, step: Step) -> tuple:
    """Steps that are alike in this are of one form."""
    masks = [m for kind in step.mask_kinds if kind for m in kind]
    maskless = plan.spec.score is None and all(m in (None, Full()) for m in masks)
    first = step.n == 1 and not plan.looped
    return step.directions, step.mask_kinds, 0 if maskless and not first else step.n


def mask_kind_of(plan: RingPlan, r: int, t: int) -> tuple | None:
    """What is left of the mask between queries and the keys of the shard r before, and,
    where the ring closes, of the shard so far behind; None if only arrays know."""
    if not plan.counted or plan.zigzag:
        return None
    left = []
    # queries of shard p stand r T behind the keys of shard p - r, or, where that is
    # below 0 and the ring closes, (P - r) T in front of them
    for shift in (r * t, (r - plan.shards) * t):
        queries = np.int64(shift), np.int64(shift + t - 1)
        some, every = plan.spec.mask.bounds(queries, (np.int64(0), np.int64(t - 1)))
        seen = Full() if np.all(every) else plan.spec.mask
        left.append(seen if np.any(some) else None)
    return tuple(left)


def pairs(
    plan: RingPlan, r: Any, mask_kind: tuple | None, t: int, s: int, cut: int = 0
) -> list[Pair]:
    """What this shard computes with the s keys of the one r before it, cyclically, of
    which the first `cut` did not travel."""
    rows, columns = (0, t), (0, s)
    if not plan.counted:
        return [Pair(rows, columns, plan.spec.mask, None)]
    later = jax.lax.axis_index(plan.axis) >= r  # the keys stand before the queries
    if mask_kind is None:
        # zigzag: of keys before, their early half is seen by both halves of the
        # queries; of keys behind, the late half of the queries sees both halves
        half = t // 2
        same = jnp.where(later, 0, half), half
        return [Pair((half, half), (0, half), Full(), 0), Pair(same, same, Full(), 0)]
    if mask_kind == (Full(), Full()) and plan.spec.score is None:
        return [Pair(rows, columns, Full(), 0)]
    exact = isinstance(r, int)  # in a loop all that is seen is seen whole
    after = t - s - cut  # so many did not travel: calls count from the last key
    shifts = (r * t + after, (r - plan.shards) * t + after) if exact else (0, 0)
    found = zip(mask_kind, shifts, (later, ~later))
    return [Pair(rows, columns, m, at, when) for m, at, when in found if m is not None]


def alike(found: list[tuple[int, Pair]]) -> list[list[tuple[int, Pair]]]:
    """(direction, pair) of one step, those that one program can do together."""
    def program(at):
        pair = at[1]
        return pair.rows[1], pair.columns[1], pair.mask, pair.shift

    return [list(same) for _, same in itertools.groupby(found, program)]


def own_pair(plan: RingPlan, q, k) -> Pair:
    """A shard's queries with its own keys: in zigzag, too, they stand in order."""
    shift = 0 if plan.counted else None
    return Pair((0, q.shape[1]), (0, k.shape[1]), plan.spec.mask, shift)


def halo(plan: RingPlan, t: int, direction: int) -> tuple[int, int] | None:
    """Which of a shard's keys travel `direction`, (first, how many), if they go to the
    neighbour only: just those that it can see. None for all."""
    if not plan.counted or plan.zigzag or last_steps(plan, t).get(direction) != 1:
        return None
    before, behind = mask_kind_of(plan, direction % plan.shards, t) or (None, None)
    if (behind if direction > 0 else before) is not None:
        return None  # the ring closes: these keys are seen from both sides
    # where the neighbour's queries stand, if the keys that travel are 0..T-1
    queries = np.int64(direction * t), np.int64(direction * t + t - 1)

    def enough(n: int) -> bool:
        first, last = (0, t - n - 1) if direction > 0 else (n, t - 1)
        left = np.int64(first), np.int64(last)
        return not np.any(plan.spec.mask.bounds(queries, left)[0])

    # the fewest keys that leave out only what nobody sees
    n = bisect.bisect_left(range(t), True, key=enough)
    return (t - n if direction > 0 else 0), n


def last_steps(plan: RingPlan, t: int) -> dict[int, int]:
    """How many steps the keys of each direction travel."""
    steps = itertools.chain(*schedule(plan, t))
    return {direction: step.n for step in steps for direction in step.directions}
