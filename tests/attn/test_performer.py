"""Performer: its features in float64, exponents of any size, what they estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.performer import Performer
from tests.compiled import apply, init
from tests.laws import H, K, close, gradients, inputs
from tests.oracles import differences
from tests.oracles.softmax import attention as softmax


def oracle(q, k, v, w, causal):
    """float64, by the matrix of products of features."""
    q, k, v, w = (np.asarray(a, np.float64) for a in (q, k, v, w))
    copies = q.shape[2] // k.shape[2]
    k, v, w = (np.repeat(a, copies, n) for a, n in ((k, 2), (v, 2), (w, 0)))

    def logs(a):
        a = a * a.shape[-1] ** -0.25
        return np.einsum("bthd,hmd->bthm", a, w) - (a * a).sum(-1, keepdims=True) / 2

    s = logs(q)[:, :, None] + logs(k)[:, None]  # [B,T,S,H,m]
    seen = np.tri(q.shape[1], k.shape[1]) if causal else np.ones((1, 1))
    seen = seen[None, :, :, None, None] > 0
    s = np.where(seen, s, -np.inf)
    a = np.exp(s - s.max((2, 4), keepdims=True)).sum(-1)
    return np.einsum("btsh,bshv->bthv", a / a.sum(2, keepdims=True), v)


def made(causal, t, **fields):
    args = inputs(t=t)
    module = Performer(features=5, causal=causal, **fields)
    variables = init(module, jax.random.key(0), *args)
    return module, args, variables


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t, size", [(1, 1.0), (7, 1.0), (7, 30.0)])
def test_it_is_its_definition_with_exponents_of_any_size(causal, t, size):
    module, (q, k, v), variables = made(causal, t, chunk=4)
    w = variables["fixed"]["directions"]
    assert "params" not in variables and w.shape == (K, 5, 8)
    args = size * q, size * k, v
    close(apply(module, variables, *args), oracle(*args, w, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_by_differences(causal):
    module, args, variables = made(causal, 7)
    w = variables["fixed"]["directions"]
    do = jax.random.normal(jax.random.key(9), (*args[0].shape[:3], args[2].shape[-1]))
    grads = gradients(lambda *a: module.apply(variables, *a), *args)
    differences.agree(lambda *a: oracle(*a, w, causal), args, grads, do)


def test_of_many_features_it_is_near_softmax():
    q, k, v = inputs()
    args, seen = (q / 2, k / 2, v), np.tri(16)
    errors = []
    for features in (8, 512):
        module = Performer(features=features)
        o = apply(module, init(module, jax.random.key(0), *args), *args)
        want = softmax(*args, seen)
        errors.append(np.linalg.norm(o - want) / np.linalg.norm(want))
    assert errors[1] < 0.1 < errors[0], errors


def test_a_key_draws_directions_of_its_own():
    module, args, variables = made(False, 7)
    fixed = apply(module, variables, *args)
    a, b, c = (
        apply(module, variables, *args, key=jax.random.key(n)) for n in (1, 2, 1))
    close(a, c)
    assert np.abs(a - b).max() > 1e-3 < np.abs(a - fixed).max()
    again = module.redrawn(1, 8, K)
    assert np.abs(again - variables["fixed"]["directions"]).max() > 0.1
    # orthogonal in groups of D
    gram = jnp.einsum("kmd,knd->kmn", again, again)
    assert np.abs(gram * (1 - jnp.eye(5))[None]).max() < 1e-4


def test_what_looks_at_all_keys_is_refused_in_causal_order():
    for fields in ({"eps": 1e-4}, {"least": 0.1}):
        with pytest.raises(ValueError, match="expected 0 in causal order"):
            Performer(**fields)
    assert H // K == 2
