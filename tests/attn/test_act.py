"""Calibration: rows sum to one, and (1 - beta) m moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.act import ACT, calibrated
from attn.masks import Causal, Full, Window
from attn.softmax import Softmax
from models.lm import LM
from tests.compiled import attend, init, step
from tests.laws import close

T = 24
ONE = ACT(factor=1.2, tile=7)


def tokens(t=T, dtype=jnp.float32):
    """Keys 0, 6 and 13 receive much."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, t, n, 4)) for key, n in zip(keys, (4, 2, 2)))
    q = q.at[..., 0].set(3.0)
    at = jnp.array([n for n in (0, 6, 13) if n < t])
    k = k.at[:, at, :, 0].add(2.0)
    return tuple(a.astype(dtype) for a in (q, k, v))


def oracle(one, q, k, v, sink=None):
    """The equations in float64, head by head: o, A and A', sinks."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    b, t, h, d = q.shape
    k, v = (np.repeat(a, h // a.shape[2], 2) for a in (k, v))
    s = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(d)
    s = np.where(np.tri(t, dtype=bool), s, -np.inf)
    e = np.exp(s)
    total = e.sum(-1, keepdims=True)
    a = e / (total if sink is None else total + np.exp(sink)[None, :, None, None])
    rows = t - np.arange(t)
    bound = one.factor / t if one.threshold is None else one.threshold
    sinks = (a.sum(2) / rows > bound) & (rows >= one.min_rows)
    for n in np.ndindex(b, h):
        found = np.flatnonzero(sinks[n])
        sinks[n][found[:1] if one.first == "first_detected" else 0] = False
        if one.heads is not None and n[1] not in one.heads:
            sinks[n] = False
    m = (a * sinks[:, :, None]).sum(-1, keepdims=True)
    whole = a.sum(-1, keepdims=True)
    other = a * (1 + (1 - one.beta) * m / (whole - m))
    new = np.where(sinks[:, :, None], one.beta * a, other)
    return np.einsum("bhts,bshv->bthv", new, v), a, new, sinks


@pytest.mark.parametrize("one", [
    ONE, dataclasses.replace(ONE, heads=(1, 2), first="token0", beta=0.0),
    ACT(threshold=0.1, min_rows=3)], ids=["all", "some", "threshold"])
def test_the_equations_and_what_they_keep(one):
    q, k, v = tokens()
    o, a, new, sinks = oracle(one, q, k, v)
    assert sinks.any() and not sinks.all()
    close(attend(one, q, k, v), o)
    whole = jnp.arange(4), jnp.arange(T)
    found = np.asarray(jax.jit(one.weights)(q, k, v, *whole))
    close(found, new)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    m = (a * sinks[:, :, None]).sum(-1)
    moved = m - (found * sinks[:, :, None]).sum(-1)
    np.testing.assert_allclose(moved, (1 - one.beta) * m, atol=1e-5)


def test_a_learned_sink_keeps_its_share():
    q, k, v = tokens()
    sink = jnp.arange(4.0) / 2
    o, a, new, _ = oracle(ONE, q, k, v, np.asarray(sink, np.float64))
    np.testing.assert_allclose(new.sum(-1), a.sum(-1), atol=1e-12)
    close(attend(ONE, q, k, v, sink=sink), o)


@pytest.mark.parametrize("t", [1, 2, 23])
def test_lengths_and_types(t):
    q, k, v = tokens(t)
    close(attend(ONE, q, k, v), oracle(ONE, q, k, v)[0])
    low = tokens(t, jnp.bfloat16)
    o = attend(ONE, *low)
    assert o.dtype == jnp.bfloat16
    exact = oracle(ONE, *(a.astype(jnp.float32) for a in low))[0]
    np.testing.assert_allclose(np.asarray(o, np.float32), exact, atol=0.03)


def test_gradients_are_those_of_the_equations():
    """Which keys are sinks has no gradient; all else has."""
    q, k, v = tokens(9)
    sinks = jnp.asarray(oracle(ONE, q, k, v)[3])[:, :, None]
    assert sinks.any()

    def plain(q, k, v):
        k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
        s = jnp.einsum("bthd,bshd->bhts", q, k) / 2
        seen = np.tri(9, dtype=bool)[None, None]
        a = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
        m = (a * sinks).sum(-1, keepdims=True)
        other = a * (1 + (1 - ONE.beta) * m / (1 - m))
        return jnp.einsum("bhts,bshv->bthv", jnp.where(sinks, ONE.beta * a, other), v)

    def grads(f):
        return jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2)))(q, k, v)

    for a, b in zip(grads(ONE), grads(plain)):
        close(a, b, "gradient")


def test_packed_texts_and_padding_are_texts_of_their_own():
    q, k, v = tokens()
    segments = jnp.array([[1] * 9 + [2] * 12 + [0] * 3, [1] * 15 + [2] * 9])
    o = attend(ONE, q, k, v, segments=segments)
    for row, at in ((0, slice(0, 9)), (0, slice(9, 21)), (1, slice(15, 24))):
        own = tuple(a[row:row + 1, at] for a in (q, k, v))
        close(o[row:row + 1, at], attend(ONE, *own))
    assert (o[0, 21:] == 0).all()
    state = ONE.init_state(T, q, k, v)
    close(step(ONE, state, q, k, v, segments=segments)[1], o)


def test_a_stream_votes_with_all_that_has_come():
    """The last token of a text, read by itself, is the last of the text as a whole; so
    is every token of a text that ends with it."""
    q, k, v = tokens()
    state = ONE.init_state(T, q, k, v)
    for at in (slice(0, 15), slice(15, 16), slice(16, 17), slice(17, 22)):
        state, o = step(ONE, state, q[:, at], k[:, at], v[:, at])
        own = tuple(a[:, :at.stop] for a in (q, k, v))
        close(o, attend(ONE, *own)[:, at])
    assert (state.rows[:, :, 0] == 22).all() and (state.rows[:, :, 22:] == 0).all()


def test_a_model_is_calibrated_by_its_state():
    model = LM(vocab=13, width=16, heads=4, attention=(ACT(factor=1.0),) * 2)
    text = jax.random.randint(jax.random.key(0), (2, T), 0, 13)
    params = init(model, jax.random.key(1), text)
    states = model.init_state(T, text)
    call = jax.jit(model.apply)
    close(call(params, text, states)[1], call(params, text))
    none = call(params, text, calibrated(states, jnp.zeros((2, 4))))[1]
    plain = model.clone(attention=(Softmax(),) * 2)
    close(none, jax.jit(plain.apply)(params, text))
    assert np.abs(none - call(params, text)).max() > 1e-3


def test_no_order_and_what_is_refused():
    q, k, v = tokens()
    full = dataclasses.replace(ONE, mask=Full())
    received, _ = full.found(q, k)
    whole = jnp.arange(4), jnp.arange(T)
    close(received, Softmax(Full()).weights(q, k, v, *whole).mean(2))
    with pytest.raises(NotImplementedError, match="forgets keys"):
        ACT(mask=Causal() & Window(3)).init_state(T, q, k, v)
    with pytest.raises(ValueError, match="beta=2: expected"):
        ACT(beta=2)
