"""Commands that show what a paper claims: what they compare is what they say."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import regions
from experiments.measure import seeds
from tests import compiled


def seen(mask, t=32):
    """[T,T] booleans."""
    i, j = np.mgrid[:t, :t]
    return np.broadcast_to(mask(0, i, j), (t, t))


def test_bases_read_near_tokens_and_the_ends_of_regions():
    own = regions.bases(8)
    for i in range(32):
        near = {j for j in range(i + 1) if j // 8 == i // 8}
        spans = {(i >> bit << bit) - 1 for bit in range(6) if i >> bit & 1}
        for name, expected in (
            ("fixed", near | {j for j in range(i) if j % 8 == 7}),
            ("axial", near | {j for j in range(i) if j % 8 == i % 8}),
            ("logsparse", spans | {i}),
        ):
            assert {*np.flatnonzero(seen(own[name])[i])} == expected, (name, i)
    assert all(mask.causal for mask in own.values())


def test_pixels_are_predicted_from_those_before():
    rows = regions.digits("valid")
    tokens, targets = rows["tokens"], rows["targets"]
    assert tokens.shape == targets.shape == (360, 64)
    assert (tokens[:, 1:] == targets[:, :-1]).all() and (tokens[:, 0] == 17).all()
    assert targets.min() == 0 and targets.max() == 16
    whole = dataclasses.replace(regions.TINY, block=64)
    model = whole.model(regions.Combiner(block=64))
    params = compiled.init(model, jax.random.key(0), tokens[:1])
    exact = whole.model(regions.Softmax())
    np.testing.assert_allclose(*(compiled.apply(m, params, tokens[:2]) for m in (
        model, exact)), atol=1e-5)


def test_the_spread_of_seeds_in_words():
    found = seeds.merged([{"a": 0.5, "b": 1.0}, {"a": 0.25, "b": 1.0}])
    assert seeds.spread(found, "a", "{:.2f}") == "0.38 (0.25 to 0.50)"
    assert seeds.spread(found, "b", "{:.1f}") == "1.0"


@pytest.mark.parametrize("wrong, message", [
    (lambda: regions.Config(plans=("strided",)), "'strided': expected of"),
])
def test_wrong_settings_say_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
