"""The cache: slots, rolling slots, what a policy keeps, what is never silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cache import kv as caches
from attn.cache.rolling_slots import RollingSlots, rolling_slots
from attn.contract.segments import locate
from attn.masks import FOREVER, Causal, Sink, Window

B, K, D, V = 2, 2, 4, 6


def tokens(t, start=0):
    k = jnp.arange(start, start + t, dtype=jnp.float32)[None, :, None, None]
    return jnp.tile(k, (B, 1, K, D)), jnp.tile(k, (B, 1, K, V))


def filled(t=6, slots=8, **options):
    k, v = tokens(t)
    now = locate(None, B, t)
    empty = caches.empty(k, v, slots, **options)
    return caches.append(empty, k, v, now, now.pos)


def test_an_empty_cache():
    k, v = tokens(3)
    cache = caches.empty(k.astype(jnp.bfloat16), v, 5, per_head=True)
    assert cache.k.dtype == jnp.bfloat16 and cache.v.shape == (B, 5, K, V)
    assert cache.pos.shape == (B, 5, K) and (cache.pos == -1).all()
    with pytest.raises(ValueError, match="0 tokens"):
        caches.empty(k, v, 0)


def test_appending_drops_what_has_no_slot():
    cache = filled()
    assert cache.pos[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    now = locate(None, B, 3, cache.end, cache.segment)
    after = caches.append(cache, *tokens(3, 6), now, now.pos)
    assert after.pos[0, :, 0].tolist() == list(range(8))  # the ninth found no slot
    assert after.end.tolist() == [9, 9] and after.k[0, 7, 0, 0] == 7


def test_a_new_sequence_forgets_the_old_one():
    cache = filled()
    now = locate(jnp.array([[1, 2, 2], [1, 0, 1]]), B, 3, cache.end, cache.segment)
    after = caches.append(cache, *tokens(3, 90), now, now.pos)
    assert after.pos[0, :, 0].tolist() == [0, 1] + [-1] * 6
    assert after.k[0, :2, 0, 0].tolist() == [91, 92]
    assert after.pos[1, :, 0].tolist() == list(range(8))
    assert after.end.tolist() == [2, 8]


def test_concat_and_only_current():
    cache = filled()
    now = locate(jnp.array([[1, 2, 2], [1, 0, 1]]), B, 3, cache.end, cache.segment)
    both, runs = caches.concat(cache, *tokens(3, 90), now)
    assert both.k.shape[1] == 11 and runs.shape == (B, 11)
    left = caches.only_current(both, runs).pos[..., 0]
    assert left[0].tolist() == [-1] * 9 + [0, 1]
    assert left[1].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, 6, -1, 7]


def test_keeping_the_best_of_each_head_in_order():
    score = jnp.array([[5, 1], [0, 2], [4, 3], [1, 4], [9, 5], [2, 0], [99, 99],
                       [99, 99]], jnp.float32)[None].repeat(B, 0)
    kept = caches.keep(filled(), score, 3)
    assert kept.pos[0].T.tolist() == [[0, 2, 4], [2, 3, 4]]
    assert kept.k[0, :, 1, 0].tolist() == [2, 3, 4] and kept.v.shape == (B, 3, K, V)
    wide = caches.pad_slots(kept, 5)
    assert wide.pos[0, :, 0].tolist() == [0, 2, 4, -1, -1]
    every = caches.keep(filled(), score, 8)
    assert every.pos[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


@pytest.mark.parametrize("mask, slots, want", [
    (Causal(), 20, (20, 0, False)), (Causal() & Window(4), 20, (5, 0, True)),
    (Causal() & (Window(4) | Sink(2)), 20, (7, 2, True)),
    (Causal() & Window(30), 20, (20, 0, False)),
])
def test_rolling_slots(mask, slots, want):
    assert tuple(rolling_slots(mask, slots)) == want


def test_rolling_slots_are_used_again_and_the_first_stay():
    rolling = RollingSlots(5, 2, True)
    now = locate(None, 1, 9)
    assert rolling.slot(now)[0].tolist() == [0, 1, -1, -1, -1, -1, 3, 4, 2]
    assert rolling_slots(Causal(), 4).slots == 4 and FOREVER > 10**9


def test_no_room_is_never_silent():
    caches.check_room(jnp.array([3, 4]), 4)
    with pytest.raises(ValueError, match="5 tokens for a memory of 4"):
        caches.check_room(jnp.array([3, 5]), 4)
    o = jax.jit(lambda end: caches.poison(jnp.ones((2, 3)), end, 4))(jnp.array([4, 5]))
    assert np.isnan(o[1]).all() and (o[0] == 1).all()


def test_wrong_tokens():
    k, v = tokens(2)
    with pytest.raises(ValueError, match="k has shape"):
        caches.check_fits(filled(), k[..., :2], v)
    with pytest.raises(ValueError, match="v has shape"):
        caches.check_fits(filled(), k, v[:, :, :1])
    with pytest.raises(ValueError, match="state is a dict"):
        caches.check_fits({}, k, v)
