"""LinearTransformer: its definition in float64, with and without an order."""

import jax
import numpy as np
import pytest

from attn.lineartransformer import LinearTransformer
from tests.laws import B, close, gradients, inputs


def oracle(q, k, v, causal):
    """float64, by the matrix of weights."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    a = np.einsum("bthd,bshd->bhts", phi(q), phi(k))
    a = np.tril(a) if causal else a
    return np.einsum("bhts,bshv->bthv", a / (a.sum(-1, keepdims=True) + 1e-6), v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t", [1, 7, 16])
def test_it_is_its_definition(t, causal):
    q, k, v = inputs(t=t)
    attention = LinearTransformer(causal=causal, chunk=4)
    close(jax.jit(attention)(q, k, v), oracle(q, k, v, causal))


def test_queries_from_elsewhere():
    q, k, v = inputs()
    attention = LinearTransformer(causal=False)
    close(attention(q[:, :5], k, v), oracle(q[:, :5], k, v, False))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_by_differences(causal):
    args = inputs()
    attention = LinearTransformer(causal=causal)
    have = gradients(attention, *args)
    shape = (*args[0].shape[:3], args[2].shape[-1])
    w = np.asarray(jax.random.normal(jax.random.key(9), shape), np.float64)
    rng = np.random.default_rng(0)
    for n, grad in enumerate(have):
        step = rng.normal(size=grad.shape)
        ends = []
        for sign in (1e-5, -1e-5):
            moved = [np.asarray(a, np.float64) for a in args]
            moved[n] = moved[n] + sign * step
            ends.append((w * oracle(*moved, causal)).sum())
        want = (ends[0] - ends[1]) / 2e-5
        assert abs((step * grad).sum() - want) < 2e-5 * B * np.linalg.norm(step) * (
            np.linalg.norm(grad))


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (({"eps": -1.0}, "eps=-1.0"), ({"chunk": 0}, "chunk=0")):
        with pytest.raises(ValueError, match=message):
            LinearTransformer(**wrong)
    with pytest.raises(NotImplementedError, match="no stream"):
        LinearTransformer(causal=False).init_state(4, *inputs())
