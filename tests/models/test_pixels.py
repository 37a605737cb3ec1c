"""PixelNet: its tokens, what tells it where they are, and what it does without."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.essa import Essa
from attn.flow import Flow
from experiments.data.images import Digits
from experiments.training.loop import TrainConfig, fit
from experiments.training.objectives import LABELS, accuracy
from models.pixels import PixelNet, patches
from tests.compiled import apply, init
from tests.laws import close

X = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))


def logits(model, x=X):
    return apply(model, init(model, jax.random.key(1), X), x)


def test_patches_are_squares_row_by_row():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = np.asarray(patches(jnp.asarray(x), 2))
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4].reshape(2, 2, 3), x[1, 2:4, 2:4])


@pytest.mark.parametrize("model", [
    PixelNet(), PixelNet(attention=(Flow(causal=False), Essa()), patch=2),
    PixelNet(classes=3, table=True, out_norm="all", out_gate="silu", gate_rank=2),
    PixelNet(encoder=nn.Dense(32)),
])
def test_a_class_out(model):
    chex.assert_shape(logits(model), (2, model.classes))


def test_without_places_it_is_a_function_of_a_set():
    order = np.random.default_rng(0).permutation(24)
    mixed = X.reshape(2, 24, 3)[:, order].reshape(X.shape)
    close(logits(PixelNet(), mixed), logits(PixelNet()))
    told = PixelNet(table=True)
    assert np.abs(logits(told, mixed) - logits(told)).max() > 1e-4


def test_it_trains_on_digits():
    model, dataset = PixelNet(width=8, heads=2, patch=2, table=True), Digits()
    plan = TrainConfig(steps=3, batch=4, warmup=1)
    found = fit(model, dataset, plan, objective=LABELS, quiet=True)
    assert 0 <= accuracy(model, found.params, dataset.whole()) <= 1


def test_wrong_settings_say_what_was_expected():
    for model, x, message in (
        (PixelNet(attention=()), X, "one entry per layer"),
        (PixelNet(patch=4), X, "4 x 6 pixels: expected multiples of patch=4"),
        (PixelNet(), X[0], r"\[B,h,w,C\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.init(jax.random.key(0), x)
