"""Rows whose logits are large, or all of one size: a mask of large negative numbers is
a bias like any other, and only -inf hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.exact import dense
from attn.exact.online import join, output, state_of
from tests import laws
from tests.on_device import INTERPRET
from tests.oracles.softmax import best, chunks, decode, flash

B, T, S, H, K, D, V = 1, 5, 21, 2, 1, 8, 4
TILE = (4, 16)
LEAST = float(np.finfo(np.float32).min)
LOWEST = LEAST, float(jnp.finfo("bfloat16").min)
CONSTANTS = (-1e4, -1e7, 3e8, -1e10, -1e30, 1e30, *LOWEST)
FORMS = {
    "xla": functools.partial(chunks, tile=TILE),
    "tpu": functools.partial(flash, tile=TILE, interpret=INTERPRET),
    "triton": functools.partial(
        flash, tile=(16, 16), backend="triton", interpret=INTERPRET),
}


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, V), (B, T, H, V)
    return [jax.random.normal(key, a) for key, a in zip(keys, shapes)]


def exact(q, k, v, bias, do, sink=None):
    """o and the gradients of v, bias and sink in float64, of logits that float32
    rounds: at 1e10 q.k is nothing beside the bias."""
    s = np.einsum("bthd,bskd->bhts", q, k).astype(np.float32) * np.float32(D**-0.5)
    s = (s + bias).astype(np.float64)
    if sink is not None:
        own = np.broadcast_to(np.asarray(sink)[None, :, None, None], (*s.shape[:3], 1))
        s = np.concatenate([s, own], -1)
    top = s.max(-1, keepdims=True)
    e = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total > 0, total, 1)
    v, do = (np.asarray(a, np.float64) for a in (v, do))
    dp = np.einsum("bthv,bskv->bhts", do, v)
    if sink is not None:
        dp = np.concatenate([dp, np.zeros((*dp.shape[:3], 1))], -1)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    found = {
        "o": np.einsum("bhts,bskv->bthv", p[..., :S], v),
        "v": np.einsum("bhts,bthv->bsv", p[..., :S], do)[:, :, None],
        "bias": ds[..., :S],
    }
    return found if sink is None else found | {"sink": ds[..., S].sum((0, 2))}


def close(a, b, bound=2e-5):
    for name in b:
        gap = np.abs(np.asarray(a[name], np.float64) - b[name]).max()
        assert gap <= bound * max(np.abs(b[name]).max(), 1), (name, gap)


@functools.cache
def gradients(form):
    """One program for all constants: o and the gradients of v, bias and sink."""
    def scalar(given, q, k, do):
        o, _ = FORMS[form](q, k, **given)
        return (o * do).sum(), o

    def run(given, q, k, do):
        grads, o = jax.grad(scalar, has_aux=True)(given, q, k, do)
        return grads | {"o": o}

    return jax.jit(run)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_bias_changes_nothing(form):
    """Rows of one constant, rows with some keys hidden by -inf, all keys hidden."""
    q, k, v, do = inputs()
    for c in CONSTANTS:
        bias = np.full((B, H, T, S), c, np.float32)
        bias[:, :, 1, 3:] = -np.inf
        bias[:, :, 2] = -np.inf
        bias[:, 1, 3, ::2] = 0
        have = gradients(form)({"v": v, "bias": jnp.asarray(bias)}, q, k, do)
        close(have, exact(q, k, v, bias, do))


@pytest.mark.parametrize("form", FORMS)
def test_a_sink_of_minus_infinity_is_none(form):
    """Also in a row that sees nothing; a finite one is a logit, whatever the others."""
    q, k, v, do = inputs()
    for c, one in ((0, 1.0), (-1e10, 0.0), (-1e10, -1e10), (LEAST, -np.inf)):
        bias = np.full((B, H, T, S), c, np.float32)
        bias[:, :, 2] = -np.inf
        sink = np.array([-np.inf, one], np.float32)
        given = {"v": v, "bias": jnp.asarray(bias), "sink": jnp.asarray(sink)}
        close(gradients(form)(given, q, k, do), exact(q, k, v, bias, do, sink))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", (1e6, 1e15))
def test_large_logits_have_finite_gradients(form, scale):
    q, k, v, do = inputs()

    @jax.jit
    def run(q, k, v):
        return jax.vjp(lambda *a: FORMS[form](*a)[0], q, k, v)[1](do)

    dq, dk, dv = run(q * scale, k, v)
    assert all(np.isfinite(a).all() for a in (dq, dk, dv))
    # of whole numbers and a power of two no logit is rounded, and dv is exact: the
    # greatest keys of a row share its weight
    whole = [np.round(2 * np.asarray(a, np.float64)) for a in (q, k)]
    s = np.einsum("bthd,bskd->bhts", *whole)
    p = s == s.max(-1, keepdims=True)
    want = np.einsum("bhts,bthv->bsv", p / p.sum(-1, keepdims=True), do)
    own = [jnp.asarray(a, jnp.float32) for a in whole]
    exactly = run(own[0] * 2.0 ** round(np.log2(scale)), own[1], v)[2]
    close({"v": exactly[:, :, 0]}, {"v": want})
    # one key takes all of a row; where logits are rounded otherwise going back, less
    s = np.einsum("bthd,bskd->bhts", *(np.asarray(a, np.float64) for a in (q, k)))
    p = s == s.max(-1, keepdims=True)
    want = np.einsum("bhts,bthv->bsv", p, np.abs(do))
    assert (np.abs(dv)[:, :, 0] <= want + 1e-3).all()


def test_states_of_rows_with_a_constant_merge():
    """The weights of two parts are by how many keys each has, whatever the constant."""
    q, k, v, _ = inputs()

    @jax.jit
    def run(bias):
        parts = [
            state_of(*best(q, k[:, at], v[:, at], bias=bias[..., at], split_lse=True))
            for at in (slice(0, 4), slice(4, S))]
        return output(join(*parts))

    for c in (0.0, -1e10):
        bias = np.full((B, H, T, S), c, np.float32)
        close({"o": run(bias)}, {"o": exact(q, k, v, bias, np.ones((B, T, H, V)))["o"]})


@pytest.mark.parametrize("backend, how", [
    ("tpu", {"tile": 8}), ("triton", {"tile": 16, "splits": 1}),
    ("triton", {"tile": 16, "splits": 2}),
])
def test_a_constant_bias_of_a_cache_changes_nothing(backend, how):
    """Also in parts, with its sums of weights, and where every slot is empty."""
    q, k, v, do = inputs()

    @jax.jit
    def run(bias, sink, lengths):
        return decode(q, k, v, bias=bias, sink=sink, lengths=lengths, statistics=True,
                      backend=backend, interpret=INTERPRET, **how)

    for c, one in ((-1e10, -np.inf), (-1e10, -1e10), (LEAST, -np.inf), (0.0, 1.0)):
        sink = np.array([-np.inf, one], np.float32)
        bias = np.full((B, S, K), c, np.float32)
        full = jnp.full((B,), S, jnp.int32)
        o, _, sums = run(bias, sink, full)
        every = np.broadcast_to(bias[:, None, None, :, 0], (B, H, T, S))
        want = exact(q, k, v, every, np.ones_like(do), sink)
        close({"o": o, "sums": sums.sum()},
              {"o": want["o"], "sums": np.asarray(_weight(q, k, every, sink))})
        o, lse, sums = run(bias, sink, full * 0)
        assert (o == 0).all() and (sums == 0).all()
        np.testing.assert_array_equal(
            lse, np.broadcast_to(sink[None, :, None], (B, H, T)))


def _weight(q, k, bias, sink):
    """The sum of all weights that keys get."""
    ones = np.ones((B, S, K, 1))
    return exact(q, k, ones, bias, np.ones((B, T, H, 1)), sink)["o"].sum()


MEANS = (
    "softmax", "local_normal", "abc", "abc_normal", "aaren", "combiner",
    "combiner_spans", "landmark", "lara", "performer_normal", "probsparse",
)


@pytest.mark.parametrize("name", MEANS)
def test_weights_add_up_to_one_whatever_rounding_does_to_large_logits(name):
    """A product and a difference may be one instruction, which rounds a logit otherwise
    than the largest one was: at 3e10 by so much that weights are infinite, or all 0."""
    q, k, v = laws.inputs()
    do = jax.random.normal(jax.random.key(1), (*q.shape[:3], v.shape[3]))

    def both(q, k, v):
        o, back = jax.vjp(laws.ENTRIES[name].attention, q, k, v)
        return o, back(do)

    # at the level of tests no two operations become one
    usual = {"xla_backend_optimization_level": 3}
    run = jax.jit(both).lower(q, k, v).compile(compiler_options=usual)
    for large in (3e5, -1e6):
        q, k = q.at[..., 0].set(abs(large)), k.at[..., 0].set(large)
        o, grads = run(q, k, jnp.ones_like(v))
        np.testing.assert_allclose(o, 1, rtol=1e-5)
        assert all(jnp.isfinite(a).all() for a in grads)


def test_weights_of_the_matrix_add_up_to_one():
    """As above, of dense attention and its gradients."""
    q, k, v = (jnp.full((1, 16, 2, 8), a) for a in (3e5, 3e5, 1.0))
    usual = {"xla_backend_optimization_level": 3}
    o = jax.jit(lambda *qkv: dense.attend(*qkv)[0], compiler_options=usual)(q, k, v)
    np.testing.assert_allclose(o, 1, rtol=1e-5)
