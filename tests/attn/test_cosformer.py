"""CosFormer: its matrix in float64, in both orders, and lengths that it was told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cosformer import CosFormer
from tests.compiled import attend
from tests.laws import close, gradients, inputs
from tests.oracles import differences


def oracle(q, k, v, causal, length=None):
    """float64, by the matrix of weights."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    t, s = q.shape[1], k.shape[1]
    m = max(t, s) if length is None else length
    a = np.einsum("bthd,bshd->bhts", np.maximum(q, 0), np.maximum(k, 0))
    a = a * np.cos(np.pi / 2 * (np.arange(t)[:, None] - np.arange(s)) / m)
    a = np.tril(a) if causal else a
    total = np.maximum(a.sum(-1), 1e-6).swapaxes(1, 2)[..., None]
    return np.einsum("bhts,bshv->bthv", a, v) / total


@pytest.mark.parametrize("attention", [
    CosFormer(length=40, chunk=4), CosFormer(causal=False, length=None),
    CosFormer(causal=False, length=40)], ids=str)
@pytest.mark.parametrize("t", [1, 7])
def test_it_is_its_definition(attention, t):
    q, k, v = inputs(t=t)
    want = oracle(q, k, v, attention.causal, attention.length)
    close(attend(attention, q, k, v), want)


def test_queries_from_elsewhere():
    q, k, v = inputs()
    attention = CosFormer(causal=False, length=None)
    close(attend(attention, q[:, :5], k, v), oracle(q[:, :5], k, v, False))
    # of packed rows the longer of the two lengths is that of each sequence
    mine, keys = np.array([[1] * 3 + [2] * 2] * 2), np.array([[1] * 6 + [2] * 10] * 2)
    have = attend(attention, q[:, :5], k, v,
                  segments=(jnp.asarray(mine), jnp.asarray(keys)))
    for n in (1, 2):
        at, of = mine[0] == n, keys[0] == n
        close(have[:, at], oracle(q[:, :5][:, at], k[:, of], v[:, of], False))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_by_differences(causal):
    args = inputs(t=7)
    attention = CosFormer(causal=causal, length=20)
    do = jax.random.normal(jax.random.key(9), (*args[0].shape[:3], args[2].shape[-1]))
    differences.agree(lambda *a: oracle(*a, causal, 20), args,
                      gradients(attention, *args), do)


def test_a_sequence_that_is_too_long_is_never_silent():
    q, k, v = inputs(t=9)
    attention = CosFormer(length=8)
    with pytest.raises(ValueError, match="9 tokens .* expected at most length=8"):
        attention(q, k, v)
    assert np.isnan(jax.jit(lambda *a: attention(*a))(q, k, v)).all()
    state = attention.init_state(9, q, k, v)
    two = np.repeat(np.arange(1, 3), (5, 4))[None].repeat(len(q), 0)
    assert np.isfinite(attention.step(state, q, k, v, segments=two)[1]).all()
    state, o = attention.step(state, *(a[:, :8] for a in (q, k, v)))
    assert np.isfinite(o).all()
    with pytest.raises(ValueError, match="at most length=8"):
        attention.step(state, *(a[:, 8:] for a in (q, k, v)))
    with pytest.raises(ValueError, match="length=None: expected a number of tokens"):
        CosFormer(length=None)
