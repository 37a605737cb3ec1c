"""Based against its definition in float64, its feature map, its state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.based import Based, features
from attn.layers import MultiHead
from attn.recurrent.linear import LinearState
from attn.softmax import Softmax

B, T, H, K, D, V = 2, 16, 4, 2, 6, 5
SEGMENTS = np.array([[1] * 5 + [2] * 8 + [0] * 3, [0] * 2 + [1] * 6 + [3] * 8])


def inputs(t=T, seed=0):
    """q, k, v and a cotangent of o."""
    rng = np.random.default_rng(seed)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V), (B, t, H, V)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def sees(causal, segments=None, t=T):
    """[B,1,T,T] booleans."""
    seen = np.tril(np.ones((B, t, t), bool)) if causal else np.ones((B, t, t), bool)
    if segments is not None:
        seen &= (segments[..., None] == segments[:, None]) & (segments[:, None] > 0)
    return seen[:, None]


def definition(q, k, v, seen, d_o, normalize=True):
    """o and the gradients of q, k and v, in float64."""
    q, k, v, d_o = (np.asarray(a, np.float64) for a in (q, k, v, d_o))
    k, v = (np.repeat(a, H // K, 2) for a in (k, v))
    s = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D)
    w = np.where(seen, 1 + s + s * s / 2, 0)
    total = w.sum(-1, keepdims=True) if normalize else np.ones_like(w[..., :1])
    total = np.where(total > 0, total, 1)
    p = w / total
    dp = np.einsum("bthv,bshv->bhts", d_o, v)
    if normalize:
        dp = dp - (dp * p).sum(-1, keepdims=True)
    ds = np.where(seen, dp / total * (1 + s), 0) / np.sqrt(D)
    share = lambda a: a.reshape(B, a.shape[1], K, H // K, -1).sum(3)
    return np.einsum("bhts,bshv->bthv", p, v), (
        np.einsum("bhts,bshd->bthd", ds, k),
        share(np.einsum("bhts,bthd->bshd", ds, q)),
        share(np.einsum("bhts,bthv->bshv", p, d_o)),
    )


def close(a, b, bound=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    assert error <= bound, f"{error:.2e}"


@pytest.mark.parametrize("settings,packed", [
    ({}, False), ({}, True), ({"compact": True}, True), ({"normalize": False}, True),
    ({"causal": False}, False), ({"causal": False, "compact": True}, True),
])
def test_it_is_the_definition(settings, packed):
    q, k, v, d_o = inputs()
    attention = Based(chunk=5, **settings)
    segments = jnp.asarray(SEGMENTS, jnp.int32) if packed else None
    seen = sees(attention.causal, SEGMENTS if packed else None)
    want, grads = definition(q, k, v, seen, d_o, attention.normalize)

    @jax.jit
    def both(*args):
        o, back = jax.vjp(lambda *a: attention(*a, segments=segments), *args)
        return o, back(jnp.asarray(d_o))

    o, back = both(q, k, v)
    close(o, want)
    for a, b in zip(back, grads):
        close(a, b, 2e-5)


def test_queries_may_come_from_elsewhere():
    q, k, v, d_o = inputs()
    some, attention = slice(3, 8), Based(causal=False, chunk=4)
    pair = SEGMENTS[:, some], SEGMENTS
    for segments, seen in ((None, sees(False)), (pair, sees(False, SEGMENTS))):
        want = definition(q[:, some], k, v, seen[:, :, some], d_o[:, some])[0]
        if segments is not None:
            segments = tuple(jnp.asarray(a, jnp.int32) for a in segments)
        close(attention(q[:, some], k, v, segments=segments), want)


def test_both_feature_maps_have_the_inner_product_of_the_expansion():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(3, D)), jnp.float32) for _ in range(2))
    s = (x * y).sum(-1) / D**0.5
    for compact, width in ((False, 1 + D + D * D), (True, 1 + D + D * (D + 1) // 2)):
        phi = features(x, compact), features(y, compact)
        assert phi[0].shape == (3, width)
        close((phi[0] * phi[1]).sum(-1), 1 + s + s * s / 2)
    close(features(x)[:, 1 + D:], jnp.einsum("na,nb->nab", x, x).reshape(3, -1)
          / (2 * D) ** 0.5)


@pytest.mark.parametrize("settings", [{}, {"compact": True}, {"normalize": False}])
def test_the_state_is_the_two_sums_whatever_the_pieces(settings):
    q, k, v, _ = inputs(t=13)
    attention = Based(chunk=4, **settings)
    phi = np.repeat(features(jnp.asarray(k), attention.compact), H // K, 2)
    values = np.repeat(v, H // K, 2)
    if attention.normalize:
        values = np.concatenate([values, np.ones_like(values[..., :1])], -1)
    want = np.einsum("bthp,bthv->bhpv", np.asarray(phi, np.float64), values)
    for piece in (1, 4, 13):
        state, outs = attention.init_state(13, q, k, v), []
        for at in range(0, 13, piece):
            part = slice(at, at + piece)
            state, o = attention.step(state, q[:, part], k[:, part], v[:, part])
            outs.append(o)
        assert isinstance(state, LinearState) and state.end.tolist() == [13, 13]
        close(state.memory, want)
        close(jnp.concatenate(outs, 1), attention(q, k, v))


def test_for_small_scores_it_is_softmax():
    # the third-order term is what is left: it falls with the cube of the scores
    q, k, v, _ = inputs()
    gap = [
        np.linalg.norm(Based()(q * f, k, v) - Softmax()(q * f, k, v))
        for f in (0.1, 0.05)
    ]
    assert 7 < gap[0] / gap[1] < 9, gap


def test_the_layer_asks_for_narrow_queries():
    x = jnp.zeros((1, 4, 128))
    layer = MultiHead(Based(feature_dim=16), heads=2)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert shapes["q"]["kernel"].shape == (128, 2, 16)
    assert shapes["v"]["kernel"].shape == (128, 2, 64)


@pytest.mark.parametrize("packed", [False, True])
def test_without_order_sharding_changes_nothing(packed):
    q, k, v, _ = inputs()
    attention = Based(causal=False, chunk=4)
    segments = jnp.asarray(SEGMENTS, jnp.int32) if packed else None
    loss = lambda attention: jax.jit(jax.value_and_grad(
        lambda *a: (attention(*a, segments=segments) ** 2).sum(), (0, 1, 2)
    ))
    want = loss(attention)(q, k, v)
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "seq", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    with jax.set_mesh(mesh):
        have = loss(dataclasses.replace(attention, axis="seq"))(q, k, v)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
        close(a, b, 2e-5)


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (
        ({"chunk": 0}, "chunk=0: expected"), ({"eps": -1.0}, "eps=-1.0: expected"),
        ({"feature_dim": 0}, "feature_dim=0: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            Based(**wrong)
    q, k, v, _ = inputs()
    with pytest.raises(NotImplementedError, match="step: causal=False"):
        Based(causal=False).init_state(T, q, k, v)
    with pytest.raises(NotImplementedError, match="pair of segments"):
        Based()(q, k, v, segments=(jnp.asarray(SEGMENTS),) * 2)
    state = Based().init_state(T, q, k, v)
    with pytest.raises(ValueError, match="state holds .* expected"):
        Based(compact=True).step(state, q, k, v)
    with pytest.raises(NotImplementedError, match="no kernel"):
        Based(implementation="pallas")(q, k, v)
