"""SAQ: a staircase of bits, however tokens came, values as well as keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cache import quantised
from attn.kivi import KIVI
from attn.saq import SAQ
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 45, 4, 2, 8, 8
SMALL = SAQ(bits=(8, 4, 2), tokens=8, group=4)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def down(x, stairs, axis):
    for bits in stairs:
        codes = quantised.quantise(x, bits, 4, axis, 8)
        x = quantised.dequantise(codes, bits, 4, axis)
    return x


def by_hand(a, axis):
    """A segment of age n went down n steps, from what it stood for."""
    n = a.shape[1] // 8
    parts = [down(a[:, 8 * i:8 * i + 8], (8, 4, 2)[:n - i], axis) for i in range(n)]
    return jnp.concatenate([*parts, a[:, 8 * n:]], 1)


@pytest.mark.parametrize("piece", [1, 5, T])
def test_old_segments_go_down_the_stairs(piece):
    q, k, v = inputs()
    _, state = stream(SMALL, q, k, v, 50, piece)
    cache = SMALL.cache(state)
    for b in range(B):
        pos = np.asarray(cache.pos[b, :, 0])
        at = np.argsort(np.where(pos < 0, 999, pos))[:T]
        assert (pos[at] == np.arange(T)).all()
        close(cache.k[b, at], by_hand(k, 1)[b])
        close(cache.v[b, at], by_hand(v, 3)[b])
    one = inputs(1, 1)
    _, o = step(SMALL, state, *one)
    keys, vals = (jnp.concatenate([by_hand(a, axis), new], 1) for a, new, axis in (
        (k, one[1], 1), (v, one[2], 3)))
    close(o, attend(Softmax(), one[0], keys, vals))


def test_a_prompt_is_exact_and_rows_are_their_own():
    q, k, v = inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 40, [1] * 8 + [2] * 37])
    state, o = step(SMALL, SMALL.init_state(50, q, k, v), q, k, v, segments=segments)
    for b, cut in ((0, 5), (1, 8)):
        args = tuple(a[b:b + 1, cut:] for a in (q, k, v))
        alone, own = step(SMALL, SMALL.init_state(50, *args), *args)
        close(o[b, cut:], own[0])
        have, want = SMALL.cache(state), SMALL.cache(alone)
        there = np.asarray(want.pos[0, :, 0]) >= 0
        assert (have.pos[b] == want.pos[0]).all()
        close(have.k[b, there], want.k[0, there])


def test_a_memory_has_the_room_that_it_says():
    q, k, v = inputs()
    for size in (3, 8, 20, 24, 41):
        state = SMALL.init_state(size, q, k, v)
        assert size <= state.room < size + 32
        state, o = stream(SMALL, *(a[:, :size] for a in (q, k, v)), size, 1)[::-1]
        assert np.isfinite(o).all()


def test_newer_keys_are_nearer_to_what_they_were():
    """The staircase: errors grow with age; at as many bits in the mean, what is near,
    and looked at most, is better than with the same bits for all."""
    q, k, v = inputs(64)
    stairs = SAQ(bits=(8, 4, 2, 2), tokens=8, group=8)
    uniform = KIVI(bits=2, group=16, residual=16)
    error = []
    for policy in (stairs, uniform):
        state, _ = step(policy, policy.init_state(64, q, k, q[:, :, :K].repeat(2, 3)),
                        q, k, q[:, :, :K].repeat(2, 3))
        cache = policy.cache(state)
        pos = np.asarray(cache.pos[0, :, 0])
        at = np.argsort(np.where(pos < 0, 999, pos))[:64]
        error.append(np.abs(cache.k[0, at] - k[0]).mean((1, 2)))
    ages = error[0].reshape(8, 8).mean(1)
    assert ages[7] < ages[6] < ages[5] and ages[6] < 0.5 * ages[0]
    assert error[0][48:].mean() < error[1][32:48].mean()


@pytest.mark.parametrize("fields, message", [
    ({"bits": (2, 4)}, "bits"), ({"bits": ()}, "bits"), ({"bits": (16,)}, "bits=16"),
    ({"group": 3}, "group=3"), ({"tokens": 100}, "tokens=100"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SAQ(**fields)
