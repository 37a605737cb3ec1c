"""Dynamics: coins, pieces, and what is counted of an attention over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.masks import Full
from attn.mixers import FNet, Static
from attn.softmax import Softmax
from experiments import dynamics
from experiments.cli import config
from experiments.data.majority import Majority
from experiments.measure import grid_cost


def test_the_side_that_came_up_more_often():
    dataset = Majority(length=8)
    batch = dataset.batch(3, 64)
    coins = batch["tokens"][:, :-1]
    assert coins.shape == (64, 7) and set(coins.ravel()) == {0, 1}
    assert (batch["tokens"][:, -1] == 2).all() and dataset.vocab == 3
    assert (batch["targets"][:, :-1] == -1).all()
    np.testing.assert_array_equal(batch["targets"][:, -1], coins.mean(1) > 0.5)
    biased = Majority(length=512, bias=0.5).batch(0, 256)["tokens"][:, :-1].mean(1)
    assert biased.std() > 0.25


@pytest.mark.parametrize("context", [128, 256, 512])
def test_what_the_last_coins_allow(context):
    dataset = Majority(length=512)
    batch = dataset.batch(0, 20000)
    seen = batch["tokens"][:, -context:-1]
    right = ((2 * seen.sum(1) > seen.shape[1]) == batch["targets"][:, -1]).mean()
    assert abs(right - dataset.best(context)) < 0.015


def test_pieces_do_not_meet():
    settings = dynamics.Config()
    x = jax.random.normal(jax.random.key(0), (2, 16, 8))
    for mixer in (FNet(), Static(), Softmax(mask=Full())):
        layer = settings.layer(mixer, 4)
        assert getattr(layer.mixer, "length", 4) == 4
        params = layer.init(jax.random.key(1), x)
        y = layer.apply(params, x)
        alone = layer.mixer.apply(
            {"params": params.get("params", {}).get("mixer", {})}, x[:, 4:8])
        np.testing.assert_allclose(y[:, 4:8], alone, atol=1e-5)
    assert isinstance(layer.mixer, MultiHead)


def test_bytes_in_the_program_are_those_by_hand():
    rows = grid_cost.measured(256, 2, 8)
    assert [row["devices"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert row["error"] <= 2e-5
        assert {n: row[n] for n in ("gathered", "reduced")} == row["by hand"]
        assert row["others"] == 0
    for form, power in (("dense", 1), ("ring", 2)):
        falls = [a[form] / b[form] for a, b in zip(rows[:2], rows[1:])]
        assert all(fall > 2**power * 0.8 for fall in falls), (form, falls)


def test_the_model_of_time():
    ideal = grid_cost.Hardware(link=1e30)
    times = grid_cost.modelled(4096, 4, 64, ideal)
    assert np.isclose(times["1 device"] / times["8 devices"], 8)
    assert times["vanilla"] > 5 * times["1 device"]
    slow = grid_cost.modelled(4096, 4, 64, grid_cost.Hardware())
    assert slow["8 devices"] > times["8 devices"]
    assert slow["vanilla"] == times["vanilla"]


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (
        ({"tasks": ("needles",)}, "tasks"), ({"cuts": (3,)}, "cuts=3"),
    ):
        with pytest.raises(ValueError, match=message):
            dynamics.Config(**wrong)
    with pytest.raises(ValueError, match="length=7"):
        Majority(length=7)
    with pytest.raises(ValueError, match="bias=0.6"):
        Majority(bias=0.6)
    assert config.parse("Majority(length=8)") == Majority(length=8)
    assert jnp.isfinite(Majority().best(2))
