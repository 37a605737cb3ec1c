"""Masks: the predicate, and what is said of tiles without evaluating it."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import FOREVER, BlockCausal, Causal, Full, Mask, Reach, Sink
from attn.masks import Window, tiles
from attn.softmax import Softmax
from tests.golden.__main__ import cases
from tests.laws import close, run

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "cases"

N = 24
I, J = np.arange(N)[:, None], np.arange(N)[None, :]
SEEN = {
    Full(): I + J >= 0,
    Causal(): J <= I,
    Window(3): I - J <= 3,
    Window(0, 0): I == J,
    Window(4, 2): (I - J <= 4) & (J - I <= 2),
    Sink(0): I + J < 0,
    Sink(3): (J < 3) & (I >= 0),
    Causal() & Window(5): (J <= I) & (I - J <= 5),
    Causal() & (Window(5) | Sink(2)): (J <= I) & ((I - J <= 5) | (J < 2)),
    Causal() & Window(5) | Sink(2): (J <= I) & (I - J <= 5) | (J < 2),
    BlockCausal(5): J // 5 <= I // 5,
    BlockCausal(1): J <= I,
    BlockCausal(4, 1): (J // 4 <= I // 4) & (I // 4 - J // 4 <= 1),
    BlockCausal(4, 0, 2): (J // 4 - I // 4 <= 2) & (I // 4 <= J // 4),
    Causal() & BlockCausal(6, 0): (J <= I) & (I // 6 == J // 6),
    ~Causal(): J > I,
    ~Sink(4): (J >= 4) & (I >= 0),
    ~(Causal() & Window(2)) & ~Sink(1): ((J > I) | (I - J > 2)) & (J >= 1),
    ~(~Causal() | Window(3, 1)): (J <= I) & (I - J > 3),
    ~~Window(2, 2): abs(I - J) <= 2,
}
NAMED = pytest.mark.parametrize("mask", SEEN, ids=str)


@dataclasses.dataclass(frozen=True)
class Checks(Mask):
    """Even heads see even keys, odd heads odd ones; says nothing of tiles."""

    def __call__(self, h, i, j):
        return ((h + j) % 2 == 0) & (i == i)


@NAMED
def test_the_predicate(mask):
    for module in (np, jnp):
        i, j = module.asarray(I), module.asarray(J)
        assert (np.broadcast_to(mask(0, i, j), (N, N)) == SEEN[mask]).all()
    traced = jax.jit(lambda i, j: jnp.broadcast_to(mask(0, i, j), (N, N)))
    assert (traced(I, J) == SEEN[mask]).all()


@NAMED
def test_the_predicate_on_single_numbers(mask):
    for i, j in itertools.product((0, 3, 4, 9), repeat=2):
        assert bool(mask(0, i, j)) == SEEN[mask][i, j]


@NAMED
def test_bounds_are_never_wrong(mask):
    cuts = [(a, b) for a in range(0, N, 2) for b in range(a, N, 3)]
    for i, j in itertools.product(cuts, cuts):
        part = SEEN[mask][i[0]:i[1] + 1, j[0]:j[1] + 1]
        some, every = mask.bounds(i, j)
        assert some or not part.any(), (i, j)
        assert part.all() or not every, (i, j)


@pytest.mark.parametrize("mask", [
    Full(), Causal(), ~Causal(), Window(3), Window(4, 2), Sink(3), ~Sink(3),
    Causal() & Window(5),
], ids=str)
def test_bounds_of_one_comparison_are_exact(mask):
    for i, j in itertools.product([(a, a + 3) for a in range(0, N - 3)], repeat=2):
        part = SEEN.get(mask, mask(0, I, J))[i[0]:i[1] + 1, j[0]:j[1] + 1]
        some, every = mask.bounds(i, j)
        assert bool(some) == part.any() and bool(every) == part.all(), (i, j)


def test_a_mask_that_says_only_its_predicate_is_right_everywhere():
    for mask in (Checks(), ~Checks(), Checks() & Causal(), ~(Checks() | Sink(2))):
        want = np.broadcast_to(mask(np.arange(4)[:, None, None], I, J), (4, N, N))
        assert want.any() and not want.all()
        some, every = mask.bounds((5, 9), (3, 5))
        assert some and not every
    assert not (Checks() & Causal()).bounds((0, 3), (4, 7))[0]
    assert not Checks().relative and not Checks().causal
    assert (Checks() & Causal()).causal
    assert Checks().reach().left == FOREVER


@NAMED
def test_reach_covers_what_a_later_query_sees(mask):
    left, first = mask.reach()
    within = (I - J <= left) | (J < first)
    assert within[SEEN[mask] & (J <= I)].all()


def test_reach_is_tight_where_slots_are_saved():
    assert Window(5).reach() == Reach(5, 0)
    assert (Causal() & Window(5)).reach() == Reach(5, 0)
    assert (Causal() & (Window(5) | Sink(2))).reach() == Reach(5, 2)
    assert (Window(5) & Window(3)).reach() == Reach(3, 0)
    assert (Window(5) | Window(3)).reach() == Reach(5, 0)
    assert (Causal() | Window(5)).reach().left == FOREVER
    assert (~Window(5)).reach().left == FOREVER


@NAMED
def test_causal_and_relative_say_the_truth(mask):
    seen = SEEN[mask]
    assert mask.causal == (not seen[J > I].any())
    if mask.relative:
        assert (seen[1:, 1:] == seen[:-1, :-1]).all()


def test_relative_is_kept_by_composing():
    assert (~(Causal() & Window(3)) | Full()).relative
    assert not (Causal() | Sink(1)).relative and not (~Sink(1)).relative


@NAMED
@pytest.mark.parametrize("size", [(4, 4), (8, 3), (24, 5)])
def test_tiles_leave_nothing_out(mask, size):
    bq, bk = size
    first_q, first_k = np.arange(0, N, bq), np.arange(0, N, bk)
    last_q = np.minimum(first_q + bq, N) - 1
    last_k = np.minimum(first_k + bk, N) - 1
    found = [tuple(p) for p in tiles(mask, (first_q, last_q), (first_k, last_k))]
    assert found == sorted(set(found))
    for a, b in itertools.product(range(len(first_q)), range(len(first_k))):
        part = SEEN[mask][a * bq:(a + 1) * bq, b * bk:(b + 1) * bk]
        assert (a, b) in found or not part.any()


def test_tiles_of_a_band_grow_with_the_length_only():
    visits = []
    for n in (64, 128, 256):
        first = np.arange(0, n, 8)
        at = first, first + 7
        visits.append(len(tiles(Causal() & (Window(8) | Sink(1)), at, at)))
    assert visits[2] - visits[1] == 2 * (visits[1] - visits[0])
    assert len(tiles(Causal(), at, at)) == 32 * 33 // 2
    assert tiles(Sink(0), at, at).shape == (0, 2)


def test_masks_are_values():
    mask = Causal() & (Window(5) | Sink(2))
    assert mask == Causal() & (Window(5) | Sink(2)) != Causal() & Window(5) & Sink(2)
    assert len({mask, Causal() & (Window(5) | Sink(2))}) == 1
    spelled = {n: globals()[n] for n in ("Causal", "Window", "Sink")}
    spelled |= {type(m).__name__: type(m) for m in (mask, Window(1) | Sink(1), ~mask)}
    assert eval(repr(~mask), spelled) == ~mask


@pytest.mark.parametrize("wrong,message", [
    (lambda: Window(-1), "left=-1: expected 0 or more"),
    (lambda: Window(2, -3), "right=-3: expected 0 or more"),
    (lambda: Sink(-2), "n=-2: expected 0 or more"),
])
def test_wrong_arguments_say_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_mask_needs_a_predicate():
    with pytest.raises(NotImplementedError, match="no predicate"):
        Mask()(0, 1, 1)


def test_masks_are_joined_by_symbols_only():
    for join in (lambda: Causal() and Window(4), lambda: Causal() or Window(4),
                 lambda: not Causal(), lambda: bool(Window(4))):
        with pytest.raises(ValueError, match="no truth value.*&"):
            join()
    with pytest.raises(ValueError, match="a mask & 4: expected a mask"):
        Causal() & 4


def test_a_window_longer_than_any_text_is_no_window():
    i, j = jnp.arange(9, dtype=jnp.int32)[:, None], jnp.arange(9, dtype=jnp.int32)[None]
    for n in (2**31 - 1, 2**31, 2**40):
        wide = Causal() & Window(n) & Window(4, right=n)
        np.testing.assert_array_equal(
            (Causal() & Window(n))(0, i, j), Causal()(0, i, j))
        np.testing.assert_array_equal(wide(0, i, j), (Causal() & Window(4))(0, i, j))
        assert Sink(n)(0, i, j).all() and (Causal() & Window(n)).causal
        (Causal() & Window(n)).bounds((i[0], i[1]), (j[0], j[0]))


@pytest.mark.parametrize("left", [None, 1])
def test_frames_are_seen_whole_and_in_order(left):
    """What stands in the golden vectors of Next-Frame Diffusion."""
    case = cases(GOLDEN / "nfd.npz")["case0"]
    config = case["config"]
    assert config["window_frames"] == 2
    attention = Softmax(mask=BlockCausal(config["tokens_per_frame"], left))
    q, k, v, do = (jnp.asarray(case[name]) for name in ("q", "k", "v", "ct"))
    o, grads = run(attention, q, k, v, do=do)
    close(o, case["out" if left is None else "out_window"])
    if left is None:
        for name, grad in zip("qkv", grads, strict=True):
            close(grad, case[f"grad_{name}"], "gradient")


def test_the_first_and_the_last_of_blocks():
    assert BlockCausal(6).reach().left == FOREVER
    assert BlockCausal(6, 1).reach() == Reach(11, 0)
    assert BlockCausal(1).causal and not BlockCausal(2).causal
    assert (Causal() & BlockCausal(4, 1)).causal
    with pytest.raises(ValueError, match="block=0: expected 1 or more"):
        BlockCausal(0)
    with pytest.raises(ValueError, match="left=-1: expected 0 or more"):
        BlockCausal(4, -1)
    i = jnp.arange(9, dtype=jnp.int32)
    assert BlockCausal(2**40, 2**40)(0, i[:, None], i[None]).all()
