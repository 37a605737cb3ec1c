"""PyramidKV: a budget a layer, whose mean is what was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.pyramidkv import PyramidKV, budgets
from attn.snapkv import SnapKV
from models.lm import LM, state_bytes
from tests.laws import close

T = 48


def test_a_pyramid_has_the_mean_that_was_asked_for():
    for prompt in (129, 150, 200, 300, 2048, 9999):
        for layers in (1, 2, 5, 32):
            own = budgets(prompt, 128, 32, 20, layers)
            assert len(own) == layers and list(own) == sorted(own, reverse=True)
            assert 0 < own[-1] and own[0] <= prompt - 32
            # the step is a whole number, rounded down: the last layers have more
            assert 0 <= np.mean(own) - 96 <= layers / 2
    assert budgets(128, 128, 32, 20, 4) == budgets(40, 128, 32, 20, 4) == (96,) * 4


def test_a_layer_keeps_what_snapkv_keeps_with_its_budget():
    q, k, v = (jax.random.normal(key, (1, T, n, 8)) for key, n in zip(
        jax.random.split(jax.random.key(0), 3), (4, 2, 2)))
    stack = PyramidKV(capacity=16, window=4, beta=4, layers=3).stack()
    sizes = [a.kept_of(T) for a in stack]
    assert sizes == [25, 16, 7]
    for pyramid, size in zip(stack, sizes):
        snap = SnapKV(capacity=size, window=4)
        states = [jax.jit(a.step)(a.init_state(T + 2, q, k, v), q, k, v)[0]
                  for a in (pyramid, snap)]
        for have, want in zip(*states):
            close(have, want)


def test_a_model_takes_the_stack_and_its_memory_is_the_pyramids():
    model = LM(vocab=16, width=16, heads=2, attention=PyramidKV(
        capacity=16, window=4, layers=4).stack())
    snap = model.clone(attention=(SnapKV(capacity=16, window=4),) * 4)
    sizes = [state_bytes(a, 200, 190) for a in (model, snap)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.1
    tokens = jnp.zeros((1, 30), jnp.int32)
    states = model.init_state(34, tokens)
    assert [a.k.shape[1] for a in states] == sorted(
        (a.k.shape[1] for a in states), reverse=True)


@pytest.mark.parametrize("fields", [{"layer": 3, "layers": 3}, {"beta": 0}])
def test_wrong_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        PyramidKV(**fields)
