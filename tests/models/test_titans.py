"""The layers of Titans keep the order of tokens, and their streams are the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.softmax import Softmax
from attn.titans import Titans
from models.lm import LM
from models.titans import LMM, MAG, MAL
from models.titans_context import MAC
from tests.compiled import apply, init
from tests.laws import close

E, T = 8, 13
LAYERS = {
    "lmm": LMM(Titans(chunk=4, expansion=1), heads=2),
    "mag": MAG(Titans(chunk=4, depth=1), heads=2, window=3),
    "mal": MAL(Titans(chunk=4, depth=1), heads=2, window=3, persistent=0),
    "mac": MAC(Titans(chunk=2, expansion=1), heads=2, segment=4),
}


def drawn(name):
    x = jax.random.normal(jax.random.key(0), (2, T, E))
    return x, init(LAYERS[name], jax.random.key(1), x)


@pytest.mark.parametrize("name", LAYERS)
def test_no_token_sees_the_future(name):
    x, params = drawn(name)
    t = 6
    f = lambda x: (LAYERS[name].apply(params, x)[:, t] ** 2).sum()
    g = np.asarray(jax.jit(jax.grad(f))(x))
    assert (g[:, t + 1:] == 0).all()
    assert (np.abs(g[:, :t + 1]).max((0, 2)) > 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_a_stream_is_the_whole(name):
    layer, (x, params) = LAYERS[name], drawn(name)
    want, state, outs = apply(layer, params, x), layer.init_state(T, x), []
    # in front of the text stands padding, behind which persistent tokens come once
    pad = jnp.zeros((2, 2, E))
    state, _ = apply(layer, params, pad, state, segments=jnp.zeros((2, 2), jnp.int32))
    for at, end in ((0, 5), (5, 6), (6, T)):
        state, y = apply(layer, params, x[:, at:end], state)
        outs.append(y)
    close(jnp.concatenate(outs, 1), want)
    assert state.end.tolist() == [T, T]


def test_packed_rows_need_a_layer_without_persistent_tokens():
    x, params = drawn("mal")
    ids = jnp.asarray([[1] * 5 + [2] * 8] * 2)
    packed = apply(LAYERS["mal"], params, x, segments=ids)
    close(packed[:, 5:], apply(LAYERS["mal"], params, x[:, 5:]))
    x, params = drawn("lmm")
    packed = np.asarray(apply(LAYERS["lmm"], params, x, segments=ids))
    assert np.isnan(packed[:, 5:]).all()
    close(packed[:, :5], apply(LAYERS["lmm"], params, x[:, :5]))
    with pytest.raises(NotImplementedError, match="LMM: a second sequence .*expected"):
        LAYERS["lmm"].apply(params, x, segments=ids)
    # of MAC each segment has persistent tokens of its own
    x, params = drawn("mac")
    packed = apply(LAYERS["mac"], params, x, segments=ids)
    for part in (slice(0, 5), slice(5, T)):
        close(packed[:, part], apply(LAYERS["mac"], params, x[:, part]))


def test_segments_of_mac_meet_through_the_memory_alone():
    """With steps of 0 nothing is written, and a segment is read as if it were alone."""
    x, params = drawn("mac")
    gate = params["params"]["segments"]["attention"]["step_gate"]
    still = jax.tree.map(lambda a: a, params)
    still["params"]["segments"]["attention"]["step_gate"] = {
        "kernel": 0 * gate["kernel"], "bias": gate["bias"] - 99.0}
    still["params"]["segments"]["attention"]["forget_gate"] = {
        "kernel": 0 * gate["kernel"], "bias": gate["bias"] - 99.0}
    for params, same in ((still, True), (params, False)):
        whole = apply(LAYERS["mac"], params, x)[:, 8:12]
        alone = apply(LAYERS["mac"], params, x[:, 8:12])
        # but for the convolution of what is written, which reaches 3 tokens back
        far = np.abs(whole - alone)[:, 3:].max()
        assert far < 1e-5 if same else far > 1e-5, far


def test_what_is_not_there_says_why():
    x, params = drawn("mac")
    with pytest.raises(NotImplementedError, match="a context"):
        LAYERS["lmm"].apply(params, x, context=x)
    with pytest.raises(ValueError, match="expected a memory that learns"):
        MAG(Softmax(), heads=2)


def test_they_are_layers_of_a_language_model():
    model = LM(vocab=11, width=E, heads=2, attention=tuple(LAYERS.values()), hidden=8)
    tokens = jnp.arange(T)[None] % 11
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    logits = jax.eval_shape(model.apply, params, tokens)
    assert logits.shape == (1, T, 11)
