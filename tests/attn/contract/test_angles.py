"""Learned angles in extended precision, far from position 0; sines and cosines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract.angles import learned_angles, sinusoids
from attn.grid import MDLRPE
from models.transnormer import lrpe

B, T, H, D = 2, 11, 3, 16
PI = "3.14159265358979323846264338327950288"


def test_learned_angles_are_exact_anywhere_too():
    """Of frequencies of any size and sign, up to whole turns, with the gradient of the
    product; what is no number stays none."""
    rng = np.random.default_rng(0)
    theta = np.float32(rng.normal(size=300) * 10.0 ** rng.integers(-12, 4, 300))
    theta = np.concatenate([theta, np.float32([0, 1, -1, 1e-40, 3e9])])[None]
    run = jax.jit(learned_angles)
    for far in (0, 1, 4096, 2_097_152, 2**31 - 1, -5, -2**31 + 1):
        have = np.asarray(run(jnp.int32([[far]]), theta), np.float64)
        # the share of a turn with more digits than float64 has
        turns = far * theta.astype(np.longdouble) / (2 * np.longdouble(PI))
        want = 2 * np.longdouble(PI) * (turns - np.round(turns))
        exact = np.abs(theta) < 10  # of which so many digits suffice
        off = np.abs(np.exp(1j * have) - np.exp(1j * want.astype(float)))[exact]
        assert off.max() < 1e-6
        slope = jax.grad(lambda a: run(jnp.int32([[far]]), a).sum())(theta)
        np.testing.assert_array_equal(slope, np.full_like(theta, far))
    bad = run(jnp.int32([[3]]), jnp.float32([[np.nan, np.inf, -np.inf]]))
    assert np.isnan(bad).all()


@pytest.mark.parametrize("turn", [
    lambda x, theta, pos: lrpe(x, theta, pos),
    lambda x, theta, pos: MDLRPE((2**31 - 1,)).apply(
        {"params": {"theta": theta}}, x, pos, method="rotate"),
], ids=["lrpe", "mdlrpe"])
def test_layers_that_learn_their_angles_turn_exactly_anywhere(turn):
    theta = jax.random.uniform(jax.random.key(1), (H, D))
    x = jax.random.normal(jax.random.key(0), (B, T, H, D))
    pos = 2_097_152 + np.arange(T)[None] * np.ones((B, 1), int)
    angle = pos[..., None, None] * np.asarray(theta, np.float64)
    want = np.asarray(x)[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    have = jax.jit(turn)(x, theta, jnp.asarray(pos, jnp.int32))
    error = np.asarray(have).reshape(B, T, H, 2, D) - np.moveaxis(want, -1, -2)
    assert np.linalg.norm(error) < 1e-6 * np.linalg.norm(want)


def test_sinusoids():
    found = np.asarray(sinusoids(jnp.asarray([[0, 3]]), 6))
    np.testing.assert_allclose(found[0, 0], [0, 0, 0, 1, 1, 1], atol=1e-6)
    rate = 10000.0 ** (-np.arange(3) / 3)
    want = [*np.sin(3 * rate), *np.cos(3 * rate)]
    np.testing.assert_allclose(found[0, 1], want, atol=1e-5)
