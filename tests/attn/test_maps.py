"""Maps: what is read off weights and features, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import maps

B, N, T = 2, 3, 7
SEEN = np.tril(np.ones((T, T), bool))


def weights(dtype=np.float32):
    e = np.exp(np.random.default_rng(0).standard_normal((B, N, T, T))) * SEEN
    return (e / e.sum(-1, keepdims=True)).astype(dtype)


def test_rows_say_what_they_look_at():
    p = weights(np.float64)
    p[:, :, 2] = 0  # a row that sees nothing
    p[:, :, 5, [1, 3]] = 0.9  # of equals the first
    found = np.asarray(maps.argmax(jnp.asarray(p, jnp.float32)))
    want = p.argmax(-1)
    want[:, :, 2] = -1
    np.testing.assert_array_equal(found, want)
    best = np.asarray(maps.top(jnp.asarray(p, jnp.float32), 3))
    np.testing.assert_array_equal(best[..., 0], want)
    assert (best[:, :, 0, 1:] == -1).all() and (best[:, :, 2] == -1).all()
    with pytest.raises(ValueError, match="k=8: expected 1 to 7, the number of keys"):
        maps.top(jnp.asarray(p), 8)


def test_entropy_and_its_gradient():
    p = weights(np.float64)
    logs = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(maps.entropy(jnp.asarray(p, jnp.float32)),
                               -(p * logs).sum(-1), rtol=1e-5, atol=1e-6)
    one, even = jnp.eye(4)[None, None], jnp.full((1, 1, 1, 4), 0.25)
    assert (maps.entropy(one) == 0).all()
    np.testing.assert_allclose(maps.entropy(even), np.log(4), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda a: maps.entropy(a).sum())(one)).all()


def test_what_keys_receive():
    p = weights(np.float64)
    a, seen = jnp.asarray(p, jnp.float32), jnp.asarray(SEEN)
    np.testing.assert_allclose(maps.column_sums(a)[:, :, 0], p.sum(2), rtol=1e-5)
    # a_h(t), with 1/(N - t) from 0 on
    np.testing.assert_allclose(maps.received(a, seen), p.sum(2) / np.arange(T, 0, -1),
                               rtol=1e-5)
    nobody = seen.at[:, 3].set(False)
    assert (maps.received(a.at[..., 3].set(0), nobody)[..., 3] == 0).all()
    rows = jnp.arange(2, T)
    want = p[:, :, np.arange(2, T), np.arange(T - 2)].mean(-1)
    np.testing.assert_allclose(maps.at_distance(a, 2, rows), want, rtol=1e-5)


def test_two_maps_share_what_both_have():
    a, b = jnp.asarray(weights()), jnp.asarray(weights()[:, ::-1])
    np.testing.assert_allclose(maps.overlap(a, a), 1, rtol=1e-5)
    np.testing.assert_allclose(maps.overlap(a, b), np.minimum(a, b).sum(-1), rtol=1e-5)


def test_cosines_and_vectors_of_zeros():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 5, 4))
    a[2] = 0
    size = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    want = np.where(size > 0, a @ b.T / np.where(size > 0, size, 1), 0)
    x, y = (jnp.asarray(m, jnp.float32) for m in (a, b))
    np.testing.assert_allclose(maps.cosine(x, y), want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(jax.grad(lambda m: maps.cosine(m, y).sum())(x)).all()


def test_clusters_are_found():
    rng = np.random.default_rng(2)
    centres = np.eye(3, 6) * 4
    of = np.arange(12) % 3
    x = jnp.asarray(centres[of] + 0.1 * rng.standard_normal((12, 6)), jnp.float32)
    far = np.asarray(maps.spread_out(x, 3))
    assert sorted(np.abs(far).argmax(1)) == [0, 1, 2]
    found, middle = jax.jit(lambda a: maps.cluster(a, 3))(x)
    assert len({(int(a), int(b)) for a, b in zip(of, found)}) == 3
    np.testing.assert_allclose(np.linalg.norm(middle, axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="clusters=13: expected 1 to 12"):
        maps.cluster(x, 13)
