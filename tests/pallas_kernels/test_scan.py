"""The kernels of the scan are the recurrence, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract import dispatch
from attn.exact.online import OnlineSoftmax
from attn.recurrent.scan import empty, prefix_softmax
from pallas_kernels import Refused
from pallas_kernels.scan.api import scan
from experiments.measure import cost
from tests.on_device import INTERPRET
from tests.oracles.linear import close
from tests.attn.recurrent.test_scan import B, H, K, RUNS, V, check, inputs

BACKENDS = ("tpu", "triton")
KERNEL = pytest.mark.parametrize("backend", BACKENDS)


def kernel(backend, segment=None, chunk=16, dtype=jnp.float32):
    """f(scores, v, state) -> (state, o)."""
    def f(s, v, state):
        last, o = scan(s, v, tuple(state), segment=segment, chunk=chunk, dtype=dtype,
                       backend=backend, interpret=INTERPRET)
        return OnlineSoftmax(*last), o

    return f


@KERNEL
@pytest.mark.parametrize("t", [1, 37])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["none", "wide"])
def test_it_is_the_recurrence(kind, packed, t, backend):
    given = inputs(t, state=kind != "none", scale=30.0 if kind == "wide" else 1.0)
    segment = np.array(RUNS[t] if packed else np.ones((B, t)), np.int32)
    check(kernel(backend, jnp.asarray(segment) if packed else None), given, segment)


@KERNEL
@pytest.mark.parametrize("h, k, v", [(4, 1, 16), (4, 4, 40), (3, 3, 136)])
def test_heads_and_widths(h, k, v, backend):
    given = inputs(21, h=h, k=k, width=v)
    check(kernel(backend), given, np.ones((B, 21), int))


@KERNEL
def test_scores_of_any_size(backend):
    s, v, *_ = inputs(37, state=False)
    before, f = empty(B, H, V), jax.jit(kernel(backend))
    plain = jax.jit(lambda s: prefix_softmax(s, v, implementation="xla")[1])
    for size in (1e4, 1e30):
        o = f(s * size, v, before)[1]
        close(o, plain(s * size))
    steps = 40 * np.arange(37, dtype=np.float32)[None, :, None] * np.ones_like(s)
    do = jnp.asarray(inputs(37)[3])

    @functools.partial(jax.jit, static_argnums=0)
    def pull(g, s):
        o, back = jax.vjp(lambda s, v: g(s, v)[1], s, jnp.asarray(v))
        return o, *back(do)

    ours = lambda s, v: kernel(backend)(s, v, before)
    other = lambda s, v: prefix_softmax(s, v, implementation="xla")
    for ramp in (steps - 500, -steps):
        ramp = jnp.asarray(ramp, jnp.float32)
        have, want = (pull(g, ramp)[1:] for g in (ours, other))
        # exact where the greatest score is in the chunk, else to float32's rounding
        for a, b in zip(have, want):
            assert np.abs(a - b).max() <= (1e-6 if ramp[0, 1, 0] > ramp[0, 0, 0] else
                                           1e-6 * 2 * V) * np.abs(b).max() + 1e-5
    hidden = jnp.where(jnp.arange(37)[None, :, None] < 20, -jnp.inf, s)
    o, *grads = pull(ours, hidden)
    assert (np.asarray(o)[:, :20] == 0).all()
    for a in grads:
        assert np.isfinite(a).all() and (np.asarray(a)[:, :20] == 0).all()


@KERNEL
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype, backend):
    s, v, state, d_o, d_state = inputs(37)
    low, state, back_o = v.astype(dtype), OnlineSoftmax(*state), d_o.astype(dtype)
    f = kernel(backend, dtype=dtype)
    g = lambda s, v, state: prefix_softmax(s, v, state=state, implementation="xla")

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, v, d_o):
        out, back = jax.vjp(f, s, v, state)
        return out, back((OnlineSoftmax(*d_state), d_o))

    (last, o), have = both(f, jnp.asarray(low), back_o)
    (exact, want), grads = both(g, jnp.asarray(low, jnp.float32),
                                back_o.astype(jnp.float32))
    assert o.dtype == dtype
    unit = float(jnp.finfo(dtype).eps)
    close(o, want, unit)
    for a, b in zip(last, exact):
        close(a, b, 1e-5)  # the sums are those of float32
    assert have[1].dtype == dtype
    close(have[0], grads[0], 2e-5)
    close(have[1], grads[1], unit)
    for a, b in zip(have[2][1:], grads[2][1:]):
        close(a, b, 2e-5)


@KERNEL
def test_twice_is_the_same(backend):
    s, v, state, d_o, d_state = inputs(37)
    segment = jnp.asarray(RUNS[37], jnp.int32)

    @jax.jit
    def both(*args):
        out, back = jax.vjp(kernel(backend, segment), *args)
        return out, back((OnlineSoftmax(*d_state), d_o))

    one, two = (both(s, v, OnlineSoftmax(*state)) for _ in range(2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize("platform", ("tpu", "gpu"))
def test_it_is_picked(platform, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    s, v, state, *_ = inputs(37)
    f = functools.partial(prefix_softmax, s, v, state=OnlineSoftmax(*state))
    have, want = f(implementation="pallas"), f(implementation="xla")
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
        close(a, b)
    g = lambda s: prefix_softmax(s, v, implementation="pallas")
    assert "pallas_call" in str(jax.make_jaxpr(g)(s))


@KERNEL
def test_the_cost_is_linear(backend):
    f = lambda s, v: (scan(s, v, tuple(empty(1, H, V)), backend=backend,
                           interpret=INTERPRET)[1] ** 2).sum()
    both = jax.grad(f, (0, 1))
    one = lambda t: (jnp.zeros((1, t, H)), jnp.zeros((1, t, K, V)))
    shapes = [jax.eval_shape(functools.partial(one, t)) for t in (2048, 4096, 8192)]
    assert abs(cost.slope([cost.flops(both, *s) for s in shapes]) - 1) < 0.05


@KERNEL
def test_refusals(backend):
    s, v, *_ = inputs(5, width=257)
    with pytest.raises(Refused, match="V=257: at most 256"):
        scan(s, v, tuple(empty(B, H, 257)), backend=backend)
    with pytest.raises(Refused, match="int32"):
        scan(s, v.astype(np.int32), tuple(empty(B, H, 257)), backend=backend)
    low = jnp.zeros((B, 5, K, 16), jnp.float16)
    if backend == "tpu":
        with pytest.raises(Refused, match="float16"):
            scan(s, low, tuple(empty(B, H, 16)), backend=backend)
