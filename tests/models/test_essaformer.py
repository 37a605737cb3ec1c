"""ESSAformer: its shapes, its shuffles, shared weights, and dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.essaformer import ESSAformer, shuffle, unshuffle
from tests.compiled import apply, init

X = jax.random.normal(jax.random.key(0), (1, 4, 5, 3))


def test_channels_become_pixels_and_come_back():
    x = np.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8)
    y = np.asarray(shuffle(jnp.asarray(x), 2))
    for c, i, j in ((0, 0, 0), (0, 0, 1), (1, 1, 0)):
        np.testing.assert_array_equal(y[:, i::2, j::2, c], x[..., 4 * c + 2 * i + j])
    np.testing.assert_array_equal(unshuffle(jnp.asarray(y), 2), x)


@pytest.mark.parametrize("scale,width", [(2, 4), (3, 9), (4, 8)])
def test_shapes(scale, width):
    model = ESSAformer(scale, width)
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    y = jax.eval_shape(model.apply, params, X)
    chex.assert_shape(y, (1, 4 * scale, 5 * scale, 3))
    # three passes at full size and two at low size share their weights
    assert set(params["params"]) == {"first", "last", "up", "down", "high", "low"}


def test_dropout_only_in_training():
    model = ESSAformer(2, 4)
    params = init(model, jax.random.key(0), X)
    rest = apply(model, params, X)
    chex.assert_trees_all_equal(rest, apply(model, params, X))
    train = jax.jit(lambda key: model.apply(
        params, X, train=True, rngs={"dropout": key}
    ))
    drops = [train(jax.random.key(n)) for n in (0, 1)]
    assert np.abs(drops[0] - drops[1]).max() > 1e-4
    none = model.clone(dropout=0.0)
    still = jax.jit(lambda params, x: none.apply(params, x, train=True))
    chex.assert_trees_all_equal(rest, still(params, X))


def test_wrong_settings_say_what_was_expected():
    for model, message in (
        (ESSAformer(5, 4), "scale=5: expected 3 or a power"),
        (ESSAformer(2, 6), "width=6: expected a multiple of 4"),
        (ESSAformer(3, 4), "width=4: expected a multiple of 9"),
    ):
        with pytest.raises(ValueError, match=message):
            model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"\[B,h,w,bands\]"):
        ESSAformer(2, 4).init(jax.random.key(0), X[0])
