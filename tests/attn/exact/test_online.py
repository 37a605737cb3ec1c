"""Partial softmax: triples merge in any cut, on any grid, with the same gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.exact.online import EMPTY, Partial, merge, normalized, output
from attn.masks import Causal, Full, Window
from attn.parallel.device_grid import distributed, partial, traffic
from attn.softmax import Softmax, attend
from tests.laws import TOLERANCE, close, gradients, inputs, plain

GRIDS = {  # sizes of (data, rows, columns, model), and what rows and columns are
    "grid": ((1, 2, 2, 2), "rows", "columns"),
    "wide": ((2, 2, 2, 1), "rows", "columns"),
    "rows": ((1, 4, 1, 2), "rows", ()),
    "columns": ((1, 1, 8, 1), (), "columns"),
    "both as one": ((1, 2, 4, 1), (), ("rows", "columns")),
}


def mesh_of(sizes):
    return jax.make_mesh(sizes, ("data", "rows", "columns", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 4)


def oracle(q, k, v, seen):
    """float64 [B,T,H,V]; seen [T,S]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    s = np.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    p = np.where(seen, np.exp(s - s.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", p / np.where(total > 0, total, 1), v)


def order(t, s):
    return np.arange(s)[None] <= np.arange(t)[:, None] + s - t


@pytest.mark.parametrize("cuts", [(16,), (4, 4, 4, 4), (1, 9, 6)])
@pytest.mark.parametrize("tiled", [False, True])
def test_parts_merge_to_the_whole(cuts, tiled):
    q, k, v = inputs()
    edges = np.cumsum((0, *cuts))
    where = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))

    def f(q, k, v):
        parts = []
        for a, b in zip(edges[:-1], edges[1:]):
            args, at = (q, k[:, a:b], v[:, a:b]), where[:, a:b]
            parts.append(
                normalized(*attend(*args, mask=Causal(), q_pos=where, kv_pos=at))
                if tiled else partial(*args, Causal(), q_pos=where, kv_pos=at)
            )
        found = parts[0]
        for part in parts[1:]:  # one after the other
            found = merge(jax.tree.map(lambda *a: jnp.stack(a), found, part))
        at_once = merge(jax.tree.map(
            lambda *a: jnp.stack(a), *(Partial(*part) for part in parts)))
        return output(found), output(at_once)

    for n in range(2):
        one = lambda q, k, v: f(q, k, v)[n]
        close(one(q, k, v), oracle(q, k, v, order(16, 16)))
        want = gradients(Softmax(), q, k, v)
        for a, b in zip(gradients(one, q, k, v), want):
            close(a, b, "gradient")


def test_nothing_seen_is_the_neutral_triple():
    q, k, v = inputs()
    none = partial(q, k, v, Causal(), q_pos=jnp.zeros((1, 16), int),
                   kv_pos=1 + jnp.arange(16)[None])
    assert (none.m == np.float32(EMPTY)).all()
    assert (none.l == 0).all() and (none.a == 0).all()
    o, lse = attend(q, k, v, mask=Causal(), q_pos=jnp.zeros((2, 16), jnp.int32),
                    kv_pos=jnp.broadcast_to(1 + jnp.arange(16)[None], (2, 16)))
    for a, b in zip(normalized(o, lse), none):
        np.testing.assert_array_equal(a, b)
    some = partial(q, k, v)
    stacked = lambda *parts: jax.tree.map(lambda *a: jnp.stack(a), *parts)
    for a, b in zip(merge(stacked(none, some)), some):
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
    parts = [partial(q_wide, k_wide[:, at], v[:, at], scale=0.25)
             for at in (slice(0, 8), slice(8, 16))]
    o = output(merge(jax.tree.map(lambda *a: jnp.stack(a), *parts)))
    scaled = np.asarray(q, np.float64) * 0.25 * q.shape[-1] ** 0.5
    close(o, oracle(scaled, k, v, np.broadcast_to(late, (16, 16))))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_changes_nothing(grid):
    sizes, rows, columns = GRIDS[grid]
    q, k, v = inputs()
    f = lambda q, k, v: distributed(q, k, v, Causal(), rows=rows, columns=columns)
    with jax.set_mesh(mesh_of(sizes)):
        have, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
    close(have, oracle(q, k, v, order(16, 16)))
    for a, b in zip(grads, gradients(Softmax(), q, k, v)):
        close(a, b, "gradient")


@pytest.mark.parametrize("t, s", [(1, 16), (5, 13), (13, 5), (7, 7), (1, 1)])
def test_any_length_on_a_grid(t, s):
    sizes, rows, columns = GRIDS["grid"]
    q, k, v = inputs()
    q, k, v = q[:, :t], k[:, :s], v[:, :s]
    for mask, seen in ((Full(), np.ones((t, s), bool)), (Causal(), order(t, s))):
        f = lambda q, k, v: distributed(q, k, v, mask, rows=rows, columns=columns)
        whole = lambda q, k, v: Softmax(mask=mask)(q, k, v)
        with jax.set_mesh(mesh_of(sizes)):
            have, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
        close(have, oracle(q, k, v, seen))
        want = gradients(whole, q, k, v)
        close(grads[2], want[2], "gradient")
        for a, b in zip(grads[:2], want[:2]):
            if s > 1:
                close(a, b, "gradient")
            else:  # one key has all of the weight, whatever q and k are
                assert np.abs(a).max() < 1e-6


def test_runs_windows_and_rows_that_see_nothing():
    q, k, v = inputs()
    run = jnp.asarray([[1] * 6 + [2] * 7 + [0] * 3, [0] * 16], jnp.int32)
    at = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))
    mask = Causal() & Window(3)
    f = lambda q, k, v: distributed(
        q, k, v, mask, rows="rows", columns="columns", q_pos=at, kv_pos=at, q_run=run,
        kv_run=run)
    with jax.set_mesh(mesh_of(GRIDS["wide"][0])):
        o, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
    whole = lambda q, k, v: Softmax(mask=mask)(q, k, v, segments=run)
    close(o, whole(q, k, v))
    for a, b in zip(grads, gradients(whole, q, k, v)):
        close(a, b, "gradient")
    for a in (o, *grads):
        assert (np.asarray(a)[np.asarray(run) == 0] == 0).all()


def test_low_precision_is_as_good_as_plain_jnp():
    low = inputs(dtype=jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in low]
    with jax.set_mesh(mesh_of(GRIDS["columns"][0])), \
            jax.numpy_dtype_promotion("strict"):
        f = jax.jit(lambda q, k, v: distributed(q, k, v, Causal(), columns="columns"))
        o = f(*low)
    assert o.dtype == jnp.bfloat16
    want = np.asarray(plain(*exact))
    error = lambda a: np.linalg.norm(np.asarray(a, np.float32) - want)
    assert error(o) <= TOLERANCE["low"] * error(plain(*low))


def test_the_kernel_runs_on_every_device():
    q, k, v = inputs()
    f = lambda q, k, v: distributed(q, k, v, Causal(), rows="rows", columns="columns",
                                    implementation="pallas")
    with jax.set_mesh(mesh_of(GRIDS["grid"][0])):
        have, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
    close(have, oracle(q, k, v, order(16, 16)))
    for a, b in zip(grads, gradients(Softmax(), q, k, v)):
        close(a, b, "gradient")


def test_traffic_counts_what_the_spec_counts():
    found = traffic(64, 64, 2, 4, heads=4, kv_heads=2, width=8)
    assert found == {"gathered": 8 * (2 * 2 * 8 + 1) * 4, "reduced": 32 * 4 * 10 * 4}
    assert traffic(64, 64, 1, 1) == {"gathered": 0, "reduced": 0}


def test_wrong_calls_say_what_was_expected():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="there is no mesh"):
        distributed(q, k, v, columns="columns")
    with jax.set_mesh(mesh_of(GRIDS["grid"][0])):
        for options, message in (
            ({"rows": "rows", "columns": "rows"}, "expected different mesh axes"),
            ({"columns": "lines"}, "expected one of the mesh's"),
            ({"columns": "columns", "q_pos": jnp.zeros((2, 16), int)}, "kv_pos go"),
            ({"columns": "columns", "kv_run": jnp.ones((2, 16), int)}, "kv_run go"),
        ):
            with pytest.raises(ValueError, match=message):
                distributed(q, k, v, **options)
