"""Scans against their recurrences in float64, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.exact.online import OnlineSoftmax
from attn.parallel.sharding import over_mesh
from attn.recurrent.scan import (
    empty, merge, prefix_scan, prefix_softmax, total
)
from experiments.measure import cost
from tests.oracles.linear import close

B, H, K, V = 2, 4, 2, 12
GRADIENT = 1.5e-5
RUNS = {
    37: [[1] * 9 + [0] * 3 + [1] * 4 + [17] * 20 + [0], [0] * 4 + [5] * 9 + [14] * 24],
    16: [[1] * 5 + [6] * 8 + [0] * 3, [0] * 2 + [1] * 6 + [7] * 8],
    1: [[1], [0]],
}


def recurrence(s, v, state, segment, d_o, d_state):
    """(state, o) and the gradients of sum(o d_o) + du u + dw w, in float64: of s, v,
    and u and w of the state."""
    s, v, d_o = (np.asarray(a, np.float64) for a in (s, v, d_o))
    (b, t, h), copies = s.shape, s.shape[2] // v.shape[2]
    v = np.repeat(v, copies, 2)
    m, u, w = (np.asarray(a, np.float64).copy() for a in state)
    m0, (_, du, dw) = m.copy(), (np.asarray(a, np.float64) for a in d_state)
    present = np.ones(b, int)
    o, ds, dv = np.zeros_like(d_o), np.zeros_like(s), np.zeros_like(v)
    du0, dw0 = np.zeros_like(u), np.zeros_like(w)
    carried = np.ones(b, bool)
    seen = [[] for _ in range(b)]

    def spread(n, gu, gw):
        """The gradient of u and w [H], as they are now, of row n."""
        safe = np.where(np.isinf(m[n]), 0, m[n])
        for i in seen[n]:
            e = np.exp(s[n, i] - safe)
            ds[n, i] += e * (gu + (gw * v[n, i]).sum(-1))
            dv[n, i] += e[:, None] * gw
        if carried[n]:
            e = np.exp(m0[n] - safe)
            du0[n] += e * gu
            dw0[n] += e[:, None] * gw

    for i in range(t):
        for n in range(b):
            if not segment[n, i]:
                continue
            if segment[n, i] != present[n]:
                m[n], u[n], w[n] = -np.inf, 0, 0
                seen[n], carried[n] = [], False
            present[n] = segment[n, i]
            new = np.maximum(m[n], s[n, i])
            decay, mine = np.exp(m[n] - new), np.exp(s[n, i] - new)
            u[n] = u[n] * decay + mine
            w[n] = w[n] * decay[:, None] + v[n, i] * mine[:, None]
            m[n] = new
            seen[n].append(i)
            o[n, i] = w[n] / u[n][:, None]
            g = d_o[n, i] / u[n][:, None]
            spread(n, -(g * o[n, i]).sum(-1), g)
    for n in range(b):
        spread(n, du[n], dw[n])
    dv = dv.reshape(b, t, h // copies, copies, -1).sum(3)
    return ((m, u, w), o), (ds, dv, du0, dw0)


def inputs(t, seed=0, scale=1.0, offset=0.0, h=H, k=K, width=V, state=True):
    """scores, v, state, d_o, d_state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    before = tuple(np.asarray(a) for a in empty(B, h, width))
    if state:
        size = np.abs(normal(B, h)) + 1
        before = offset + scale * normal(B, h), size, normal(B, h, width) * size.mean()
    after = np.zeros((B, h), np.float32), normal(B, h), normal(B, h, width)
    return (offset + scale * normal(B, t, h), normal(B, t, k, width), before,
            normal(B, t, h, width), after)


def check(f, given, segment, bound=2e-6, gradient=GRADIENT):
    """f(scores, v, state) -> (state, o) and its gradients against the recurrence."""
    s, v, state, d_o, d_state = given
    want, grads = recurrence(s, v, state, segment, d_o, d_state)

    @jax.jit
    def both(*given):
        out, back = jax.vjp(f, *given)
        return out, back((OnlineSoftmax(*d_state), d_o))

    out, back = both(s, v, OnlineSoftmax(*state))
    (m, u, w), o = out
    finite = np.isfinite(want[0][0])
    assert (np.isfinite(m) == finite).all() and np.isfinite(o).all()
    close(np.where(finite, m, 0), np.where(finite, want[0][0], 0), bound)
    for a, b in ((u, want[0][1]), (w, want[0][2]), (o, want[1])):
        close(a, b, bound)
    assert (np.asarray(back[2].m) == 0).all()
    for a, b in zip((back[0], back[1], back[2].l, back[2].acc), grads):
        close(a, b, gradient)


@pytest.mark.parametrize("t", [1, 37])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["none", "carried", "wide"])
def test_it_is_the_recurrence(kind, packed, t):
    given = inputs(t, state=kind != "none", scale=30.0 if kind == "wide" else 1.0)
    segment = np.array(RUNS[t] if packed else np.ones((B, t)), np.int32)
    for chunk in (16, 64) if t > 1 else (64,):
        f = functools.partial(
            prefix_softmax, segment=segment if packed else None, chunk=chunk)
        check(lambda s, v, state: f(s, v, state=state), given, segment)


def test_scores_of_any_size_are_safe():
    s, v, *rest = inputs(37)
    f = jax.jit(prefix_softmax)
    for size in (1e4, -1e4, 1e30, -1e30):
        o = f(s * size, v)[1]
        assert np.isfinite(o).all()
    # differences near 1000 are rounded to 6e-5, in the input, not here
    large = np.float32(1000) + 2 * np.round(s * 1024) / 1024
    check(lambda s, v, state: prefix_softmax(s, v, state=state, chunk=16),
          (large, v, *inputs(37, offset=1000.0)[2:]), np.ones((B, 37), int))
    ramp = np.broadcast_to(-500 + 40 * np.arange(37)[None, :, None], s.shape)
    check(lambda s, v, state: prefix_softmax(s, v, state=state, chunk=16),
          (ramp.astype(np.float32), v, *rest), np.ones((B, 37), int))


def test_minus_infinity_is_padding():
    s, v, _, d_o, _ = inputs(16, state=False)
    segment = np.array(RUNS[16], np.int32) > 0
    hidden = jnp.where(segment[..., None], s, -jnp.inf)

    @jax.jit
    def both(s):
        o, back = jax.vjp(lambda s, v: prefix_softmax(s, v, chunk=8)[1], s, v)
        return o, *back(d_o)

    o, *grads = both(hidden)
    f = jax.jit(lambda *a: prefix_softmax(*a[:2], segment=a[2])[1])
    want = f(s, v, segment.astype(np.int32))
    close(np.where(segment[..., None, None], o, 0), want)
    for a in (o, *grads):
        assert np.isfinite(a).all()
    nothing, ds, _ = both(jnp.full_like(s, -jnp.inf))
    assert (np.asarray(nothing) == 0).all() and (np.asarray(ds) == 0).all()


def test_low_precision():
    s, v, _, d_o, _ = inputs(37)
    low = jnp.asarray(v, jnp.bfloat16)

    @jax.jit
    def both(v):
        f = lambda v: prefix_softmax(s, v, dtype=jnp.bfloat16)[1]
        o, back = jax.vjp(f, v)
        return o, *back(d_o.astype(o.dtype)), prefix_softmax(s, v)[1]

    o, dv, exact = both(low)
    assert o.dtype == jnp.bfloat16 and dv.dtype == low.dtype
    close(o, exact, 4e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_any_operator_scans(packed):
    s, v, state, *_ = inputs(37, h=K)
    segment = jnp.asarray(RUNS[37], jnp.int32) if packed else None
    leaves = OnlineSoftmax(jnp.asarray(s), jnp.ones_like(s), jnp.asarray(v))
    if packed:
        leaves = jax.tree.map(lambda a, e: jnp.where(
            segment.reshape(B, 37, *[1] * (a.ndim - 2)) > 0, a, e[:, None]), leaves,
            empty(B, K, V))

    @jax.jit
    def each(before):
        how = {"state": before, "segment": segment}
        return prefix_scan(merge, leaves, chunk=8, **how), prefix_softmax(s, v, **how)

    for before in (None, OnlineSoftmax(*state)):
        (last, found), want = each(before)
        o = found.acc / jnp.where(found.l > 0, found.l, 1)[..., None]
        real = np.ones((B, 37), bool) if segment is None else np.asarray(segment) > 0
        close(np.where(real[..., None, None], o, 0), want[1])
        for a, b in zip(last, want[0]):
            close(a, b)
    # products of matrices do not commute
    a = jnp.asarray(np.random.default_rng(1).normal(size=(B, 37, 3, 3)) / 2)
    product = lambda a, b: jnp.einsum("...ij,...jk->...ik", a, b)
    last, found = jax.jit(
        lambda a: prefix_scan(product, a, segment=segment, chunk=8))(a)
    row, rows = np.eye(3), np.ones(37) if segment is None else np.asarray(segment)[1]
    at = 1
    for i in range(37):
        row = np.eye(3) if rows[i] not in (0, at) else row
        at = rows[i] or at
        row = row @ np.asarray(a[1, i], np.float64) if rows[i] else row
        if rows[:i + 1].any():
            close(found[1, i], row)
    close(last[1], row)


def mesh(sizes=(1, 4, 2)):
    return jax.make_mesh(
        sizes, ("data", "seq", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_mesh_changes_nothing(packed):
    s, v, _, d_o, _ = inputs(16)
    segment = jnp.asarray(RUNS[16] if packed else np.ones((B, 16)), jnp.int32)
    f = lambda axis: lambda s, v, segment: prefix_softmax(
        s, v, segment=segment if packed else None, chunk=2, axis=axis)[1]
    leaves = lambda s, v: OnlineSoftmax(s, jnp.ones_like(s), jnp.repeat(v, H // K, 2))
    tree = lambda axis: lambda s, v, segment: prefix_scan(
        merge, leaves(s, v), segment=segment, chunk=2, axis=axis)[1].acc
    for form in (f, tree):
        out = lambda g: jax.jit(lambda s, v: (lambda o, b: (o, *b(d_o)))(
            *jax.vjp(lambda s, v: g(s, v, segment), s, v)))(s, v)
        want = out(form(None))
        with jax.set_mesh(mesh()):
            have = out(over_mesh(form("seq"), "BTH BTKV BT -> BTHV", "seq"))
        real = np.asarray(segment)[..., None, None] > 0
        close(np.where(real, have[0], 0), np.where(real, want[0], 0))
        if form is f:
            for a, b in zip(have[1:], want[1:]):
                close(a, b, GRADIENT)


@pytest.mark.parametrize("packed", [False, True])
def test_one_state_crosses_the_mesh(packed):
    s, v, *_ = inputs(16)
    segment = jnp.asarray(RUNS[16], jnp.int32)
    f = lambda s, v: prefix_softmax(
        s, v, segment=segment[:, :s.shape[1]] if packed else None, axis="seq", chunk=2
    )[1]
    with jax.set_mesh(mesh()):
        g = over_mesh(f, "BTH BTKV -> BTHV", "seq")
        loss = lambda s, v: (g(s, v) ** 2).sum()
        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(s, v))
    assert text.count("all_gather[") == 2  # forward and backward
    assert "psum[" not in text and "reduce_scatter[" not in text


def test_all_tokens_at_once():
    s, v, _, d_o, d_state = inputs(37)
    segment = jnp.asarray(RUNS[37], jnp.int32)
    for r in (None, segment):
        f = lambda s, v: prefix_softmax(s, v, segment=r, state=empty(B, H, V))[0]
        g = functools.partial(total, segment=r)
        for a, b in zip(f(s, v), g(s, v)):
            close(a, b)
        ct = OnlineSoftmax(*d_state)
        for a, b in zip(*(jax.vjp(x, s, v)[1](ct) for x in (f, g))):
            close(a, b, GRADIENT)


def test_the_cost_is_linear():
    f = lambda s, v: (prefix_softmax(s, v)[1] ** 2).sum()
    both = jax.grad(f, (0, 1))
    one = lambda t: (jnp.zeros((1, t, H)), jnp.zeros((1, t, K, V)))
    shapes = [jax.eval_shape(functools.partial(one, t)) for t in (2048, 4096, 8192)]
    assert abs(cost.slope([cost.flops(both, *s) for s in shapes]) - 1) < 0.05
    assert cost.slope([cost.memory(both, *s) for s in shapes]) < 1.1


def test_wrong_calls():
    s, v, *_ = inputs(7)
    for message, call in {
        r"\[B,T,H\]": lambda: prefix_softmax(s[..., 0], v),
        "multiple of K": lambda: prefix_softmax(s[..., :3], v),
        "chunk=0": lambda: prefix_softmax(s, v, chunk=0),
        "segment has": lambda: prefix_softmax(
            s, v, segment=jnp.ones((B, 3), jnp.int32)
        ),
        "state holds": lambda: prefix_softmax(s, v, state=empty(B, H, V + 1)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
