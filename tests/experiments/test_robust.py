"""Perturbed attention: what moves, how far, and what it costs the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import robust
from experiments.data.sentiment import Sentiment
from experiments.training import perturbed
from models.additive import AdditivePooling, TextClassifier, weights

MASK = jnp.arange(6)[None] < jnp.array([6, 3, 1, 0])[:, None]


@functools.cache
def parts():
    """A loss of the scores of four texts, scores and gradient, in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        h, scores = jnp.asarray(rng.normal(size=(4, 6, 5))), jnp.asarray(
            rng.normal(size=(4, 6)))
        module = AdditivePooling(3)
        params = module.init(jax.random.key(0), h, MASK)
        label = jnp.array([1.0, 0, 1, 0])

        @jax.jit
        def loss(s):
            logit = module.apply(params, h, s, MASK, method="pooled")
            return perturbed.cross_entropy(logit, label, 1.7)

        return loss, scores, jax.jit(jax.grad(loss))(scores)


def test_weights_are_a_softmax_over_words():
    _, scores, _ = parts()
    with jax.enable_x64(True):
        a = np.asarray(jax.jit(weights)(scores, MASK))
    np.testing.assert_allclose(a.sum(1), [1, 1, 1, 0], rtol=1e-12)
    e = np.exp(np.asarray(scores)) * np.asarray(MASK)
    np.testing.assert_allclose(a[:3], e[:3] / e[:3].sum(1, keepdims=True), rtol=1e-12)
    assert np.isfinite(jax.jit(jax.grad(lambda s: weights(s, MASK)[:, 0].sum()))(
        jnp.full((4, 6), 1e4, jnp.bfloat16))).all()


@pytest.mark.parametrize("variant", perturbed.VARIANTS)
def test_a_perturbation_is_of_unit_length_and_leaves_padding(variant):
    _, scores, g = parts()
    with jax.enable_x64(True):
        r = np.asarray(jax.jit(functools.partial(perturbed.direction, variant))(
            g, scores, MASK, jax.random.key(0)))
    assert not r[~np.asarray(MASK)].any() and np.isfinite(r).all()
    if variant == "word":
        assert set(np.unique(r)) <= {-1.0, 0.0, 1.0}
    else:  # one word alone has weight 1 whatever its score, and no gradient
        np.testing.assert_allclose(np.linalg.norm(r[:2], axis=1), 1, rtol=1e-9)
    if variant != "random":
        np.testing.assert_allclose(np.linalg.norm(r[3]), 0, atol=1e-12)


def test_one_way_is_up_and_the_other_down():
    loss, scores, g = parts()
    with jax.enable_x64(True):
        up = perturbed.direction("at", g, scores, MASK)
        down = perturbed.direction("repo", g, scores, MASK)
        np.testing.assert_array_equal(up, -down)
        eps = 1e-4
        slope = (loss(scores + eps * up) - loss(scores)) / eps
        # to first order by the gradient's length in each text, and no way is steeper
        np.testing.assert_allclose(slope, np.linalg.norm(g, axis=1).sum(), rtol=1e-3)
        assert loss(scores + 0.1 * down) < loss(scores) < loss(scores + 0.1 * up)
        for n in range(5):
            other = perturbed.direction("random", g, scores, MASK, jax.random.key(n))
            assert loss(scores + eps * other) <= loss(scores + eps * up)


def test_what_iat_comes_to():
    """iAT by its own words, r(alpha)_t = alpha_t . d_t and alpha = eps g / |g|, with
    three normalisations."""
    loss, scores, g = parts()
    s, own, mask = np.asarray(scores), np.asarray(g), np.asarray(MASK)
    gap = (s[:, :, None] - s[:, None]) * (mask[:, :, None] & mask[:, None])
    unit = gap / np.maximum(np.linalg.norm(gap, axis=2, keepdims=True), 1e-300)

    def moved(alpha, d, axes):
        length = np.sqrt((alpha**2).sum(axes, keepdims=True))
        return (alpha / np.maximum(length, 1e-300) * d).sum(2)

    ask = functools.partial(perturbed.direction, g=g, scores=scores, mask=MASK)
    with jax.enable_x64(True):
        # the gradient by alpha is that by s times the direction
        by_alpha = jax.jit(jax.grad(lambda a: loss(scores + (a * unit).sum(2))))(
            jnp.zeros_like(unit))
        np.testing.assert_allclose(by_alpha, own[:, :, None] * unit, atol=1e-15)
        found = {name: np.asarray(ask(name)) for name in ("word", "at", "difference")}
    for name, alpha, d, axes in (
        ("word", own[:, :, None] * unit, unit, 2),
        ("at", own[:, :, None] * unit, unit, (1, 2)),
    ):
        np.testing.assert_allclose(found[name][:2], moved(alpha, d, axes)[:2],
                                   atol=1e-12)
    # with directions that keep their length, r is along g |d|^2
    want = moved(own[:, :, None] * gap, gap, (1, 2))[:2]
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(found["difference"][:2], want, atol=1e-12)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_tiny_gradients_move_nothing_and_small_ones_do(dtype):
    g = jnp.array([[0, 0], [3e-30, 4e-30], [3e-9, 4e-9]], dtype)
    r = np.asarray(perturbed.normalised(g), np.float32)
    np.testing.assert_allclose(r[2], [0.6, 0.8], rtol=2**-7)
    assert np.abs(r[:2]).max() < 1e-15


def test_no_gradient_goes_through_the_perturbation():
    loss, scores, g = parts()
    with jax.enable_x64(True):
        both = jax.jit(jax.grad(lambda s: perturbed.total(
            loss, s, 0.3 * perturbed.normalised(jax.grad(loss)(s)), 0.5)))(scores)
        r = 0.3 * perturbed.normalised(g)
        np.testing.assert_allclose(
            both, g + 0.5 * jax.jit(jax.grad(loss))(scores + r), rtol=1e-12)


def test_padding_is_not_read():
    model = TextClassifier(9, 4)
    tokens = jnp.array([[3, 4, 5, 0, 0], [6, 2, 0, 0, 0]])
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(params, tokens), apply(params, jnp.pad(tokens, ((0, 0), (0, 3)))),
        rtol=1e-5, atol=1e-6)


def test_texts_have_the_label_of_their_cues():
    data = Sentiment(fillers=50, negated=0.2)
    texts, label = data.draw(np.random.default_rng(0), 300, clean=True)
    strength = np.linspace(0.5, 2, 20)
    for words, own in zip(texts, label):
        size = (words > 0).sum()
        assert 8 <= size <= 30 and (words[:size] > 0).all() and words.max() < data.vocab
        at = np.flatnonzero((words >= 2) & (words < 42))
        assert 2 <= len(at) <= 5
        cue = words[at] - 2
        sign = np.where((cue >= 20) ^ (words[at - 1] == 1), -1, 1)
        assert own == float((sign * strength[cue % 20]).sum() > 0)
    noisy = data.draw(np.random.default_rng(0), 300, clean=False)
    np.testing.assert_array_equal(noisy.tokens, texts)
    assert 0.01 < (noisy.label != label).mean() < 0.1


def test_what_is_measured():
    a = np.array([[0.5, 0.3, 0.2, 9.0], [0.7, 0.3, 0.0, 0.0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    both = robust.correlation(a, np.array([[5, 3, 2, -7], [1, 2, 9, 9.0]]), mask)
    np.testing.assert_allclose(both, [1, -1])
    assert robust.f1(np.array([1, 1, 0, 0.0]), np.array([1, 0, 1, 0.0])) == 0.5


def test_wrong_settings_say_what_was_expected():
    with pytest.raises(ValueError, match="variant='none'"):
        perturbed.direction("none", *[jnp.zeros((1, 2))] * 2, MASK[:1, :2])
    with pytest.raises(ValueError, match="without a key"):
        perturbed.direction("random", *[jnp.zeros((1, 2))] * 2, MASK[:1, :2])
    with pytest.raises(ValueError, match="longest=5"):
        Sentiment(longest=5)
