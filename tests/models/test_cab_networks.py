"""The other networks of CAB: speech, forecasts, clouds, diffusion; by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.performer import Performer
from models.informer import Distil, Informer
from models.places import Places
from models.pointr import PoinTr, neighbours, spread
from models.seq2seq import NORM, Decoder, DecoderBlock, MaskedLM
from models.speech import FastSpeech, TransformerTTS, repeated
from models.sr3 import SR3, levels, sample
from tests import compiled

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_phones_are_repeated_as_long_as_they_last():
    x, lasts = normal(3, 4, 2), RNG.integers(0, 4, (3, 4))
    found = jax.jit(repeated, static_argnums=2)(x, jnp.asarray(lasts), 9)
    for row, many, own in zip(np.asarray(x), lasts, found):
        want = np.repeat(row, many, 0)[:9]
        np.testing.assert_array_equal(own[:len(want)], want)
        np.testing.assert_array_equal(own[len(want):], np.tile(row[-1], (
            9 - len(want), 1)))


def test_speech_networks():
    phones = jnp.asarray(RNG.integers(24, size=(2, 5)))
    fast = FastSpeech(frames=11, width=8, heads=2, layers=1)
    params = compiled.init(fast, KEY, phones)
    frames, log = compiled.apply(fast, params, phones)
    assert frames.shape == (2, 11, 20) and log.shape == (2, 5)
    lasts = jnp.maximum(jnp.round(jnp.exp(log)), 1).astype(jnp.int32)
    told = compiled.apply(fast, params, phones, lasts)[0]
    np.testing.assert_allclose(told, frames, atol=1e-6)
    slow = TransformerTTS(width=8, heads=2, layers=1)
    before = normal(2, 6, 20)
    params = compiled.init(slow, KEY, phones, before)
    found = compiled.apply(slow, params, phones, before)
    other = compiled.apply(slow, params, phones, before.at[:, 4:].add(1.0))
    np.testing.assert_array_equal(found[:, :4], other[:, :4])


def test_distilling_halves_and_a_forecast_is_as_long_as_asked():
    x = normal(2, 7, 4)
    y = compiled.apply(Distil(), compiled.init(Distil(), KEY, x), x)
    assert y.shape == (2, 4, 4)
    model = Informer(3, 4, 5, 8, 2, 2)
    series = normal(2, 9, 3)
    assert compiled.apply(model, compiled.init(model, KEY, series), series).shape == (
        2, 5, 3)
    with pytest.raises(ValueError, match="series have 3 steps: expected label=4"):
        model.init(KEY, series[:, :3])


def test_points_are_spread_and_near():
    points = normal(2, 12, 3)
    a = np.asarray(points, np.float64)
    chosen = jax.jit(spread, static_argnums=1)(points, 5)
    for row, own in zip(a, chosen):
        want = [0]
        for _ in range(4):
            far = np.min([((row - row[n]) ** 2).sum(-1) for n in want], 0)
            want.append(int(far.argmax()))
        np.testing.assert_array_equal(own, row[want].astype(np.float32))
    at = jax.jit(neighbours, static_argnums=2)(points, points, 3)
    square = ((a[:, :, None] - a[:, None]) ** 2).sum(-1)
    np.testing.assert_array_equal(at, np.argsort(square, -1)[..., :3])


def test_a_cloud_is_the_same_in_any_order():
    points = normal(2, 12, 3)
    model = PoinTr(8, 3, 2, near=3, width=8, heads=2, layers=1)
    params = compiled.init(model, KEY, points)
    coarse, fine = compiled.apply(model, params, points)
    assert coarse.shape == (2, 3, 3) and fine.shape == (2, 6, 3)
    # the first point is where the spreading begins
    mixed = points[:, np.array([0, *RNG.permutation(np.arange(1, 12))])]
    for one, other in zip(compiled.apply(model, params, mixed), (coarse, fine)):
        np.testing.assert_allclose(one, other, atol=2e-5)
    with pytest.raises(ValueError, match="2 points, near=3: expected proxies=8"):
        model.init(KEY, points[:, :2])


class Knows:
    """A network that knows the image."""

    def __init__(self, image):
        self.image = image

    def apply(self, params, x, given, level):
        share = level[:, None, None, None]
        return (x - jnp.sqrt(share) * self.image) / jnp.sqrt(1 - share)


def test_sampling_ends_at_the_image_that_the_noise_was_added_to():
    image = jnp.clip(normal(2, 4, 4, 1), -1, 1)
    made = sample(Knows(image), None, image, KEY, 20)
    np.testing.assert_allclose(made, image, atol=1e-4)
    kept = np.asarray(levels(20))
    assert (np.diff(kept) < 0).all() and kept[0] > 0.98 and kept[-1] < 0.01


def test_sr3_and_the_masked_model_give_their_shapes():
    noisy = normal(2, 8, 8, 1)
    model = SR3(4, 2)
    params = compiled.init(model, KEY, noisy, noisy, jnp.ones(2))
    found = compiled.apply(model, params, noisy, noisy, jnp.full(2, 0.5))
    assert found.shape == noisy.shape and not found.any()  # its last layer begins at 0
    tokens = jnp.asarray(RNG.integers(17, size=(2, 6)))
    masked = MaskedLM(16, 8, 2, 1)
    logits = compiled.apply(masked, compiled.init(masked, KEY, tokens), tokens)
    assert logits.shape == (2, 6, 16)


def test_one_program_of_a_decoder_is_its_blocks():
    """With an attention whose random directions are no parameters."""
    places = Places(CC=Performer(features=4, causal=False))
    decoder, x, context = Decoder(places, 2, 2), normal(2, 5, 8), normal(2, 7, 8)
    made = compiled.init(decoder, KEY, x, context)
    want = x
    for n in range(2):
        own = {name: each[f"layer_{n}"] for name, each in made.items()}
        want = compiled.apply(DecoderBlock(places, 2), own, want, context)
    want = NORM.module(x.dtype, None).apply({"params": made["params"]["norm"]}, want)
    found = compiled.apply(decoder, made, x, context)
    np.testing.assert_allclose(found, want, atol=1e-5)
