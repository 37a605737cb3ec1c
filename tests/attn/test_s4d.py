"""S4D: its recurrence in float64, both ways to compute it, how it begins."""

from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.s4d import S4D
from tests.compiled import apply, init
from tests.laws import H, close, gradients, inputs
from tests.oracles import differences

NAMES = ("log_dt", "log_w_real", "w_imag", "C", "D")


def oracle(v, log_dt, log_w_real, w_imag, c, direct, heads=H):
    """float64, token by token."""
    v = np.repeat(np.asarray(v, np.float64), heads // v.shape[2], 2)
    w = -np.exp(log_w_real) + 1j * w_imag
    decay = np.exp(np.exp(log_dt)[:, None] * w)  # [V,N/2]
    out = 2 * (c[..., 0] + 1j * c[..., 1]) * (decay - 1) / w
    t = v.shape[1]
    y = direct * v
    for start, stop, step, read in ((0, t, 1, 0), (t - 1, -1, -1, 1))[:len(c) // heads]:
        state = np.zeros((v.shape[0], *v.shape[2:], w.shape[0]), complex)
        side = out[read * heads:(read + 1) * heads]
        for i in range(start, stop, step):
            if read:  # of later tokens alone
                y[:, i] += (side * state).sum(-1).real
            state = decay * state + v[:, i, ..., None]
            if not read:
                y[:, i] += (side * state).sum(-1).real
    return 0.5 * y * (1 + np.vectorize(erf)(y / np.sqrt(2)))


def made(causal, t, **fields):
    args = inputs(t=t)
    module = S4D(state=6, causal=causal, dt_min=0.01, chunk=4, **fields)
    return module, args, init(module, jax.random.key(0), *args)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fft", [True, False])
@pytest.mark.parametrize("t", [1, 7])
def test_it_is_its_definition(causal, fft, t):
    module, args, params = made(causal, t, fft=fft)
    own = [np.asarray(params["params"][n], np.float64) for n in NAMES]
    assert own[3].shape == ((1 if causal else 2) * H, 12, 3, 2)
    close(apply(module, params, *args), oracle(args[2], *own))


@pytest.mark.parametrize("causal, fft", [(True, False), (True, True), (False, None)])
def test_gradients_of_all_by_differences(causal, fft):
    module, (q, k, v), params = made(causal, 6, fft=fft)
    own = [params["params"][n] for n in NAMES]

    def f(v, *own):
        return module.apply({"params": dict(zip(NAMES, own))}, q, k, v)

    do = jax.random.normal(jax.random.key(9), (*q.shape[:3], v.shape[-1]))
    differences.agree(lambda *a: oracle(*a), (v, *own), gradients(f, v, *own), do)


def test_both_ways_are_one_over_long_rows():
    args = inputs(t=300, b=1)
    a, b = (S4D(state=8, fft=f) for f in (True, False))
    params = init(a, jax.random.key(0), *args)
    close(apply(a, params, *args), apply(b, params, *args))


def test_how_it_begins():
    _, _, params = made(True, 4)
    own = params["params"]
    assert np.allclose(own["log_w_real"], np.log(0.5))
    # N/pi (N/(2n + 1) - 1)
    assert np.allclose(own["w_imag"], 6 / np.pi * (6 / (2 * np.arange(3) + 1) - 1))
    assert ((own["log_dt"] >= np.log(0.01)) & (own["log_dt"] <= np.log(0.1))).all()


def test_a_layer_makes_no_projections_that_nobody_reads():
    x = jnp.zeros((2, 6, 16))
    layer = MultiHead(S4D(state=4), heads=4)
    params = layer.init(jax.random.key(0), x)["params"]
    assert set(params) == {"attention", "v", "out"}
    state, y = layer.apply({"params": params}, x, layer.init_state(6, x))
    close(y + 1, layer.apply({"params": params}, x) + 1)
    with pytest.raises(ValueError, match="context: S4D reads queries and keys in step"):
        layer.init(jax.random.key(0), x, context=x)
    with pytest.raises(ValueError, match="state=3.*an even number"):
        S4D(state=3)
