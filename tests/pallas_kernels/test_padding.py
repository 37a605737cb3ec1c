"""Kernels never read what stands at padding, whatever it is."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta.api import delta
from pallas_kernels.linear.api import linear
from pallas_kernels.scan.api import scan
from tests.on_device import INTERPRET
from tests.oracles.softmax import flash

RUN = jnp.asarray([[0, 0, 1, 1, 1, 0, 4, 4, 0, 0, 4, 4, 4, 4, 13, 0]])
T, H, K, D, V = RUN.shape[1], 2, 1, 8, 12


def linear_attention(q, k, v, g, beta, **how):
    return linear(q, k, v, g, segment=RUN, **how)


def linear_by_channel(q, k, v, g, beta, **how):
    decay = g[..., None] * beta[..., :1, None] * q * q
    return linear(q, k, v, decay, segment=RUN, **how)


def delta_rule(q, k, v, g, beta, **how):
    return delta(q, k, v, beta, g, segment=RUN, **how)


def prefix_softmax(q, k, v, g, beta, **how):
    state = jnp.zeros((1, H)), jnp.zeros((1, H)), jnp.zeros((1, H, V))
    return scan(q.sum(-1) + g, v, state, segment=RUN, **how)


def exact(q, k, v, g, beta, **how):
    pos = jnp.arange(T, dtype=jnp.int32)[None]
    return flash(q, k, v, q_pos=pos, kv_pos=pos, q_segment=RUN, kv_segment=RUN, **how)


@pytest.mark.parametrize("backend", ["tpu", "triton"])
@pytest.mark.parametrize(
    "kernel", [linear_attention, linear_by_channel, delta_rule, prefix_softmax, exact])
def test_padding_may_hold_anything(kernel, backend):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=(1, T, *shape)).astype(np.float32)
    args = normal(H, D), normal(K, D), normal(K, V), -normal(H) ** 2, normal(H) ** 2
    f = functools.partial(kernel, backend=backend, interpret=INTERPRET)

    @jax.jit
    def both(*args):
        out, back = jax.vjp(lambda *args: f(*args), *args)
        return out, back(jax.tree.map(jnp.ones_like, out))

    want = both(*args)
    chex.assert_tree_all_finite(want[1])
    for value in (np.nan, np.inf, 1e30):
        pad = np.asarray(RUN) == 0
        spoilt = (np.where(pad.reshape(1, T, *[1] * (a.ndim - 2)), value, a)
                  .astype(np.float32) for a in args)
        out, grads = both(*spoilt)
        chex.assert_trees_all_equal(out, want[0])
        # of what is made outside of the kernel, tokens count
        for a, b in zip(grads, want[1], strict=True):
            chex.assert_trees_all_equal(a[~pad], b[~pad])
