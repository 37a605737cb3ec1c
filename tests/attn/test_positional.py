"""Positional: weights of positions in float64, scratch tokens, one A for a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.positional import Positional
from experiments.measure import cost
from tests import compiled
from tests.laws import SEGMENTS, close, inputs

H, T = 4, 16


def definition(params, v, places, causal=False, seen=None):
    """o [B,T,H,V] in float64, of one-hot positions `places` [B,T]."""
    own = {n: np.asarray(a, np.float64) for n, a in params["params"].items()}
    v = np.repeat(np.asarray(v, np.float64), H // v.shape[2], 2)
    q, k = (own[n][places] + own[f"{n}_bias"] for n in ("query", "key"))
    s = np.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    t = s.shape[-1]
    seen = np.ones((1, t, t), bool) if seen is None else seen
    seen = seen & np.tril(np.ones((t, t), bool)) if causal else seen
    p = np.where(seen[:, None], np.exp(s), 0)
    total = p.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", p / np.where(total > 0, total, 1), v)


def drawn(attention, t=4):
    params = compiled.init(attention, jax.random.key(1), *inputs(t=t))
    return jax.tree.map(
        lambda a: a + jax.random.normal(jax.random.key(2), a.shape), params)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_definition(packed, causal):
    attention = Positional(20, causal=causal)
    params, (q, k, v) = drawn(attention), inputs()
    segments = seen = None
    places = np.tile(np.arange(T), (2, 1))
    if packed:
        segments = jnp.asarray(SEGMENTS)
        seen = (SEGMENTS[..., None] == SEGMENTS[:, None]) & (SEGMENTS[:, None] > 0)
        places = np.stack([
            [(row[:i] == row[i]).sum() for i in range(T)] for row in SEGMENTS])
    o = compiled.apply(attention, params, q, k, v, segments=segments)
    want = definition(params, v, places, causal, seen)
    close(o, np.where((SEGMENTS > 0)[..., None, None], want, 0) if packed else want)


def test_scratch_tokens_stand_at_the_last_positions():
    attention = Positional(20, scratch=2)
    params = drawn(attention)
    for t in (2, 9, 20):
        q, k, v = inputs(t=t)
        places = np.concatenate([np.arange(t - 2), [18, 19]])
        want = definition(params, v, np.tile(places, (2, 1)))
        close(compiled.apply(attention, params, q, k, v), want)
    with pytest.raises(NotImplementedError, match="segments with scratch=2"):
        attention.apply(params, *inputs(), segments=jnp.asarray(SEGMENTS))


def test_queries_of_another_length_than_keys():
    attention, (q, k, v) = Positional(20), inputs()
    params = drawn(attention)
    o = compiled.apply(attention, params, q[:, :5], k, v)
    want = definition(params, v, np.tile(np.arange(T), (2, 1)))[:, :5]
    close(o, want)


def test_tokens_change_values_and_never_weights():
    attention, (q, k, v) = Positional(20), inputs()
    params = drawn(attention)
    o = compiled.apply(attention, params, q, k, v)
    close(compiled.apply(attention, params, 9 * q, k[::-1], 1000 * v), 1000 * o)
    layer = MultiHead(attention, H, position=None)
    x = jnp.ones((1, 3, 8))
    assert set(compiled.init(layer, jax.random.key(0), x)["params"]) == {
        "attention", "v", "out"}


def test_the_weights_of_a_batch_are_made_once():
    attention = Positional(64)
    params = drawn(attention)
    work = [cost.flops(
        lambda q, k, v: attention.apply(params, q, k, v), *inputs(t=64, b=b, d=64, v=1)
    ) for b in (1, 2, 3)]
    # each further row is its values alone: 2 T^2 H, and what leads them there
    assert work[2] - work[1] == work[1] - work[0] < 0.1 * work[0]


@pytest.mark.parametrize("encoding", ["sinusoid", "learned"])
def test_other_encodings(encoding):
    attention = Positional(20, encoding=encoding, width=6)
    params = drawn(attention)
    names = {"query", "key", "query_bias", "key_bias"}
    assert set(params["params"]) - {"positions"} == names
    assert params["params"]["query"].shape == (6, H, 6)
    q, k, v = inputs()

    def total(params):
        return (attention.apply(params, q, k, v) ** 2).sum()

    grads = jax.jit(jax.grad(total))(params)["params"]
    # the rows of a softmax do not see what all of their logits share
    for name in set(grads) - {"key_bias"}:
        assert np.abs(grads[name]).max() > 1e-6, name


def test_a_stream_ends_at_its_length():
    attention, (q, k, v) = Positional(4, causal=True), inputs(t=5)
    params = drawn(attention)
    state = attention.init_state(9, q, k, v)
    assert state.v.shape[1] == 4 and state.k.shape[-1] == 1
    with pytest.raises(ValueError, match="memory of 4"):
        attention.apply(params, state, q, k, v, method="step")


@pytest.mark.parametrize("fields, message", [
    ({"encoding": "sinusoid"}, "width=None: expected a width"),
    ({"width": 3}, "width=3: expected a width for"),
    ({"encoding": "binary"}, "encoding='binary': expected one of"),
    ({"scratch": 1, "causal": True}, "expected scratch=0"),
])
def test_wrong_fields_say_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        Positional(9, **fields)
    with pytest.raises(ValueError, match="16 tokens: expected at most length=9"):
        Positional(9).init(jax.random.key(0), *inputs())
