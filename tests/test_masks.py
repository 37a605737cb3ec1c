"""Masks: predicates, what they say of whole tiles, and how far back they see."""

import itertools

import numpy as np
import pytest

from attn.masks import FOREVER, Causal, Full, Mask, Sink, Window, tiles

MASKS = [
    Full(), Causal(), Window(3), Window(0), Window(2, right=4), Sink(0), Sink(3),
    Causal() & Window(4), Causal() & (Window(2) | Sink(2)), ~Causal(),
    ~(Window(3) | Sink(1)), Causal() & ~Window(2), Full() & Sink(2) | Causal(),
]
I, J = np.arange(12)[:, None], np.arange(12)[None, :]


class Odd(Mask):
    """A mask that says no more than its predicate."""

    def __call__(self, h, i, j):
        return (i + j) % 2 == 1


@pytest.mark.parametrize("mask, by_hand", [
    (Full(), I + J >= 0), (Causal(), J <= I), (Window(3), I - J <= 3),
    (Window(2, right=1), (I - J <= 2) & (J - I <= 1)), (Sink(2), J + 0 * I < 2),
    (Causal() & Window(3), (J <= I) & (I - J <= 3)), (~Causal(), J > I),
    (Causal() & (Window(1) | Sink(2)), (J <= I) & ((I - J <= 1) | (J < 2))),
])
def test_predicates(mask, by_hand):
    assert (np.broadcast_to(mask(None, I, J), by_hand.shape) == by_hand).all()


@pytest.mark.parametrize("mask", [*MASKS, Odd()], ids=str)
def test_bounds_are_never_wrong(mask):
    seen = np.broadcast_to(mask(None, I, J), (12, 12))
    ranges = [(a, b) for a in range(12) for b in range(a, 12)]
    exact = 0
    for (i0, i1), (j0, j1) in itertools.product(ranges[::3], ranges[::2]):
        tile = seen[i0:i1 + 1, j0:j1 + 1]
        some, every = mask.bounds(
            (np.int64(i0), np.int64(i1)), (np.int64(j0), np.int64(j1))
        )
        assert some or not tile.any()
        assert not every or tile.all()
        exact += (some == tile.any()) and (every == tile.all())
    simple = isinstance(mask, (Full, Causal, Window, Sink))
    assert not simple or exact == len(ranges[::3]) * len(ranges[::2])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_reach_holds_for_all_that_is_seen(mask):
    i, j = np.arange(60)[:, None], np.arange(60)[None]
    seen = np.broadcast_to(mask(None, i, j), (60, 60)) & (j <= i)
    left, first = mask.reach()
    assert not (seen & (i - j > left) & (j >= first)).any()


def test_what_a_cache_needs():
    assert (Causal() & Window(4)).reach() == (4, 0)
    assert (Causal() & (Window(4) | Sink(2))).reach() == (4, 2)
    assert Causal().reach().left == FOREVER


@pytest.mark.parametrize("mask, causal, relative", [
    (Full(), False, True), (Causal(), True, True), (Window(3), False, True),
    (Causal() & (Window(3) | Sink(2)), True, False), (Window(2, right=0), True, True),
    (Causal() & Window(3) | Sink(2), False, False), (~Causal(), False, True),
])
def test_causal_and_relative(mask, causal, relative):
    assert (mask.causal, mask.relative) == (causal, relative)


def test_tiles_that_must_be_visited():
    first = np.arange(4) * 3
    at = first, first + 2
    assert tiles(Causal(), at, at).tolist() == [[i, j] for i in range(4)
                                                for j in range(i + 1)]
    near = tiles(Causal() & Window(2), at, at).tolist()
    assert near == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    assert len(tiles(Odd(), at, at)) == 16
    assert len(tiles(Full(), at, at)) == 16


def test_heads_may_differ():
    class ByHead(Mask):
        def __call__(self, h, i, j):
            return (j <= i) & ((h == 0) | (i - j <= 1))

    h = np.arange(2)[:, None, None]
    seen = ByHead()(h, I[None], J[None])
    assert (seen[0] == (J <= I)).all() and seen[1].sum() == 23


@pytest.mark.parametrize("make, message", [
    (lambda: Window(-1), "left=-1"), (lambda: Window(1, right=-2), "right=-2"),
    (lambda: Sink(-1), "n=-1"),
])
def test_wrong_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()
