"""Flow against its definition in float64: normal, causal, cross, packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.flow import Flow
from tests.compiled import attend
from tests.laws import SEGMENTS, close, gradients, inputs

EPS = 1e-6


def definition(q, k, v, causal, q_seg=None, kv_seg=None, clamp=1.0):
    """o [B,T,H,V] in float64, sums as matrices of what is seen."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (b, t, h, _), s = q.shape, k.shape[1]
    k, v = (np.repeat(a, h // a.shape[2], 2) for a in (k, v))
    seen = np.ones((b, t, s), bool)
    if q_seg is not None:
        seen = (q_seg[..., None] == kv_seg[:, None]) & (kv_seg[:, None] > 0)
    back, among = seen.swapaxes(1, 2), np.ones((b, s, s), bool)
    if kv_seg is not None:
        among = (kv_seg[..., None] == kv_seg[:, None]) & (kv_seg[:, None] > 0)
    if causal:
        order = np.tril(np.ones((t, s), bool))
        seen, back, among = (a & order for a in (seen, back, among))
    seen, back, among = (a.astype(float) for a in (seen, back, among))
    a, c = (1 / (1 + np.exp(-x)) for x in (q, k))
    flow = lambda of, seen, w: ((of + EPS) * (
        np.einsum("bts,bshd->bthd", seen, w) + EPS)).sum(-1)
    many, few = seen.sum(2)[..., None], back.sum(2)[..., None]
    counts = (lambda n: np.maximum(n, 1)) if causal else np.ones_like
    n_q, n_k = counts(many), counts(few)
    i = flow(a, seen, c) / n_q
    o = flow(c, back, a) / n_k
    taken = flow(a, seen, c / o[..., None]) / n_q
    given = np.clip(flow(c, back, a / i[..., None]) / n_k, -clamp, clamp)
    weight = np.exp(given)
    total = np.einsum("bts,bsh->bth", among, weight)
    share = weight / np.where(total > 0, total, 1) * among.sum(2)[..., None]
    ratio = 1.0
    if not causal:
        alike = np.ones((b, t, t)) if q_seg is None else (
            (q_seg[..., None] == q_seg[:, None]) & (q_seg[:, None] > 0)).astype(float)
        ratio = alike.sum(2)[..., None] / np.maximum(many, 1)
    pairs = np.einsum("bthd,bshd->bths", a, c) * seen[:, :, None]
    y = np.einsum("bths,bshv->bthv", pairs, v * share[..., None])
    return y / (i * n_q)[..., None] / (1 + np.exp(-taken * ratio))[..., None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_it_is_the_definition(causal, packed):
    q, k, v = inputs()
    attention, seg = Flow(causal=causal, chunk=5), SEGMENTS if packed else None
    segments = jnp.asarray(SEGMENTS) if packed else None
    o = jax.jit(lambda *a: attention(*a, segments=segments))(2 * q, 2 * k, v)
    close(o, definition(2 * q, 2 * k, v, causal, seg, seg))


def test_queries_may_come_from_elsewhere():
    q, k, v = inputs()
    pair = SEGMENTS[:, 3:8], SEGMENTS
    for segments in (None, pair):
        more = (None, None) if segments is None else segments
        as_jax = None if segments is None else tuple(map(jnp.asarray, pair))
        o = attend(Flow(causal=False), q[:, :5], k, v, segments=as_jax)
        close(o, definition(q[:, :5], k, v, False, *more))


def test_gradients_are_those_of_the_definition():
    q, k, v = inputs(t=7)
    for causal in (True, False):
        f = Flow(causal=causal, clamp=5.0, chunk=3)
        w = np.asarray(jax.random.normal(jax.random.key(9), (2, 7, 4, 12)), np.float64)
        scalar = lambda *a: (w * definition(*a, causal, clamp=5.0)).sum()
        rng = np.random.default_rng(0)
        away = [rng.normal(size=a.shape) for a in (q, k, v)]
        at = [np.asarray(a, np.float64) for a in (q, k, v)]
        step = lambda e: scalar(*(a + e * d for a, d in zip(at, away)))
        slope = (step(1e-5) - step(-1e-5)) / 2e-5
        found = sum((np.asarray(g, np.float64) * d).sum()
                    for g, d in zip(gradients(f, q, k, v), away))
        assert abs(found - slope) <= 2e-5 * abs(slope) + 1e-5


def test_without_competition_and_allocation_it_is_linear_attention():
    q, k, v = inputs()
    a, c = (np.asarray(jax.nn.sigmoid(x), np.float64) for x in (q, k))
    c, w = (np.repeat(x, 2, 2) for x in (c, np.asarray(v, np.float64)))
    pairs = np.einsum("bthd,bshd->bhts", a, c)
    for causal in (True, False):
        p = np.tril(pairs) if causal else pairs
        want = np.einsum("bhts,bshv->bthv", p / p.sum(-1, keepdims=True), w)
        flow = Flow(causal=causal, compete=False, allocate=False, eps=1e-9)
        o = attend(flow, q, k, v)
        close(o, want)


def test_competition_is_frozen_and_causal_is_not_the_masked_normal_form():
    q, k, v = inputs()
    normal = attend(Flow(causal=False), q, k, v)
    ordered = attend(Flow(), q, k, v)
    assert np.abs(normal[:, -1] - ordered[:, -1]).max() > 1e-3
    close(attend(Flow(), q[:, :9], k[:, :9], v[:, :9]), ordered[:, :9])


def test_thousands_of_tokens_stay_finite_and_padding_alone_is_nothing():
    q, k, v = inputs(t=3000, b=1)
    assert np.isfinite(attend(Flow(), 30 * q, 30 * k, v)).all()
    none = jnp.zeros((1, 3000), jnp.int32)
    for causal in (True, False):
        o = attend(Flow(causal=causal), q, k, v, segments=none)
        assert (o == 0).all()


def test_without_order_sharding_changes_nothing():
    q, k, v = inputs()
    segments = jnp.asarray(SEGMENTS)
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "seq", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    for seg in (None, segments):
        f = lambda axis: jax.jit(jax.value_and_grad(lambda *a: (Flow(
            causal=False, axis=axis)(*a, segments=seg) ** 2).sum(), (0, 1, 2)))
        want = f(None)(q, k, v)
        with jax.set_mesh(mesh):
            have = f("seq")(q, k, v)
        for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
            close(a, b, "gradient")


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (
        ({"clamp": 0}, "clamp=0"), ({"clamp": 99}, "clamp=99"), ({"eps": 0}, "eps=0"),
        ({"feature": "elu"}, "feature='elu'"), ({"chunk": 0}, "chunk=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Flow(**wrong)
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="causal=False"):
        Flow(causal=False).init_state(4, q, k, v)
    with pytest.raises(ValueError, match="T must be S"):
        Flow()(q[:, :5], k, v)
    state = Flow().init_state(4, q, k, v)
    with pytest.raises(ValueError, match="state holds memory"):
        Flow().step(state, q, k, v[..., :3])
