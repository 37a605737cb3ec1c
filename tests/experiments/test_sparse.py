"""Budgets: what is asked for is what is read, and a gate changes nothing else."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util

from attn.softmax import Softmax
from attn.topk import TopK
from experiments import sparse
from experiments.data import Text
from experiments.measure import budgets, less
from experiments.measure.budgets import METHODS, Budget, as_read
from experiments.measure.less import Network
from experiments.sources import loaded
from models.lm import LM
from tests import compiled
from tests.experiments.test_evaluate import folder  # noqa: F401

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
                                  "best blocks", "HiP", "MoBA"])
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
    network = Network(wide, compiled.init(wide, jax.random.key(1), TOKENS),
                      config_.recall.task(2), None, None)
    budget = network.budget(0.5, config_.length, config_.block)
    assert budget.width == 8 and budget.rope == MODEL.position
    model = network.with_attention(METHODS["Seer"](budget))
    gates = less.learned(network, model, 2, 2, 0)
    found = less.joined(network.params, gates)["params"]
    kept = found["layers"]["layer_0"]["mixer"].pop("attention")
    chex.assert_trees_all_equal(found, network.params["params"])
    drawn = compiled.init(model, jax.random.key(0), TOKENS)["params"]
    drawn = drawn["layers"]["layer_0"]["mixer"]["attention"]
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(
        jax.tree.leaves(kept), jax.tree.leaves(drawn), strict=True))


def test_what_reads_blocks_in_a_stream_reads_its_budget():
    budget = Budget(0.4, T, BLOCK, 8)
    attention = METHODS["SeerR"](budget)
    assert attention.budget == METHODS["MoBA"](budget).top_k * BLOCK
    model = MODEL.clone(attention=(attention,))
    assert abs(budgets.share_read(model, None, TOKENS) - 0.4) < 0.06
    assert METHODS["SeerR"](Budget(0.01, T, BLOCK, 8)) is None
    whole = dataclasses.replace(budget, share=1.0, rope=MODEL.position)
    model = MODEL.clone(attention=(METHODS["SeerR"](whole),))
    drawn = compiled.init(model, jax.random.key(0), TOKENS)
    mine = less.joined(params(), {path: a for path, a in traverse_util.flatten_dict(
        drawn["params"]).items() if path[-1].startswith("gate")})
    np.testing.assert_allclose(
        jax.jit(as_read(model).apply)(mine, TOKENS),
        jax.jit(MODEL.apply)(params(), TOKENS), atol=2e-5)


def test_a_model_that_is_given_is_judged_in_its_own_words(
        folder, tmp_path):  # noqa: F811
    settings = dataclasses.replace(
        sparse.TINY, model=str(folder), methods=("window", "MoBA", "Seer"), facts=1,
        shares=(1.0,), rows=1, seeds=1, length=160, block=16, gate_steps=3,
        text=Text(path="models", pattern="*.py"), folder=str(tmp_path / "run"))
    found = sparse.run(settings)
    rows = json.loads((tmp_path / "run" / "sparse.json").read_text())["rows"]
    exact, *others = rows
    assert [row["method"] for row in others] == ["window", "MoBA", "Seer"]
    for row in others:  # with everything read they are exact attention
        assert row["bits"] == pytest.approx(exact["bits"], rel=1e-4)
        assert row["read"] == pytest.approx(1.0)
        assert {"needles", "recall"} <= row.keys()
    assert found["window 1 bits"] == others[0]["bits"]
    assert (tmp_path / "run" / "sparse.png").stat().st_size > 1000


@pytest.mark.parametrize("name, more, message", [
    ("tests/checkpoints/llama", {}, "has no tokenizer.json"),
    ("tests/checkpoints/kimi_linear", {}, "no layer is exact attention"),
    (None, {"length": 40}, "length=41: expected"),
])
def test_models_that_cannot_be_judged(
        name, more, message, folder, tmp_path):  # noqa: F811
    settings = dataclasses.replace(
        sparse.TINY, model=name or str(folder), folder=str(tmp_path / "run"),
        text=Text(path="models", pattern="*.py"), **more)
    with pytest.raises(ValueError, match=message):
        sparse.run(settings)


def test_a_method_without_a_place_is_left_out():
    found = loaded("tests/checkpoints/gpt_oss")
    given = less.Given(found.model, found.params, None, None, None)
    with pytest.raises(ValueError, match="has sinks, and TopK takes none"):
        given.with_attention(TopK(2))


@pytest.mark.parametrize("wrong, message", [
    ({"methods": ("best",)}, "'best': expected of"), ({"shares": ()}, "expected one"),
    ({"shares": (1.5,)}, r"1.5: expected in \(0, 1\]"),
])
def test_wrong_settings_say_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        sparse.Config(**wrong)
