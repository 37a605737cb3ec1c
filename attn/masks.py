"""Masks: who may look at whom, as predicates on (head, query position, key position).

A mask is a frozen dataclass. Called with integer arrays that broadcast against each
other it answers, elementwise, whether a query at position `i` of head `h` may look at
a key at position `j`. The same predicate is evaluated by the XLA path on positions, by
a kernel on the positions of its tile, by a cache on the positions that it kept and by
a shard on positions with an offset. Masks compose:
`Causal() & (Window(256) | Sink(4))`, in brackets, as & binds more than |.

Two questions need no array. `mask.bounds(i, j)` says of a whole tile, given the ranges
of its positions, whether some pair in it may be visible and whether every pair is: the
tiles that a kernel skips, and those that need no mask arithmetic. `mask.reach()` says
how far back a token can still be seen: how much a cache has to keep.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

Array = Any  # anything that broadcasts: numpy, jax or Python integers
FOREVER = 2**30
MOST = 2**31 - 1  # the greatest int32: a window that is longer hides nothing


class Reach(NamedTuple):
    """A key `j` can be seen by a later query `i` only if `i - j <= left` or
    `j < first`."""

    left: int
    first: int


@dataclasses.dataclass(frozen=True)
class Mask:
    """What every mask can say. A mask that says only `__call__` is correct, if slow."""

    def __call__(self, h: Array, i: Array, j: Array) -> Array:
        """Whether head `h` at query position `i` may look at key position `j`."""
        raise NotImplementedError(f"{type(self).__name__} has no predicate")

    def bounds(self, i: tuple[Array, Array], j: tuple[Array, Array]) -> tuple:
        """(some, every): may a pair of the tile be visible; are all pairs visible.

        `i` and `j` are (first, last) positions, both inclusive. A wrong `some=True` or
        `every=False` costs time; the opposite would be an error: hence this default.
        """
        some = (i[0] == i[0]) & (j[0] == j[0])  # True, as wide as both
        # some: it may be; every: it is not said
        return some, some ^ True

    def reach(self) -> Reach:
        """How far back, and how many first tokens, a later query can see."""
        return Reach(FOREVER, 0)

    @property
    def causal(self) -> bool:
        """Whether no query can see a later key."""
        # query 0 and every key behind it
        zero = np.zeros((), np.int64)
        return not self.bounds((zero, zero), (zero + 1, zero + FOREVER))[0].any()

    @property
    def empty(self) -> bool:
        """Whether no query sees any key, wherever they are."""
        every = np.int64(0), np.int64(FOREVER)
        return not np.any(self.bounds(every, every)[0])

    @property
    def relative(self) -> bool:
        """Whether only the difference of positions counts."""
        return False

    def __and__(self, other: Mask) -> Mask:
        return And(self, _mask("&", other))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _mask("|", other))

    def __bool__(self) -> bool:
        raise ValueError(
            f"{self} has no truth value: masks are joined by &, | and ~, not by and, "
            "or and not"
        )

    def __invert__(self) -> Mask:
        return Not(self)


def _mask(symbol: str, other: Any) -> Mask:
    if not isinstance(other, Mask):
        raise ValueError(
            f"a mask {symbol} {other!r}: expected a mask, such as Causal()"
        )
    return other


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Everything is visible."""

    def __call__(self, h, i, j):
        return (i == i) & (j == j)  # True, as wide as both

    def bounds(self, i, j):
        every = (i[0] == i[0]) & (j[0] == j[0])
        return every, every

    @property
    def relative(self):
        return True


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A token sees itself and what came before."""

    def __call__(self, h, i, j):
        return j <= i

    def bounds(self, i, j):
        # some: the first key and the last query; every: the last key, the first query
        return j[0] <= i[1], j[1] <= i[0]

    @property
    def relative(self):
        return True


def _check_count(what: str, value: Any) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < 0:
        raise ValueError(f"{what}={value!r}: expected 0 or more tokens")


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A token sees at most `left` tokens back and `right` ahead, itself included.

    `right=None` sets no limit ahead: leave that to `Causal()`.
    """

    left: int
    right: int | None = None

    def __post_init__(self):
        for name in ("left", "right"):
            value = getattr(self, name)
            if not (value is None and name == "right"):
                _check_count(f"Window: {name}", value)

    def __call__(self, h, i, j):
        left, right = self._limits()
        seen = i - j <= left
        return seen if right is None else seen & (j - i <= right)

    def bounds(self, i, j):
        left, right = self._limits()
        # some: the two that are nearest; every: the two that are furthest apart
        some, every = i[0] - j[1] <= left, i[1] - j[0] <= left
        if right is not None:
            some = some & (j[0] - i[1] <= right)
            every = every & (j[1] - i[0] <= right)
        return some, every

    def _limits(self):
        """left and right as int32 holds them: no two positions are further apart."""
        return tuple(n if n is None else min(n, MOST) for n in (self.left, self.right))

    def reach(self):
        return Reach(self.left, 0)

    @property
    def relative(self):
        return True


@dataclasses.dataclass(frozen=True)
class Sink(Mask):
    """The first `n` tokens of the sequence are visible, to earlier tokens too: write
    `Causal() & (Window(256) | Sink(4))` for attention sinks in a causal model."""

    n: int

    def __post_init__(self):
        _check_count("Sink: n", self.n)

    def __call__(self, h, i, j):
        return (j < min(self.n, MOST)) & (i == i)  # as wide as both

    def bounds(self, i, j):
        n = min(self.n, MOST)
        return (j[0] < n) & (i[0] == i[0]), (j[1] < n) & (i[0] == i[0])

    def reach(self):
        return Reach(-1, self.n)  # -1: none but the first ones is seen later


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Tokens in blocks of `block`, which are frames of a video or tiles of a text: a
    token sees its own block whole, `left` blocks back (None: all) and `right` ahead.

    In blocks of a frame it is the block-wise causal attention of Next-Frame Diffusion
    (Cheng et al., 2025, arXiv:2506.01380), which remembers `left + 1` frames; a block
    of one token is `Causal()`.
    """

    block: int
    left: int | None = None
    right: int = 0

    def __post_init__(self):
        for name in ("block", "left", "right"):
            value = getattr(self, name)
            if not (value is None and name == "left"):
                _check_count(f"BlockCausal: {name}", value)
        if self.block < 1:
            raise ValueError(f"BlockCausal: block={self.block}: expected 1 or more")

    def __call__(self, h, i, j):
        block = min(self.block, MOST)
        return self._blocks(h, i // block, j // block)

    def bounds(self, i, j):
        block = min(self.block, MOST)
        return self._blocks.bounds(*(tuple(a // block for a in x) for x in (i, j)))

    @property
    def _blocks(self) -> Window:
        """What a block sees of the blocks."""
        return Window(MOST if self.left is None else self.left, self.right)

    def reach(self):
        # from the last token of a block to the first of the block `left` back
        far = FOREVER if self.left is None else (self.left + 1) * self.block - 1
        return Reach(min(far, FOREVER), 0)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Visible in both."""

    a: Mask
    b: Mask

    def __call__(self, h, i, j):
        return self.a(h, i, j) & self.b(h, i, j)

    def bounds(self, i, j):
        a, b = self.a.bounds(i, j), self.b.bounds(i, j)
        # each may have a pair and both none in common: "may be" is all that is said
        return a[0] & b[0], a[1] & b[1]

    def reach(self):
        a, b = self.a.reach(), self.b.reach()
        # the larger `first`: what one mask sees near, the other may see as a first one
        return Reach(min(a.left, b.left), max(a.first, b.first))

    @property
    def relative(self):
        return self.a.relative and self.b.relative


@dataclasses.dataclass(frozen=True)
class Or(And):
    """Visible in one of the two."""

    def __call__(self, h, i, j):
        return self.a(h, i, j) | self.b(h, i, j)

    def bounds(self, i, j):
        a, b = self.a.bounds(i, j), self.b.bounds(i, j)
        # together they may show all where neither does: that costs time only
        return a[0] | b[0], a[1] | b[1]

    def reach(self):
        a, b = self.a.reach(), self.b.reach()
        return Reach(max(a.left, b.left), max(a.first, b.first))


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Visible where `a` is not."""

    a: Mask

    def __call__(self, h, i, j):
        return self.a(h, i, j) ^ True  # ~True is -2 for a Python bool

    def bounds(self, i, j):
        some, every = self.a.bounds(i, j)
        # a pair is visible unless `a` shows every one; all are if it shows none
        return every ^ True, some ^ True

    @property
    def relative(self):
        return self.a.relative


def tiles(mask: Mask, i: tuple[Array, Array], j: tuple[Array, Array]) -> np.ndarray:
    """The tiles that a kernel has to visit, as rows (query tile, key tile), in order.

    `i` and `j` hold the first and last positions of each query tile and each key tile.
    """
    i0, i1 = (np.asarray(x)[:, None] for x in i)  # [tiles,1]
    j0, j1 = (np.asarray(x)[None, :] for x in j)  # [1,tiles]
    some, _ = mask.bounds((i0, i1), (j0, j1))
    return np.argwhere(np.broadcast_to(some, (i0.shape[0], j0.shape[1])))
