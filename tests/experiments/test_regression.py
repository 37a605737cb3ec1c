"""Regression in context: heads, their two numbers, and the closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import regression as command
from experiments.data.regression import Prompts, Regression
from experiments.measure import regression
from experiments.training.regression_heads import (
    linear_answer, random_heads, softmax_answer)

DATA = Regression(dim=3, length=11, noise=0.2)


@functools.cache
def prompts(batch=5):
    return jax.jit(DATA.draw, static_argnums=1)(jax.random.key(0), batch)


def double(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def test_prompts_are_those_of_the_paper():
    found = prompts(4096)
    z, query, answer, clean = double(*found)
    assert z.shape == (4096, 11, 4) and (query[:, 3] == 0).all()
    assert abs(z[..., :3].var() - 1) < 0.03 and abs((clean**2).mean() - 1) < 0.1
    assert abs(((answer - clean) ** 2).mean() - 0.2) < 0.02
    # y is linear in x but for the noise, of examples as of the query
    x, y = z[..., :3], z[..., 3]
    beta = np.linalg.lstsq(x[0], y[0], rcond=None)[0]
    assert ((x[0] @ beta - y[0]) ** 2).mean() < 0.5


@pytest.mark.parametrize("kind", ("softmax", "linear"))
def test_a_layer_is_its_equation(kind):
    """f = sum_h O V Z^T softmax(Z K^T Q z_q / sqrt(D)), in float64 numpy."""
    heads = random_heads(jax.random.key(1), 3, 4)
    heads = heads._replace(q=9 * heads.q)
    z, zq = prompts().examples, prompts().query
    f = {"softmax": softmax_answer, "linear": functools.partial(
        linear_answer, length=7)}[kind]
    got = jax.jit(lambda h: f(h.kq, h.ov, z, zq))(heads)
    q, k, v, o, z, zq = double(*heads, z, zq)
    expected = 0.0
    for h in range(3):
        logits = np.einsum("bld,cd,ce,be->bl", z, k[h], q[h], zq) / 2
        weight = np.exp(logits - logits.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        weight = weight if kind == "softmax" else logits / 7
        expected = expected + np.einsum("c,cd,bld,bl->b", o[h], v[h], z, weight)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_two_numbers_a_head_are_the_reduced_model():
    w, mu = jnp.array([-0.3, 0.2]), jnp.array([-1.0, 2.0])
    kq = w[:, None, None] * jnp.diag(jnp.array([1.0, 1, 1, 0]))[None]
    ov = mu[:, None] * jnp.eye(4)[3:]
    both = jax.jit(lambda p: (softmax_answer(kq, ov, p.examples, p.query),
                              regression.reduced(w, mu, p)))(prompts())
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)
    found = regression.pattern(*double(kq, ov))
    np.testing.assert_allclose(found["w"], w, rtol=1e-6)
    np.testing.assert_allclose(found["mu"], mu)
    assert not found["off"].any() and not found["ov_off"].any()
    # the last column meets the query's 0: nothing there counts
    noisy = np.array(kq, np.float64)
    noisy[:, :, 3] = 5
    assert not regression.pattern(noisy, np.asarray(ov))["off"].any()
    noisy[:, 1, 2] = -7
    assert (regression.pattern(noisy, np.asarray(ov))["off"] == 7).all()


def test_a_pair_of_heads_is_debiased_descent():
    """softmax(g s) - softmax(-g s) = 2 g / L (s - mean s) + O(g^3)."""
    with jax.enable_x64(True):
        own = Prompts(*map(jnp.asarray, double(*prompts())))
        one = jnp.array([1.0, -1.0])
        pair = jax.jit(lambda g: regression.reduced(g * one, one / (2 * g), own))
        want = jax.jit(regression.debiased)(own)
        gaps = [np.abs(pair(g) - want).max() for g in (0.02, 0.01)]
    assert gaps[1] < 1e-3 and 3.5 < gaps[0] / gaps[1] < 4.5


def test_ridge_is_numpys():
    got = jax.jit(regression.ridge)(0.6, prompts())
    z, zq, _, _ = double(*prompts())
    for n in range(len(z)):
        x, y = z[n, :, :3], z[n, :, 3]
        beta = np.linalg.solve(x.T @ x + 0.6 * np.eye(3), x.T @ y)
        np.testing.assert_allclose(got[n], zq[n, :3] @ beta, rtol=1e-4, atol=1e-5)


def test_the_approximate_loss_is_least_at_its_mu():
    with jax.enable_x64(True):
        w, sizes = jnp.array([-0.3, 0.1, 0.4]), (5, 40, 0.1)
        loss = functools.partial(regression.approximate_loss, w, dim=5, length=40,
                                 s2=0.1)
        mu = regression.best_mu(w, *sizes)
        assert np.abs(jax.grad(loss)(mu)).max() < 1e-12
        assert (np.linalg.eigvalsh(regression.curvature(w, *sizes)) > 0).all()
        # by the paper's equation, of half of the loss
        mu = jnp.array([1.0, -2.0, 0.5])
        got = jax.grad(lambda w: regression.approximate_loss(w, mu, *sizes) / 2)(w)
    w, mu = double(w, mu)
    by_hand = -mu + (mu @ w) * mu + 5 * 1.1 / 40 * (
        np.exp(5 * np.outer(w, w)) * np.outer(mu, mu)) @ w
    np.testing.assert_allclose(got, by_hand, rtol=1e-12)


def test_a_pair_beats_one_head_by_half():
    """The spec's Monte Carlo, d = 5, L = 40: pairs 0.1453 to 0.1469, descent 0.1424,
    debiased 0.1453, Bayes 0.0146; single heads 0.3065 at best, w = 0.5."""
    def every(p):
        two, one = jnp.array([1.0, -1.0]), jnp.ones(1)
        return jnp.stack([
            regression.reduced(0.1 * two, two, p),
            regression.reduced(0.5 * one, one, p), regression.descent(p),
            regression.debiased(p), regression.ridge(0.5, p)])

    moments = jax.jit(lambda key: regression.moments(every, Regression(), key, 4))(
        jax.random.key(3))
    steps = regression.best_step(moments)
    pair, single, descent, debiased, bayes = regression.excess(moments, steps)
    np.testing.assert_allclose(pair, 0.1455, atol=0.008)
    np.testing.assert_allclose(single, 0.3065, atol=0.015)
    np.testing.assert_allclose((descent, debiased), (0.1424, 0.1453), atol=0.008)
    np.testing.assert_allclose(bayes, 0.0146, atol=0.001)
    np.testing.assert_allclose(steps[2:4], (0.864, 0.883), atol=0.02)


def test_wrong_settings_say_what_was_expected():
    with pytest.raises(ValueError, match="dim=0"):
        Regression(dim=0)
    with pytest.raises(ValueError, match="noise=-1"):
        Regression(noise=-1.0)
    with pytest.raises(ValueError, match="heads"):
        command.Config(heads=())
