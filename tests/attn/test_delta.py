"""Delta: the layer is its equation, and a stream of it is the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.delta import Delta
from tests.compiled import apply, init
from tests.oracles.delta_rule import B, H, close, recurrence

LAYERS = {
    "plain": Delta(chunk=8), "no_conv": Delta(conv=0, negative=True),
    "gated": Delta(gated=True, chunk=8), "negative": Delta(gated=True, negative=True),
    "channels": Delta(gated=True, channels=True, rank=4, chunk=8),
    "values": Delta(gated=True, values=3, chunk=8),
}
SEGMENTS = np.array([[1] * 5 + [2] * 8 + [0] * 3, [0] * 2 + [1] * 6 + [3] * 8])


def layer_inputs(t=16):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, t, H, 8), (B, t, 2, 8), (B, t, 2, 12), (B, t, 20)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_of_the_layer_is_the_whole(name, packed):
    layer, (q, k, v, x) = LAYERS[name], layer_inputs()
    segments = jnp.asarray(SEGMENTS) if packed else None
    params = init(layer, jax.random.key(1), q, k, v, x=x)
    want = jax.jit(lambda *a: layer.apply(params, *a, x=x, segments=segments))(q, k, v)
    if packed:
        assert (np.asarray(want)[SEGMENTS == 0] == 0).all()
        alone = apply(layer, params, *(a[:1, 5:13] for a in (q, k, v)), x=x[:1, 5:13])
        close(want[:1, 5:13], alone, 1e-5)
    step = jax.jit(lambda s, seg, x, *a: layer.apply(
        params, s, *a, x=x, segments=seg, method="step"))
    for piece in (1, 8):
        state, outs = layer.init_state(16, q, k, v), []
        for at in range(0, 16, piece):
            part = slice(at, at + piece)
            seg = None if segments is None else segments[:, part]
            state, o = step(state, seg, *(a[:, part] for a in (x, q, k, v)))
            outs.append(o)
        close(jnp.concatenate(outs, 1), want, 1e-5)


def test_the_layer_is_its_equation():
    q, k, v, x = layer_inputs()
    layer = Delta(gated=True, negative=True, conv=0)
    params = init(layer, jax.random.key(1), q, k, v, x=x)
    own = {n: np.asarray(a, np.float64) for n, a in params["params"].items()
           if n in ("A_log", "dt_bias")}
    own |= {n: np.asarray(params["params"][n]["kernel"], np.float64)
            for n in ("beta", "decay")}
    silu = lambda a: a / (1 + np.exp(-a))
    unit = lambda a: a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6)
    a = [np.asarray(a, np.float64) for a in (q, k, v, x)]
    beta = 2 / (1 + np.exp(-a[3] @ own["beta"]))
    g = -np.exp(own["A_log"]) * np.log1p(np.exp(a[3] @ own["decay"] + own["dt_bias"]))
    state, zeros = np.zeros((B, H, 8, 12)), np.zeros((B, 16, H, 12))
    want, _ = recurrence(unit(silu(a[0])), unit(silu(a[1])), silu(a[2]), beta, g, state,
                         np.ones((B, 16), int), 8**-0.5, zeros, state)
    close(apply(layer, params, q, k, v, x=x), want[1], 1e-5)
    assert (0 < np.exp(own["A_log"])).all() and (np.exp(own["A_log"]) <= 16).all()


def test_a_head_of_keys_may_serve_several_of_values():
    """As many heads of keys, all alike, give the same."""
    q, k, v, x = layer_inputs()
    some, all_ = Delta(gated=True, conv=0, values=3), Delta(gated=True, conv=0)
    q = q[:, :, :2]
    params = init(some, jax.random.key(1), q, k, v, x=x)
    found = apply(some, params, q, k, v, x=x)
    q, k = (jnp.repeat(a, 3, 2) for a in (q, k))
    want = apply(all_, params, q, k, v.reshape(B, 16, 6, 4), x=x)
    close(found, want, 1e-6)


def test_channels_decay_where_heads_do():
    with pytest.raises(ValueError, match="channels=True without gated"):
        Delta(channels=True)


def test_the_layer_says_what_was_expected():
    q, k, v, x = layer_inputs()
    with pytest.raises(ValueError, match="Delta: conv=-1"):
        Delta(conv=-1)
    for wrong in (None, x[:, :3]):
        with pytest.raises(ValueError, match="x .*expected the tokens"):
            Delta().init(jax.random.key(0), q, k, v, x=wrong)
    with pytest.raises(NotImplementedError, match="pair of segments"):
        Delta()(q, k, v, x=x, segments=(SEGMENTS, SEGMENTS))
