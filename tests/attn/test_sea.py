"""SEA: which keys columns stand for, by loops; padding; the estimate learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attn.masks import Full
from attn.sea import SEA
from attn.sparse import estimated, favor
from attn.sparse.column_decoder import area
from attn.softmax import Softmax
from tests.compiled import apply, init
from tests.laws import close, inputs

SMALL = SEA(columns=16, keep=3, length=64)


def test_columns_stand_for_the_keys_that_the_formula_says():
    """Lists made by prefix sums against the mask of all pairs."""
    rng = np.random.default_rng(0)
    heads, columns = 3, 8
    for length in (1, 2, 5, 8, 9, 31, 100):
        chosen = jnp.asarray(rng.random((heads, columns)) < 0.4)
        most = heads * length
        found = jax.jit(estimated.kept, static_argnums=2)(
            chosen, jnp.int32(length), most)
        there = np.asarray(found.there)
        pairs = set(zip(np.asarray(found.head)[there].tolist(),
                        np.asarray(found.rank)[there].tolist()))
        assert len(pairs) == there.sum()
        at = np.floor(np.float32(columns) * (np.arange(length, dtype=np.float32) + 0.5)
                      / length - 1e-4).astype(int).clip(0)
        want = {(h, j) for h, j in np.ndindex(heads, length) if chosen[h, at[j]]}
        assert pairs == want, length


@pytest.mark.parametrize("heads, columns, keep", [(4, 16, 3), (2, 128, 7), (1, 8, 1)])
def test_there_is_room_for_all_that_a_row_can_keep(heads, columns, keep):
    for length in (1, 7, 16, 50, 300):
        most = estimated.most_kept(length, heads, columns, keep)
        n = estimated.number_selected(jnp.int32(length), heads, columns, keep)
        edges = estimated.first_rank(
            jnp.arange(columns + 1, dtype=jnp.int32), jnp.int32(length), columns)
        wide = np.sort(np.tile(np.diff(edges), heads))[::-1]
        assert wide[:int(n)].sum() <= most <= heads * length + columns
        assert edges[0] == 0 and edges[-1] == length


def dense(module, q, k, v, valid=None):
    """The same by the mask of all pairs, of the module's own estimate."""
    b, t, h, _ = q.shape
    valid = jnp.ones((b, t), bool) if valid is None else valid
    estimate, _ = module._estimate(q, k, v, valid, None)
    rank = jnp.cumsum(valid, 1) - 1
    seen = estimated.stretched(module.selected(estimate), estimate.length, rank)
    seen = seen & valid[:, None, None] & valid[:, None, :, None]
    if module.causal:
        seen = seen & jnp.tril(jnp.ones((t, t), bool))[None, None]
    o = Softmax(mask=None if module.causal else Full())(q, k, v, mask=seen)
    g = estimate.gates
    mean = module._mean(estimate, v, None) if module.causal else None
    if mean is None:
        return g[..., 1:] * g[..., :1] * o + (
            1 - g[..., 1:]) * module._average(estimate, v, h)
    mean = jnp.repeat(mean, h // v.shape[2], 2)
    return g[..., 1:] * g[..., :1] * o + (1 - g[..., 1:]) * mean


@pytest.mark.parametrize("causal", [True, False])
def test_the_lists_are_the_mask(causal):
    q, k, v = inputs(t=45)
    module = SMALL.clone(causal=causal)
    variables = init(module, jax.random.key(0), q, k, v)

    def both(variables, q, k, v):
        one = lambda q: module.apply(variables, q, k, v)
        two = lambda q: module.apply(variables, q, k, v, method=dense)
        grad = lambda f: jax.grad(lambda q: (f(q) ** 2).sum())(q)
        return one(q), two(q), grad(one), grad(two)

    a, b, da, db = jax.jit(both)(variables, q, k, v)
    close(a, b)
    close(da, db, "gradient")


def test_rows_keep_as_many_keys_as_is_said():
    q, k, v = inputs(t=60)
    variables = init(SMALL, jax.random.key(0), q, k, v)

    def kept(module, q, k, v):
        estimate, _ = module._estimate(q, k, v, jnp.ones(q.shape[:2], bool), None)
        chosen = module.selected(estimate)
        keys = estimated.stretched(chosen, estimate.length, jnp.arange(60)[None])
        return keys & jnp.tril(jnp.ones((60, 60), bool))[None, None]

    found = np.asarray(apply(SMALL, variables, q, k, v, method=kept))
    mean = found[:, :, 20:].sum(-1).mean()
    assert 0.6 * SMALL.keep < mean < 1.7 * SMALL.keep, mean


def test_padding_changes_nothing():
    q, k, v = inputs(t=24)
    module = SMALL.clone(causal=False)
    variables = init(module, jax.random.key(0), q, k, v)
    segments = jnp.asarray(np.arange(24) < 17, jnp.int32)[None].repeat(2, 0)
    # an odd number of rows: those that are filled in have the convolutions' zeros
    o = apply(module, variables, q, k, v, segments=segments)
    assert (np.asarray(o)[:, 17:] == 0).all()
    spoilt = tuple(a.at[:, 17:].set(9.0) for a in (q, k, v))
    close(apply(module, variables, *spoilt, segments=segments), o)


def test_more_sequences_in_a_row_are_refused():
    q, k, v = inputs(t=8)
    module = SMALL.clone(causal=False)
    variables = init(module, jax.random.key(0), q, k, v)
    two = jnp.asarray([[1] * 4 + [2] * 4, [1] * 8])
    with pytest.raises(NotImplementedError, match="one sequence"):
        module.apply(variables, q, k, v, segments=two)
    o = apply(module, variables, q, k, v, segments=two)
    assert np.isnan(o[0]).all() and np.isfinite(o[1]).all()


def test_directions_are_of_the_seed_and_the_time_alone():
    one, again = SMALL.redrawn(3, 8), SEA(columns=32).redrawn(3, 8)
    assert (one == again).all() and (one != SMALL.redrawn(4, 8)).any()
    w = np.asarray(favor.projection(jax.random.key(0), 16, 8), np.float64)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    for part in (unit[:8], unit[8:]):
        np.testing.assert_allclose(part @ part.T, np.eye(8), atol=1e-5)
    q, k, v = inputs(t=9)
    variables = init(SMALL, jax.random.key(0), q, k, v)
    alone = {"params": variables["params"]}
    close(apply(SMALL, alone, q, k, v), apply(SMALL, variables, q, k, v))
    other = alone | {"fixed": {"directions": one}}
    assert np.abs(apply(SMALL, other, q, k, v) - apply(SMALL, alone, q, k, v)).max() > 0


def test_random_features_are_near_the_softmax_kernel():
    q, k, _ = (a / 2 for a in inputs(t=12))
    w = favor.projection(jax.random.key(1), 4096, 8)
    k = jnp.repeat(k, 2, 2)
    phi_q, phi_k = favor.softmax_features(q, w, (3,)), favor.softmax_features(
        k, w, (1, 3))
    p = jnp.einsum("bthm,bshm->bhts", phi_q, phi_k)
    s = jnp.einsum("bthd,bshd->bhts", q, k) * 8**-0.5
    want, p = jax.nn.softmax(s), p / p.sum(-1, keepdims=True)
    assert np.abs(p - want).max() < 0.1


def test_area_is_the_mean_of_what_is_covered():
    np.testing.assert_allclose(area(6, 3), np.repeat(np.eye(3), 2, 0) / 2)
    np.testing.assert_allclose(area(18, 16).sum(0), 1, rtol=1e-6)


def test_the_estimate_learns_from_a_teacher():
    """Tokens of four kinds that look for their own: the output comes nearer to the
    teacher's, on rows that were not seen, too."""
    rng = np.random.default_rng(0)
    t, h, d = 48, 2, 8
    kind = rng.integers(0, 4, (6, t))
    x = np.eye(4)[kind] @ rng.normal(size=(4, d)) * 1.5
    x = jnp.asarray(x[:, :, None].repeat(h, 2) + 0.1 * rng.normal(size=(6, t, h, d)),
                    jnp.float32)
    q = k = x * jnp.asarray([1.0, -1.0])[None, None, :, None]
    v = x
    module = SEA(columns=16, keep=4, length=t)
    variables = init(module, jax.random.key(1), q, k, v)
    params, fixed = variables["params"], variables["fixed"]
    s = jnp.einsum("bthd,bshd->bhts", q, k) * d**-0.5
    context = jax.jit(Softmax())(q, k, v)
    adam = optax.adam(6e-3)

    def loss(params, rows=slice(0, 4)):
        given = (a[rows] for a in (q, k, v, s, context))
        return module.apply({"params": params, "fixed": fixed}, *given, method="distil")

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    (after, _), losses = jax.jit(lambda p: jax.lax.scan(
        step, (p, adam.init(p)), None, 60))(params)
    assert losses[-1] < 0.8 * losses[0], losses[::30]

    def error(params):
        o = module.apply({"params": params, "fixed": fixed}, q[4:], k[4:], v[4:])
        return float(((o - context[4:]) ** 2).mean())

    assert error(after) < 0.7 * error(params), (error(after), error(params))


@pytest.mark.parametrize("fields, message", [
    ({"columns": 6}, "columns=6"), ({"keep": 0}, "keep=0"), ({"length": 0}, "length=0"),
    ({"nb_factor": 0.0}, "nb_factor=0.0"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SEA(**fields)


def test_more_tokens_than_places_are_refused():
    q, k, v = inputs(t=9)
    with pytest.raises(ValueError, match="at most length=8"):
        SEA(columns=16, length=8).init(jax.random.key(0), q, k, v)
