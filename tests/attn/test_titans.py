"""Titans: its limit, its gates, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.delta import Delta
from attn.titans import Titans
from tests.compiled import apply, init
from tests.laws import B, H, K, close

D = 8


def tokens(t=9):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, D), (B, t, 20)
    q, k, v, x = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    return (q, k, v), x


def test_without_momentum_and_forgetting_it_is_deltanet():
    """beta = 2 theta, which the factor of the squared error makes of it."""
    qkv, x = tokens()
    module = Titans(depth=1, momentum=False, forget=False, chunk=1, theta_max=0.5)
    params = init(module, jax.random.key(1), *qkv, x=x)["params"]
    gate = {"kernel": params["step_gate"]["kernel"]}
    delta = {n: a for n, a in params.items() if n.endswith("conv")} | {"beta": gate}
    empty = params | {"W0": jnp.zeros_like(params["W0"])}
    have = apply(module, {"params": empty}, *qkv, x=x)
    want = apply(Delta(), {"params": delta}, *qkv, x=x)
    close(have, want * D ** 0.5)


def test_gates_of_a_chunk_are_those_of_its_first_token():
    qkv, x = tokens()
    shared, own = Titans(chunk=4, by_chunk=True), Titans(chunk=4)
    params = init(own, jax.random.key(1), *qkv, x=x)
    held = jnp.repeat(x[:, ::4], 4, 1)[:, :9]
    close(apply(shared, params, *qkv, x=x), apply(own, params, *qkv, x=held))
    assert np.abs(apply(shared, params, *qkv, x=x) - apply(
        own, params, *qkv, x=x)).max() > 1e-6


def test_a_stream_of_other_pieces_is_the_whole():
    """Pieces that end inside chunks, with gates of chunks."""
    qkv, x = tokens(11)
    module = Titans(chunk=4, by_chunk=True)
    params = init(module, jax.random.key(1), *qkv, x=x)
    state, outs = module.init_state(11, *qkv, x=x), []
    for at, end in ((0, 3), (3, 6), (6, 11)):
        state, o = apply(module, params, state, *(a[:, at:end] for a in qkv),
                         x=x[:, at:end], method="step")
        outs.append(o)
    close(jnp.concatenate(outs, 1), apply(module, params, *qkv, x=x))


def test_an_empty_memory_needs_no_parameters_and_is_small():
    qkv, x = tokens()
    state = Titans(depth=2, expansion=4, norm=True).init_state(1 << 20, *qkv, x=x)
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(state.memory))
    one = H * B * (2 * D * 4 * D + 2 * D)  # two matrices, gain and bias
    assert sum(a.size for a in jax.tree.leaves(state.memory)) == 3 * one
    alone = Titans(depth=1, momentum=False, chunk=1).init_state(1, *qkv, x=x)
    assert sum(a.size for a in jax.tree.leaves(alone.memory)) == H * B * D * D


def test_wrong_calls_say_what_was_expected():
    qkv, x = tokens()
    for fields, said in (({"depth": 5}, "depth=5"), ({"read": "norm"}, "read='norm'"),
                         ({"theta_max": 0.0}, "theta_max=0.0"),
                         ({"activation": "relu"}, "activation='relu'")):
        with pytest.raises(ValueError, match=f"{said}: expected"):
            Titans(**fields)
    with pytest.raises(ValueError, match="x .*expected the tokens"):
        jax.eval_shape(Titans().init, jax.random.key(0), *qkv)
    with pytest.raises(NotImplementedError, match="pair of segments"):
        Titans()(*qkv, x=x, segments=(np.ones((B, 9), int),) * 2)
