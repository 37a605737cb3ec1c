"""ProbSparse: its choice in float64, ties and short rows, samples of a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Full
from attn.probsparse import ProbSparse
from attn.softmax import Softmax
from tests.compiled import attend
from tests.laws import SEGMENTS, close, gradients, inputs
from tests.oracles import differences
from tests.oracles.softmax import attention as softmax


def oracle(q, k, v, samples, u):
    """float64, query by query."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    exact = softmax(q, k, v, np.ones((1, 1), bool))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    o = np.broadcast_to(v.mean(1, keepdims=True), exact.shape).copy()
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            s = np.einsum("td,tud->tu", q[b, :, h], k[b, samples, h])
            m = s.max(1) - s.sum(1) / k.shape[1]
            at = np.argsort(-m, kind="stable")[:u]
            o[b, at, h] = exact[b, at, h]
    return o


def drawn(attention, t):
    """The samples that it draws of its seed."""
    u = attention.number(t)
    shares = jax.random.uniform(jax.random.key(attention.seed), (t, u), jnp.float32)
    return np.asarray(shares * t, np.int32)


@pytest.mark.parametrize("factor, t", [(1, 16), (2, 7), (2, 1), (5, 7)])
def test_it_is_its_definition(factor, t):
    args, attention = inputs(t=t), ProbSparse(factor=factor, seed=3)
    samples = drawn(attention, t)
    want = oracle(*args, samples, attention.number(t))
    close(attend(attention, *args), want)
    close(attend(attention, *args, samples=jnp.asarray(samples)), want)


def test_gradients_by_differences_and_samples_of_a_key():
    args, attention = inputs(t=9), ProbSparse(factor=1)
    do = jax.random.normal(jax.random.key(9), (*args[0].shape[:3], args[2].shape[-1]))
    f = lambda *a: oracle(*a, drawn(attention, 9), attention.number(9))
    differences.agree(f, args, gradients(attention, *args), do)
    a, b = (attend(attention, *args, key=jax.random.key(n)) for n in (1, 2))
    assert np.abs(a - b).max() > 1e-3


def test_short_rows_are_exact_and_padded_ones_are_as_long_as_they_are():
    args, ids = inputs(), jnp.asarray(SEGMENTS == 1, jnp.int32)
    close(attend(ProbSparse(factor=6), *args), attend(Softmax(mask=Full()), *args))
    # five tokens: as many queries as there are
    o = attend(ProbSparse(factor=3), *args, segments=ids)
    for row in range(2):
        at = np.nonzero(SEGMENTS[row] == 1)[0]
        own = [a[row:row + 1, at] for a in args]
        close(o[row:row + 1, at], attend(Softmax(mask=Full()), *own))
    # queries alike: any of them may be chosen, and all get the same
    q, k, v = args
    one = attend(ProbSparse(factor=1), jnp.zeros_like(q), k, v)
    close(one, jnp.broadcast_to(jnp.repeat(v, 2, 2).mean(1, keepdims=True), one.shape))
    with pytest.raises(ValueError, match=r"samples has shape \(2, 2\): expected"):
        ProbSparse()(*args, samples=jnp.zeros((2, 2), jnp.int32))
