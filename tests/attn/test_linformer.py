"""Linformer: its definition in float64, and what its low rank can and cannot hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.linformer import Linformer
from attn.masks import Full
from attn.softmax import Softmax
from tests.compiled import apply, init
from tests.laws import close, gradients, inputs


def oracle(q, k, v, keys, values):
    """softmax(D^-0.5 q (E k)^T) (F v) of one row, float64."""
    q, k, v, keys, values = (np.asarray(a, np.float64) for a in (q, k, v, keys, values))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    s = k.shape[1]
    few_k = np.einsum("rs,bshd->brhd", keys[:, :s], k)
    few_v = np.einsum("rs,bshv->brhv", values[:, :s], v)
    logits = np.einsum("bthd,brhd->bhtr", q, few_k) * q.shape[-1] ** -0.5
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhtr,brhv->bthv", p / p.sum(-1, keepdims=True), few_v)


@pytest.mark.parametrize("t, s", [(16, 16), (3, 13), (1, 1)])
def test_it_is_its_definition(t, s):
    q, k, v = inputs()
    q, k, v = q[:, :t], k[:, :s], v[:, :s]
    model = Linformer(length=16, rank=5)
    params = init(model, jax.random.key(0), q, k, v)
    shapes = jax.tree.map(jnp.shape, params)["params"]
    assert shapes == {"keys": (5, 16), "values": (5, 16)}
    close(apply(model, params, q, k, v), oracle(q, k, v, **params["params"]))


def test_identity_matrices_make_it_softmax_attention():
    q, k, v = inputs()
    model, eye = Linformer(length=16, rank=16), jnp.eye(16)
    f = lambda q, k, v, e, f: model.apply({"params": {"keys": e, "values": f}}, q, k, v)
    close(f(q, k, v, eye, eye), Softmax(mask=Full())(q, k, v))
    whole = gradients(Softmax(mask=Full()), q, k, v)
    for a, b in zip(gradients(f, q, k, v, eye, eye), whole):
        close(a, b, "gradient")


def test_gradients_of_its_matrices_by_differences():
    q, k, v = inputs()
    keys, values = jax.random.normal(jax.random.key(1), (2, 5, 16)) / 4
    model = Linformer(length=16, rank=5)
    f = lambda e, f: model.apply({"params": {"keys": e, "values": f}}, q, k, v)
    have = gradients(f, keys, values)
    w = np.asarray(jax.random.normal(jax.random.key(9), (*q.shape[:3], v.shape[-1])))
    for n, at in ((0, (1, 3)), (1, (4, 7))):
        step = np.zeros((5, 16))
        step[at] = 1e-5
        both = [np.asarray(a, np.float64) for a in (keys, values)]
        ends = []
        for sign in (1, -1):
            moved = list(both)
            moved[n] = moved[n] + sign * step
            ends.append((w * oracle(q, k, v, *moved)).sum())
        assert abs((ends[0] - ends[1]) / 2e-5 - have[n][at]) < 1e-4


def test_wrong_settings_say_what_was_expected():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="S=16 keys: expected at most length=8"):
        Linformer(length=8).init(jax.random.key(0), q, k, v)
    with pytest.raises(ValueError, match="rank=0: expected 1 or more"):
        Linformer(rank=0)
