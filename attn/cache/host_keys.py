"""Host keys: keys and values that a host keeps, and what it looks up in them meanwhile.

A program on a device has them by a number, and hands a question over in two halves:
`begin` returns at once, while a thread of the host looks for the answer, and `end`
waits for it. What the device does in between does not wait.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from typing import Any, Callable, Iterator

import numpy as np

_own = functools.partial(dataclasses.field, init=False, repr=False)


@dataclasses.dataclass(eq=False)
class HostKeys:
    """Arrays in the host's memory, by number, until they are cleared.

    What is stored is not changed, so any number of states may have the same number. A
    new prompt, and every piece of one, is stored beside what was there. rows: the most
    that stay, the newest, None for all; rows of a batch times layers is enough where no
    older state goes on.
    """

    rows: int | None = None
    _held: dict[int, tuple[np.ndarray, ...]] = _own(default_factory=dict)
    _asked: dict[int, concurrent.futures.Future] = _own(default_factory=dict)
    _numbers: Iterator[int] = _own(default_factory=lambda: itertools.count(1))
    # one after another: the search is numpy's, which has threads of its own
    _pool: concurrent.futures.Executor = _own(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(1))

    def __post_init__(self):
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"HostKeys: rows={self.rows}: expected 1 or more, or None")

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        return sum(a.nbytes for arrays in self._held.values() for a in arrays)

    def put(self, *arrays: Any) -> int:
        """Stores copies of the arrays -> their number, 1 or more."""
        number = next(self._numbers)
        # copies: a runtime may take back what it lends to a callback
        self._held[number] = tuple(np.array(a) for a in arrays)
        if self.rows is not None and len(self._held) > self.rows:
            del self._held[min(self._held)]  # numbers rise: the oldest
        return number

    def get(self, number: int) -> tuple[np.ndarray, ...]:
        """What was stored; ValueError if it was cleared."""
        try:
            return self._held[int(number)]
        except KeyError:
            raise ValueError(
                f"HostKeys: row {number} was cleared, or rows={self.rows} newer ones "
                "came: expected the state of a prompt that was read since") from None

    def clear(self) -> None:
        """Lets all of it go."""
        self._held.clear()

    def begin(self, ask: Callable, *args: Any) -> int:
        """Calls ask(*args) in a thread of its own -> a ticket for its result."""
        ticket = next(self._numbers)
        self._asked[ticket] = self._pool.submit(ask, *args)
        return ticket

    def end(self, ticket: int) -> Any:
        """The result of `begin`, once; what it raised is raised here."""
        # taken out, so that answers do not pile up
        return self._asked.pop(int(ticket)).result()
