"""Calls outside of `jit`: one program each, which is kept; the laws count programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.aaren import Aaren
from attn.contract import eager
from attn.hip import HiP
from attn.masks import Full
from attn.softmax import Softmax
from tests import compiled

Q, K, V = (jax.random.normal(jax.random.key(n), (1, 6, 2, 4)) for n in range(3))


def test_a_function_that_may_change_is_asked_again():
    """A score that reads a variable outside of it is not kept."""
    slope = 1.0

    def score(head, q_pos, kv_pos):
        return slope * kv_pos

    attention = Softmax(mask=Full(), score=score)
    first = attention(Q, K, V)
    slope = -1.0
    assert np.abs(attention(Q, K, V) - first).max() > 0.1


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: functools.partial(f)])
def test_a_function_of_a_global_is_asked_again(wrap):
    values = {"slope": 1.0}
    score = eval("lambda h, i, j: slope * j", values)
    attention = Softmax(mask=Full(), score=wrap(score))
    first = attention(Q, K, V)
    values["slope"] = -1.0
    assert np.abs(attention(Q, K, V) - first).max() > 0.1


def test_fields_of_arrays_are_no_key():
    @dataclasses.dataclass(frozen=True)
    class Slope:
        by: jax.Array

        def __call__(self, head, q_pos, kv_pos):
            return self.by * kv_pos

    def loss(by):
        return Softmax(mask=Full(), score=Slope(by))(Q, K, V).sum()

    one, other = loss(jnp.float32(1)), loss(jnp.float32(-1))
    assert abs(one - other) > 0.1


def test_questions_are_answered_outside_and_kept_with_the_program():
    state = Softmax().init_state(2, Q, K, V)
    for _ in range(2):  # traced, then found
        with pytest.raises(ValueError, match="6 tokens for a memory of 2"):
            Softmax().step(state, Q, K, V)
    _, o = jax.jit(Softmax().step)(state, Q, K, V)
    assert np.isnan(o).all()
    assert eager._questions.get() is None


def test_a_call_that_raises_leaves_nothing_behind():
    with pytest.raises(NotImplementedError, match="no such form"):
        HiP(implementation="dense")(Q, K, V)
    assert eager._questions.get() is None


@pytest.mark.parametrize("attention", [Aaren(), HiP()])
def test_forward_mode_is_refused_in_a_sentence(attention):
    if isinstance(attention, Aaren):
        params = compiled.init(attention, jax.random.key(0), Q, K, V)
        f = lambda *args: attention.apply(params, *args)
    else:
        f = attention
    with pytest.raises(NotImplementedError, match="forward-mode .*implementation="):
        jax.jvp(f, (Q, K, V), (Q, K, V))


def test_vmap_and_numpy_give_the_same():
    want = Softmax()(Q, K, V)
    many = jax.vmap(Softmax())(*(a[None] for a in (Q, K, V)))[0]
    np.testing.assert_allclose(many, want, atol=1e-6)
    np.testing.assert_allclose(Softmax()(*map(np.asarray, (Q, K, V))), want, atol=1e-6)
