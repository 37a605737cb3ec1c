"""ABC: its slots in float64, in both orders, and that the past stays in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.abc import ABC
from tests.compiled import apply, init
from tests.laws import H, close, gradients, inputs
from tests.oracles import differences


def softmax(a, axis=-1):
    e = np.exp(a - a.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def oracle(q, k, v, wk, wv, causal):
    """float64, slot by slot."""
    q, k, v, wk, wv = (np.asarray(a, np.float64) for a in (q, k, v, wk, wv))
    t = q.shape[1]
    out = []
    for i in range(t):
        end = i + 1 if causal else k.shape[1]
        slots = []
        for a, w in ((k[:, :end], wk), (v[:, :end], wv)):
            p = softmax(np.einsum("bskd,dc->bskc", a, w), 1)
            slots.append(np.einsum("bskc,bskd->bkcd", p, a))
        few_k, few_v = (np.repeat(a, q.shape[2] // k.shape[2], 1) for a in slots)
        p = softmax(np.einsum("bhd,bhcd->bhc", q[:, i], few_k) * q.shape[-1] ** -0.5)
        out.append(np.einsum("bhc,bhcv->bhv", p, few_v))
    return np.stack(out, 1)


def made(causal, t):
    args = inputs(t=t)
    module = ABC(landmarks=5, causal=causal, chunk=4)
    params = init(module, jax.random.key(0), *args)
    params = jax.tree.map(lambda a: 3 * a, params)  # slots that differ
    return module, args, params


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t", [1, 7])
def test_it_is_its_definition(causal, t):
    module, args, params = made(causal, t)
    w = [params["params"][f"compress_{n}"] for n in "kv"]
    assert [a.shape for a in w] == [(8, 5), (12, 5)]
    close(apply(module, params, *args), oracle(*args, *w, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_all_by_differences(causal):
    module, args, params = made(causal, 7)
    args = (*args, *(params["params"][f"compress_{n}"] for n in "kv"))

    def f(q, k, v, wk, wv):
        return module.apply({"params": {"compress_k": wk, "compress_v": wv}}, q, k, v)

    do = jax.random.normal(jax.random.key(9), (*args[0].shape[:3], args[2].shape[-1]))
    differences.agree(
        lambda *a: oracle(*a, causal), args, gradients(f, *args), do)


def test_slots_of_any_strength_are_safe_and_a_state_does_not_grow():
    module, (q, k, v), params = made(True, 16)
    strong = jax.tree.map(lambda a: 1e3 * a, params)
    o = apply(module, strong, q, k, v)
    assert np.isfinite(o).all()
    grads = gradients(lambda *a: module.apply(strong, *a), q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
    sizes = [sum(a.size for a in jax.tree.leaves(module.init_state(n, q, k, v)))
             for n in (1, 10_000)]
    assert sizes[0] == sizes[1]
    assert jnp.shape(q)[2] == H
