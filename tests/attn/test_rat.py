"""RAT against its definition in float64, and its two limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.positions import RoPE
from attn.rat import RAT
from attn.softmax import Softmax
from tests.compiled import apply, init
from tests.laws import B, D, H, T, V, SEGMENTS, Learned, close, inputs


def definition(q, k, v, gate, chunk):
    """o [B,T,H,V] in float64 without rotation; gate [B,T,H,max(D,V)]."""
    q, k, v, gate = (np.asarray(a, np.float64) for a in (q, k, v, gate))
    k, v = (np.repeat(a, H // a.shape[2], 2) for a in (k, v))
    own = [np.zeros_like(a) for a in (k, v)]
    for t in range(q.shape[1]):
        for held, a in zip(own, (k, v)):
            g = gate[:, t, :, : a.shape[-1]]
            before = held[:, t - 1] if t % chunk else 0
            held[:, t] = g * before + (1 - g) * a[:, t]
    o = np.zeros_like(own[1])
    for t in range(q.shape[1]):
        at = [*range(chunk - 1, t // chunk * chunk, chunk), t]
        s = np.einsum("bhd,bshd->bhs", q[:, t], own[0][:, at]) * q.shape[-1] ** -0.5
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        o[:, t] = np.einsum("bhs,bshv->bhv", p, own[1][:, at])
    return o


@pytest.mark.parametrize("chunk", [1, 3, 8, 99])
def test_it_is_the_definition(chunk):
    q, k, v = inputs()
    attention = Learned(RAT(chunk=chunk, rope=None))
    x = attention._tokens(q, k, v)
    p = attention._params["params"]
    logit = jnp.einsum("bte,ehd->bthd", x, p["gate"]["kernel"])
    logit = logit + p["gate_bias"][None, None]
    close(attention(q, k, v), definition(q, k, v, jax.nn.sigmoid(logit), chunk))


def test_chunks_of_one_are_attention_to_gated_keys_and_values():
    q, k, v = inputs(v=D)
    module = RAT(chunk=1)
    x = jnp.ones((B, T, 5))
    params = init(module, jax.random.key(0), q, k, v, x=x)
    open_gates = jax.tree.map(lambda a: jnp.full_like(a, -30.0), params)
    pos = jnp.arange(T)[None]
    turned = (RoPE().rotate(a, pos) for a in (q, k))
    close(apply(module, open_gates, q, k, v, x=x), Softmax()(*turned, v))


def test_long_chunks_never_look_back():
    q, k, v = inputs()
    module, x = RAT(chunk=T), jnp.ones((B, T, 5))
    params = init(module, jax.random.key(0), q, k, v, x=x)
    read = lambda q: module.apply(params, q, k, v, x=x)
    np.testing.assert_array_equal(read(q), read(5 * q))
    attention = Learned(module)
    state = attention.init_state(T, q, k, v)
    assert state.k.shape == (B, 1, H, D) and state.v.shape == (B, 1, H, V)


def test_a_segment_starts_chunks_of_its_own():
    q, k, v = inputs()
    attention = Learned(RAT(chunk=3))
    packed = attention(q, k, v, segments=jnp.asarray(SEGMENTS))
    part = [a[:1, 5:13] for a in (q, k, v)]
    close(packed[:1, 5:13], attention(*part))


def test_gates_begin_slow():
    module = RAT(chunk=16)
    q = jnp.ones((1, 4, 2, 64))
    params = init(module, jax.random.key(0), q, q, q, x=jnp.ones((1, 4, 5)))
    bias = np.asarray(params["params"]["gate_bias"])
    assert bias.min() >= 0 and bias.max() <= np.log(15) and bias.std() > 0.1


def test_the_layer_gates_and_keeps_the_rotation_of_chunks():
    x = jax.random.normal(jax.random.key(0), (1, 8, 16))
    layer = MultiHead(RAT(chunk=2), heads=2)
    params = init(layer, jax.random.key(0), x)
    assert set(params["params"]) == {"q", "k", "v", "attention", "gate", "out"}
    close(apply(layer, params, x), layer.clone(position=None).apply(params, x))


def test_wrong_calls_say_what_was_expected():
    with pytest.raises(ValueError, match="chunk=0"):
        RAT(chunk=0)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="x is None"):
        RAT().init(jax.random.key(0), q, k, v)
    attention = Learned(RAT())
    with pytest.raises(ValueError, match="expected a RATState"):
        attention.step(Softmax().init_state(4, q, k, v), q, k, v)
