"""GLA against its recurrence in float64, and its gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.gla import GLA
from attn.layers import MultiHead
from models.lm import LM
from tests.compiled import apply, init
from tests.laws import close

B, T, H, D, V, E = 2, 20, 2, 8, 12, 6


def test_it_is_the_recurrence_of_its_gates():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, H, D), (B, T, H, D), (B, T, H, V), (B, T, E)
    q, k, v, x = (jax.random.normal(n, s) for n, s in zip(keys, shapes))
    module = GLA(rank=3, temperature=2.0, chunk=8)
    params = init(module, jax.random.key(1), q, k, v, x=x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    low = np.asarray(x, np.float64) @ p["gate_down"]["kernel"]
    gate = np.einsum("btr,rhd->bthd", low, p["gate_up"]["kernel"])
    a = (1 / (1 + np.exp(-gate - p["gate_up"]["bias"]))) ** 0.5
    state, want = np.zeros((B, H, D, V)), np.zeros((B, T, H, V))
    for t in range(T):
        write = np.einsum("bhd,bhv->bhdv", k[:, t], v[:, t])
        state = a[:, t][..., None] * state + write
        want[:, t] = np.einsum("bhd,bhdv->bhv", q[:, t], state) * D**-0.5
    close(apply(module, params, q, k, v, x=x), want)


def test_the_layer_norms_and_gates_as_the_paper_does():
    x = jnp.ones((1, 4, 16))
    params = MultiHead(GLA(), heads=2, position=None).init(jax.random.key(0), x)
    names = set(params["params"])
    assert names == {"q", "k", "v", "attention", "out_norm", "gate", "out"}


def test_wrong_calls_say_what_was_expected():
    with pytest.raises(ValueError, match="rank=0"):
        GLA(rank=0)
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="x is None"):
        GLA().init(jax.random.key(0), q, q, q)


def test_a_model_streams_and_scans_it():
    tokens = jnp.arange(10)[None] % 7
    model = LM(vocab=7, width=16, heads=2, attention=(GLA(),) * 2, position=None)
    params = init(model, jax.random.key(0), tokens)
    want = apply(model, params, tokens)
    close(model.clone(scan=True).apply(params, tokens), want)
    state = model.init_state(10, tokens)
    state, first = apply(model, params, tokens[:, :6], state)
    _, rest = apply(model, params, tokens[:, 6:], state)
    close(jnp.concatenate([first, rest], 1), want)
