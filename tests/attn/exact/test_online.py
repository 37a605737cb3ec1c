"""Online softmax: states merge in any cut, on any grid, with the same gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.exact.attend import attend
from attn.exact.dense import online_softmax
from attn.exact.online import (
    EMPTY, OnlineSoftmax, empty, join, logsumexp, merge, output, state_of
)
from attn.masks import Causal, Full
from attn.softmax import Softmax
from pallas_kernels.logits import LogitSpec, Where
from tests.laws import close, gradients, inputs
from tests.oracles.softmax import attention, order

CAUSAL = LogitSpec(Causal())


@pytest.mark.parametrize("cuts", [(16,), (4, 4, 4, 4), (1, 9, 6)])
@pytest.mark.parametrize("chunked", [False, True])
def test_parts_merge_to_the_whole(cuts, chunked):
    q, k, v = inputs()
    edges = np.cumsum((0, *cuts))
    where = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))

    def f(q, k, v):
        parts = []
        for a, b in zip(edges[:-1], edges[1:]):
            args, at = (q, k[:, a:b], v[:, a:b]), where[:, a:b]
            parts.append(
                state_of(*attend(*args, CAUSAL, Where(where, at)))
                if chunked else online_softmax(*args, CAUSAL, Where(where, at))
            )
        found = parts[0]
        for part in parts[1:]:  # one after the other
            found = join(found, part)
        at_once = merge(jax.tree.map(
            lambda *a: jnp.stack(a), *(OnlineSoftmax(*part) for part in parts)))
        return output(found), output(at_once)

    for n in range(2):
        one = lambda q, k, v: f(q, k, v)[n]
        close(one(q, k, v), attention(q, k, v, order(16, 16)))
        want = gradients(Softmax(), q, k, v)
        for a, b in zip(gradients(one, q, k, v), want):
            close(a, b, "gradient")


def test_nothing_seen_is_the_neutral_state():
    q, k, v = inputs()
    later = Where(jnp.zeros((2, 16), jnp.int32),
                  jnp.broadcast_to(1 + jnp.arange(16)[None], (2, 16)))
    none = online_softmax(q, k, v, CAUSAL, later)
    assert (none.m == np.float32(EMPTY)).all()
    assert (none.l == 0).all() and (none.acc == 0).all()
    o, lse = attend(q, k, v, CAUSAL, later)
    for state in (state_of(o, lse), empty(none.m.shape, v.shape[-1])):
        for a, b in zip(state, none):
            np.testing.assert_array_equal(a, b)
    assert (logsumexp(none) == -np.inf).all()
    some = online_softmax(q, k, v)
    stacked = lambda *parts: jax.tree.map(lambda *a: jnp.stack(a), *parts)
    for both in (merge(stacked(none, some)), join(some, none)):
        for a, b in zip(both, some):
            np.testing.assert_array_equal(a, b)
    both = merge(stacked(none, none))
    assert (both.m == np.float32(EMPTY)).all() and (both.l == 0).all()
    assert (output(both) == 0).all()
    grads = gradients(lambda *parts: output(merge(stacked(*parts))).sum(), none, none)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(grads))


def test_the_maximum_is_subtracted_before_anything_is_summed():
    # logits near 1000, far past the range of exp; in quarters, which float32 holds
    q, k, v = inputs()
    q, k = (jnp.round(4 * a) / 4 for a in (q, k))
    wide = lambda a, first: jnp.concatenate([jnp.full_like(a[..., :1], first), a], -1)
    q_wide, late = wide(q, 1.0), jnp.arange(16) >= 8
    k_wide = wide(k, 0.0).at[:, 8:, :, 0].set(4e3)
    parts = [online_softmax(q_wide, k_wide[:, at], v[:, at], LogitSpec(Full(), 0.25))
             for at in (slice(0, 8), slice(8, 16))]
    o = output(merge(jax.tree.map(lambda *a: jnp.stack(a), *parts)))
    scaled = np.asarray(q, np.float64) * 0.25 * q.shape[-1] ** 0.5
    close(o, attention(scaled, k, v, np.broadcast_to(late, (16, 16))))
