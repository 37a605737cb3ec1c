"""Portions: a schedule that is too long for a TPU's scalar memory, in several calls.

The list of tiles is read by the scalar unit, from a memory of one MiB. A causal call of
a million tokens visits 131,328 tiles of 2048 x 2048; so its lines, each a result of its
own, are shared out to calls whose lists fit.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.schedule import GridOrder

ROOM = 3 * 2**18  # bytes of scalar memory for a list


class Portion(NamedTuple):
    """Lines [first, first + lines) of a schedule."""

    seen: GridOrder
    first: int
    lines: int


def portions(seen: GridOrder, groups: int = 1) -> list[Portion]:
    """`seen`, whole if its list fits; `groups`: how often each line is read. A line is
    never cut, so that its result is made by one call."""
    # 8 bytes a step for order and group, and 4 of each row's plan
    most = ROOM // ((8 + 4 * seen.ask.shape[0]) * groups)
    starts = np.append(np.flatnonzero(seen.first), len(seen.order))
    found, line = [], 0
    while line < len(starts) - 1:
        # lines that end before the room does
        end = int(np.searchsorted(starts, starts[line] + most, "right")) - 1
        end = max(end, line + 1)  # one at least
        a, b = starts[line], starts[end]
        cut = GridOrder(seen.order[a:b], seen.first[a:b], seen.last[a:b],
                        seen.ask[:, a:b], seen.hold[:, a:b])
        found.append(Portion(cut, line, end - line))
        line = end
    return found


def joined(seen: GridOrder, groups: int, make: Callable) -> tuple:
    """The results of `make(portion)`, tuples of arrays [B,H,tokens,...] or, with the
    tokens last, [B,H,1,tokens], one behind the other."""
    made = [make(portion) for portion in portions(seen, groups)]
    if len(made) == 1:
        return made[0]

    def along(a):
        return 3 if a.shape[2] == 1 else 2

    return tuple(jnp.concatenate(a, along(a[0])) for a in zip(*made))
