"""Budgets: what is asked for is what is read, and a gate changes nothing else."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from attn.softmax import Softmax
from experiments import sparse
from experiments.measure import budgets
from experiments.measure.budgets import METHODS, Budget
from models.lm import LM
from tests import compiled

T, BLOCK = 64, 4
MODEL = LM(vocab=32, width=16, heads=2, attention=(Softmax(),), hidden=0)
TOKENS = np.random.default_rng(0).integers(0, 32, (1, T))


def params():
    return compiled.init(MODEL, jax.random.key(0), TOKENS)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.7, 1.0])
def test_keys_of_a_share(share):
    n = Budget(share, T, BLOCK, 8).keys
    read = (np.tril(np.ones((T, T))) - np.tril(np.ones((T, T)), -n)).sum()
    assert abs(read / (T * (T + 1) / 2) - share) < 0.02


@pytest.mark.parametrize("name", ["window", "window and sinks", "S2", "best tokens",
                                  "best blocks", "HiP"])
def test_what_is_asked_for_is_read(name):
    attention = METHODS[name](Budget(0.4, T, BLOCK, 8))
    read = budgets.share_read(MODEL.clone(attention=(attention,)), params(), TOKENS)
    assert abs(read - 0.4) < 0.06


def test_exact_attention_reads_all_and_too_little_is_no_setting():
    assert budgets.share_read(MODEL, params(), TOKENS) == pytest.approx(1)
    assert METHODS["S2"](Budget(0.05, T, BLOCK, 8)) is None
    assert METHODS["best blocks"](Budget(0.05, T, BLOCK, 8)) is None


def test_a_gate_learns_and_the_network_around_it_stays():
    config_ = dataclasses.replace(sparse.TINY, seeds=1)
    wide = MODEL.clone(vocab=config_.recall.vocab)
    network = sparse.Trained(wide, compiled.init(wide, jax.random.key(1), TOKENS),
                             config_.recall.task(2), None, None)
    budget = network.budget(config_, 0.5)
    assert budget.width == 8 and budget.rope == MODEL.position
    model = network.with_attention(METHODS["Seer"](budget))
    found = sparse.with_gates(config_, network, model)["params"]
    kept = found["layers"]["layer_0"]["mixer"].pop("attention")
    chex.assert_trees_all_equal(found, network.params["params"])
    drawn = compiled.init(model, jax.random.key(config_.seed), TOKENS)["params"]
    drawn = drawn["layers"]["layer_0"]["mixer"]["attention"]
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(
        jax.tree.leaves(kept), jax.tree.leaves(drawn), strict=True))


@pytest.mark.parametrize("wrong, message", [
    ({"methods": ("best",)}, "'best': expected of"), ({"shares": ()}, "expected one"),
    ({"shares": (1.5,)}, r"1.5: expected in \(0, 1\]"),
])
def test_wrong_settings_say_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        sparse.Config(**wrong)
