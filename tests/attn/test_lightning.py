"""Lightning against its definition in float64, its three rules of decay, its limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.lightning import Lightning, slopes

B, T, H, K, D, V = 2, 16, 4, 2, 8, 12
SEGMENTS = np.array([[1] * 5 + [2] * 8 + [0] * 3, [0] * 2 + [1] * 6 + [3] * 8])


def inputs(t=T, seed=0):
    """q, k, v and a cotangent of o."""
    rng = np.random.default_rng(seed)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V), (B, t, H, V)
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def weights(t, s, causal, segments=None):
    """exp(-s_h |t - j|) over what a token sees, [B,H,T,S] float64."""
    at = np.arange(t)
    apart = at[:, None] - at
    # padding stops the clock
    if segments is not None:
        clock = np.cumsum(segments > 0, 1)
        apart = clock[:, :, None] - clock[:, None]
    apart = np.broadcast_to(apart, (B, t, t))
    seen = (apart >= 0) & (at[:, None] >= at) if causal else np.ones_like(apart, bool)
    if segments is not None:
        seen = seen & (segments[..., None] == segments[:, None])
        seen = seen & (segments[:, None] > 0)
    w = np.exp(-s[None, :, None, None] * np.abs(apart)[:, None])
    return np.where(seen[:, None], w, 0)


def definition(q, k, v, w, d_o):
    """o and the gradients of q, k and v, in float64."""
    q, k, v, d_o = (np.asarray(a, np.float64) for a in (q, k, v, d_o))
    k, v = (np.repeat(a, H // K, 2) for a in (k, v))
    p = np.einsum("bthd,bshd->bhts", q, k) * w
    dp = np.einsum("bthv,bshv->bhts", d_o, v) * w
    share = lambda a: a.reshape(B, a.shape[1], K, H // K, -1).sum(3)
    return np.einsum("bhts,bshv->bthv", p, v), (
        np.einsum("bhts,bshd->bthd", dp, k),
        share(np.einsum("bhts,bthd->bshd", dp, q)),
        share(np.einsum("bhts,bthv->bshv", p, d_o)),
    )


def close(a, b, bound=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    assert error <= bound, f"{error:.2e}"


@pytest.mark.parametrize("rule,causal,packed", [
    ("code", True, False), ("paper", True, True), ("fla", False, True),
    ("none", False, True), ("none", False, False), ("none", True, True),
    ("code", False, False),
])
def test_it_is_the_definition(rule, causal, packed):
    q, k, v, d_o = inputs()
    attention = Lightning(slopes=rule, causal=causal, chunk=5)
    segments = jnp.asarray(SEGMENTS, jnp.int32) if packed else None
    w = weights(T, slopes(H, rule), causal, SEGMENTS if packed else None)
    want, grads = definition(q, k, v, w, d_o)

    @jax.jit
    def both(*args):
        o, back = jax.vjp(lambda *a: attention(*a, segments=segments), *args)
        return o, back(jnp.asarray(d_o))

    o, back = both(q, k, v)
    close(o, want)
    for a, b in zip(back, grads):
        close(a, b, 2e-5)


def test_without_decay_queries_may_come_from_elsewhere():
    q, k, v, _ = inputs()
    few, pair = q[:, :5], (SEGMENTS[:, 3:8], SEGMENTS)
    attention = Lightning(slopes="none", causal=False)
    s = np.einsum("bthd,bshd->bhts", few, np.repeat(k, 2, 2).astype(np.float64))
    seen = (pair[0][..., None] == pair[1][:, None]) & (pair[1][:, None] > 0)
    for segments, w in ((None, s), (pair, s * seen[:, None])):
        if segments is not None:
            segments = tuple(jnp.asarray(a, jnp.int32) for a in segments)
        have = attention(few, k, v, segments=segments)
        close(have, np.einsum("bhts,bshv->bthv", w, np.repeat(v, 2, 2)))


def test_slopes_of_the_three_rules():
    np.testing.assert_allclose(slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])
    np.testing.assert_allclose(
        slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    )
    np.testing.assert_allclose(slopes(3), [2**-4, 2**-8, 2**-2])
    np.testing.assert_allclose(slopes(4, "code", 2, 6), slopes(4) * (0.6 + 1e-5))
    np.testing.assert_allclose(slopes(4, "paper", 1, 4), np.array([2, 4, 6, 8]) * 0.75)
    np.testing.assert_allclose(slopes(4, "fla", 1, 4), np.array([0, 2, 4, 6]) * 0.75)
    assert (slopes(4, "none", 1, 4) == 0).all()


def test_the_state_is_that_of_the_recurrence_whatever_the_pieces():
    q, k, v, _ = inputs(t=13)
    attention = Lightning(layer=1, layers=4, scale=0.5, chunk=4)
    whole, o = attention.step(attention.init_state(13, q, k, v), q, k, v)
    close(o, attention(q, k, v))
    s = slopes(H, "code", 1, 4)
    decay = np.exp(-s[None] * np.arange(12, -1, -1)[:, None])
    keys, values = (np.repeat(a, 2, 2).astype(np.float64) for a in (k, v))
    close(whole.memory, np.einsum("bthd,th,bthv->bhdv", keys, decay, values))
    for piece in (1, 4):
        state = attention.init_state(13, q, k, v)
        for at in range(0, 13, piece):
            part = slice(at, at + piece)
            state, o = attention.step(state, q[:, part], k[:, part], v[:, part])
        close(state.memory, whole.memory)
        assert state.end.tolist() == [13, 13]


def test_strong_decay_and_long_context_stay_exact():
    # the paper's rule at T = 1000: head 3 forgets all within a token, scores are large
    q, k, v, d_o = inputs(t=1000)
    attention = Lightning(slopes="paper")
    o = attention(30 * q, k, v)
    close(o, definition(30 * q, k, v, weights(1000, slopes(H, "paper"), True), d_o)[0])


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (
        ({"slopes": "alibi"}, "slopes='alibi': expected one of"),
        ({"layers": 1}, "divides by zero"),
        ({"layer": 2}, "without layers"),
        ({"layer": 4, "layers": 4}, "layer=4: expected 0 to"),
        ({"chunk": 0}, "chunk=0: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            Lightning(**wrong)
    q, k, v, _ = inputs()
    two_sided = Lightning(causal=False)
    with pytest.raises(NotImplementedError, match="step: causal=False"):
        two_sided.init_state(T, q, k, v)
    with pytest.raises(ValueError, match="T must be S"):
        two_sided(q[:, :5], k, v)
    with pytest.raises(NotImplementedError, match="pair of segments"):
        Lightning()(q, k, v, segments=(jnp.asarray(SEGMENTS),) * 2)
    state = Lightning().init_state(T, q, k, v)
    with pytest.raises(ValueError, match="state holds .* expected"):
        Lightning().step(state, q, k, v[..., :3])
    unordered = Lightning(slopes="none", causal=False, implementation="pallas")
    with pytest.raises(NotImplementedError, match="no kernel"):
        unordered(q, k, v)


@pytest.mark.parametrize(
    "rule,packed", [("none", False), ("none", True), ("fla", True)]
)
def test_without_order_sharding_changes_nothing(rule, packed):
    q, k, v, _ = inputs()
    attention = Lightning(slopes=rule, causal=False, chunk=4)
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
