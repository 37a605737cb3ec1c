"""Reweave: documents are what they are said to be, and so are the networks."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import reweave
from experiments.training.plan import Faster, TrainConfig
from experiments.training.scanned import train
from tests import compiled

C = dataclasses.replace(reweave.TINY, segments=4, networks=reweave.NETWORKS)


def test_a_fact_stands_once_and_so_far_back():
    data = reweave.Config(segment=16, facts=2, asked=4).data()
    batch = data.batch(0, 20)
    tokens, far = (batch[n].reshape(20, 8, 16) for n in ("tokens", "distance"))
    targets = batch["targets"].reshape(tokens.shape)
    assert ((targets >= 0) == (far > 0)).all() and targets.max() < data.vocab
    assert (data.states(tokens).sum(2) == 2).all()
    assert ((far > 0).sum(2)[:, 1:] == 4).all() and not far[:, 0].any()
    assert {*far[:, 7].ravel().tolist()} == {*range(8)}
    for row, here, at in np.argwhere(far > 0):
        name = tokens[row, here, at] - data.noise
        told = (tokens[row] - data.first) // data.values == name
        told &= data.states(tokens[row])
        assert told.sum() == 1
        where = int(np.argwhere(told)[0, 0])
        assert where == here - far[row, here, at]
        value = (tokens[row][told][0] - data.first) % data.values
        assert targets[row, here, at] == data.answers + value


def changed(name):
    """Which segments' outputs change with the first segment."""
    model, tokens = C.model(name), C.data().batch(0, 2)["tokens"]
    params = compiled.init(model, jax.random.key(0), tokens)
    leaves, form = jax.tree.flatten(params)
    params = jax.tree.unflatten(form, [
        a + 0.2 * jax.random.normal(jax.random.key(n), a.shape)
        for n, a in enumerate(leaves)])
    other = tokens.copy()
    other[:, :C.segment] = other[:, C.segment - 1::-1] + 1
    one, two = (compiled.apply(model, params, a) for a in (tokens, other))
    gaps = np.abs(one - two).reshape(2, C.segments, -1).max((0, 2))
    return (gaps > 1e-6).tolist()


def test_what_reaches_behind_the_segment():
    assert changed("local") == [True, False, False, False]
    # a layer sees one segment back, two layers see two
    assert changed("cache") == [True, True, True, False]
    assert changed("CMR") == [True] * 4


def test_the_cache_and_the_buffers_are_of_equal_bytes():
    memory = C.model("CMR").memory
    buffer = memory.init_state(jax.ShapeDtypeStruct((1, 4, C.width), np.float32))
    assert buffer.states.size == C.layers * C.segment * C.width
    assert C.model("one layer").memory.layers == 1
    assert not C.model("cut").memory.through and memory.through


def test_without_a_gate_relevance_stays():
    rows, model = C.data().batch(0, 8), C.model("no gate")
    found = train(model, reweave.ungated, ("tokens",), rows, C.plan())
    own = found.params["params"]["layers"]["memory"]
    assert all(not np.any(own[name]) for name in reweave.RELEVANCE)
    assert np.abs(own["Wo"]).max() > 0


def test_named_parameters_learn_faster():
    plan = {"steps": 10, "clip": 1e9}
    params = {"a": {"Wo": np.ones(3, np.float32), "b": np.ones(3, np.float32)}}
    grads = jax.tree.map(lambda a: np.arange(1, 4, dtype=np.float32), params)
    steps = []
    for one in (TrainConfig(**plan), Faster(**plan, names=("Wo",), times=4.0)):
        adam = one.optimizer()
        steps.append(adam.update(grads, adam.init(params), params)[0]["a"])
    np.testing.assert_allclose(steps[1]["Wo"], 4 * steps[0]["Wo"], rtol=1e-6)
    np.testing.assert_array_equal(steps[1]["b"], steps[0]["b"])


@pytest.mark.parametrize("fields, message", [
    ({"networks": ("gate",)}, r"networks=\['gate'\]: expected some of"),
    ({"facts": 4}, "segment=8: expected facts=4 and asked=5 to fit in it"),
])
def test_wrong_settings_say_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        reweave.Config(**fields)
