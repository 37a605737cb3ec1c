"""Essa against its definition in float64, and what it does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.essa import Essa
from tests.laws import SEGMENTS, close, gradients, inputs


def definition(q, k, v, residual=True, seen=None):
    """o [B,T,H,V] in float64; seen [B,T,S]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    h = q.shape[2]
    k, v = (np.repeat(a, h // a.shape[2], 2) for a in (k, v))
    seen = np.ones((len(q), q.shape[1], k.shape[1])) if seen is None else seen

    def squares(x):
        x = x - x.mean(-1, keepdims=True)
        return x**2 / ((x**2).sum(-1, keepdims=True) + 1e-7)

    q, k = squares(q), squares(k)
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    norm = np.sqrt(np.einsum("bts,bshd->bthd", seen, k**2))
    count = np.sqrt(seen.sum(2))[..., None, None]
    q = q / np.where(norm > 0, norm, 1)
    pairs = np.einsum("bthd,bshd->bths", q, k) * seen[:, :, None]
    o = np.einsum("bths,bshv->bthv", pairs, v) / np.where(count > 0, count, 1)
    return o + v * (seen.sum(2) > 0)[..., None, None] if residual else o


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_definition(packed):
    q, k, v = inputs()
    seen = segments = None
    if packed:
        segments = jnp.asarray(SEGMENTS)
        seen = (SEGMENTS[..., None] == SEGMENTS[:, None]) & (SEGMENTS[:, None] > 0)
        seen = seen & (SEGMENTS[..., None] > 0)
    o = jax.jit(lambda *a: Essa()(*a, segments=segments))(q, k, v)
    close(o, definition(q, k, v, True, None if seen is None else seen.astype(float)))


def test_without_v_queries_may_come_from_elsewhere():
    q, k, v = inputs()
    close(Essa(residual=False)(q[:, :5], k, v), definition(q[:, :5], k, v, False))
    with pytest.raises(ValueError, match="T must be S"):
        Essa()(q[:, :5], k, v)


def test_gradients_are_those_of_the_definition():
    q, k, v = inputs(t=6)
    w = np.asarray(jax.random.normal(jax.random.key(9), (2, 6, 4, 12)), np.float64)
    scalar = lambda *a: (w * definition(*a)).sum()
    rng = np.random.default_rng(0)
    away = [rng.normal(size=a.shape) for a in (q, k, v)]
    at = [np.asarray(a, np.float64) for a in (q, k, v)]
    step = lambda e: scalar(*(a + e * d for a, d in zip(at, away)))
    slope = (step(1e-6) - step(-1e-6)) / 2e-6
    found = sum((np.asarray(g, np.float64) * d).sum()
                for g, d in zip(gradients(Essa(), q, k, v), away))
    assert abs(found - slope) <= 2e-5 * abs(slope)


def test_it_sees_the_shape_of_a_spectrum_not_its_brightness():
    q, k, v = inputs()
    brighter = 3.0 * q + 5.0
    close(Essa()(brighter, k, v), Essa()(q, k, v))


def test_spectra_without_contrast_give_v_and_no_nan():
    _, k, v = inputs()
    q = jnp.ones((2, 16, 4, 8))
    close(Essa()(q, k, v), jnp.repeat(v, 2, 2))
    for grad in gradients(Essa(), q, jnp.ones_like(k), v):
        assert np.isfinite(grad).all()


def test_wrong_settings_say_what_was_expected():
    with pytest.raises(ValueError, match="eps=0"):
        Essa(eps=0)
