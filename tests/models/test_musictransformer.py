"""MusicTransformer: a stream is the text, with absolute places as without."""

import dataclasses

import jax
import numpy as np
import pytest

from attn.relative import Relative
from models.feed import Feed
from models.generate import generate, stream
from models.musictransformer import MusicTransformer
from tests import compiled
from tests.laws import close

SMALL = MusicTransformer(
    vocab=20, width=16, heads=2, attention=(Relative(8), Relative(8, block=2)),
    feed=Feed(24, "relu", gated=False, bias=True))
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 11))


@pytest.mark.parametrize("sinusoids", [None, "add", "concat"])
def test_a_stream_is_the_text(sinusoids):
    model = SMALL.clone(sinusoids=sinusoids)
    params = compiled.init(model, jax.random.key(0), TOKENS)
    want = compiled.apply(model, params, TOKENS)
    close(stream(model, params, TOKENS, 4), want)
    packed = np.array([[1] * 5 + [2] * 6] * 2)
    o = compiled.apply(model, params, TOKENS, segments=packed)
    close(o[:, :5], want[:, :5])
    close(o[:, 5:], compiled.apply(model, params, TOKENS[:, 5:]))


def test_only_absolute_places_know_where_a_text_begins():
    for places in (None, "add"):
        model = SMALL.clone(sinusoids=places, attention=(Relative(3),))
        params = compiled.init(model, jax.random.key(0), TOKENS)
        same = np.zeros((1, 9), int)
        o = np.asarray(compiled.apply(model, params, same))
        assert (np.abs(o[0, 7] - o[0, 8]).max() < 1e-5) == (places is None)


def test_it_writes():
    params = compiled.init(SMALL, jax.random.key(0), TOKENS)
    assert len(generate(SMALL, params, [[3, 4]], length=5)[0]) == 5


def test_a_wrong_setting_says_what_was_expected():
    with pytest.raises(ValueError, match="sinusoids='both': expected one of"):
        SMALL.clone(sinusoids="both").init(jax.random.key(0), TOKENS)
    names = {field.name for field in dataclasses.fields(MusicTransformer)}
    assert {"sinusoids", "vocab"} <= names
