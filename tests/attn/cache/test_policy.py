"""A cache policy says what is important, and no more."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from attn.cache.policy import Policy
from attn.softmax import Softmax
from tests.laws import close

T, C = 12, 5


@dataclasses.dataclass(frozen=True)
class Newest(Policy, Softmax):
    """The last tokens are the most important ones."""

    capacity: int = C

    def importance(self, q, cache, now):
        assert cache.pos.shape == (2, T + C + 3, 2)
        return cache.pos


def tokens(t, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (2, t, 4, 8), (2, t, 2, 8), (2, t, 2, 6)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def test_the_important_are_kept_in_order_and_what_comes_is_added():
    (q, k, v), one = tokens(T), tokens(1, 1)
    snap = Newest()
    state = snap.init_state(T + 3, q, k, v)
    assert state.k.shape == (2, C + 3, 2, 8)
    state, o = snap.step(state, q, k, v)
    close(o, Softmax()(q, k, v))
    assert state.pos[1, :, 1].tolist() == [*range(T - C, T), -1, -1, -1]
    state, o = snap.step(state, *one)
    k, v = (jnp.concatenate([a[:, T - C:], b], 1) for a, b in zip((k, v), one[1:]))
    close(o, Softmax()(one[0], k, v))
    assert state.pos[0, :, 0].tolist() == [*range(T - C, T + 1), -1, -1]


def test_a_policy_without_importance_says_so():
    q, k, v = tokens(T)

    @dataclasses.dataclass(frozen=True)
    class Silent(Policy, Softmax):
        capacity: int = C

    with pytest.raises(NotImplementedError, match="Silent says no importance"):
        Silent().step(Silent().init_state(T, q, k, v), q, k, v)
