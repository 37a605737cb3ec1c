"""A grid of devices: queries by rows, keys by columns, and nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Full, Window
from attn.parallel.device_grid import grid_attention, traffic
from attn.softmax import Softmax
from pallas_kernels.logits import LogitSpec, Where
from tests.laws import TOLERANCE, close, gradients, inputs, plain
from tests.oracles.softmax import attention, order

CAUSAL = LogitSpec(Causal())
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


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_changes_nothing(grid):
    sizes, rows, columns = GRIDS[grid]
    q, k, v = inputs()
    f = lambda q, k, v: grid_attention(q, k, v, CAUSAL, rows=rows, columns=columns)
    with jax.set_mesh(mesh_of(sizes)):
        have, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
    close(have, attention(q, k, v, order(16, 16)))
    for a, b in zip(grads, gradients(Softmax(), q, k, v)):
        close(a, b, "gradient")


@pytest.mark.parametrize("t, s", [(1, 16), (5, 13), (13, 5), (7, 7), (1, 1)])
def test_any_length_on_a_grid(t, s):
    sizes, rows, columns = GRIDS["grid"]
    q, k, v = inputs()
    q, k, v = q[:, :t], k[:, :s], v[:, :s]
    for mask, seen in ((Full(), np.ones((t, s), bool)), (Causal(), order(t, s))):
        f = lambda q, k, v: grid_attention(
            q, k, v, LogitSpec(mask), rows=rows, columns=columns)
        whole = lambda q, k, v: Softmax(mask=mask)(q, k, v)
        with jax.set_mesh(mesh_of(sizes)):
            have, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
        close(have, attention(q, k, v, seen))
        want = gradients(whole, q, k, v)
        close(grads[2], want[2], "gradient")
        for a, b in zip(grads[:2], want[:2]):
            if s > 1:
                close(a, b, "gradient")
            else:  # one key has all of the weight, whatever q and k are
                assert np.abs(a).max() < 1e-6


def test_runs_windows_and_rows_that_see_nothing():
    q, k, v = inputs()
    segment = jnp.asarray([[1] * 6 + [2] * 7 + [0] * 3, [0] * 16], jnp.int32)
    at = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))
    mask = Causal() & Window(3)
    f = lambda q, k, v: grid_attention(
        q, k, v, LogitSpec(mask), Where(at, at, segment, segment), rows="rows",
        columns="columns")
    with jax.set_mesh(mesh_of(GRIDS["wide"][0])):
        o, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
    whole = lambda q, k, v: Softmax(mask=mask)(q, k, v, segments=segment)
    close(o, whole(q, k, v))
    for a, b in zip(grads, gradients(whole, q, k, v)):
        close(a, b, "gradient")
    for a in (o, *grads):
        assert (np.asarray(a)[np.asarray(segment) == 0] == 0).all()


def test_low_precision_is_as_good_as_plain_jnp():
    low = inputs(dtype=jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in low]
    with jax.set_mesh(mesh_of(GRIDS["columns"][0])), \
            jax.numpy_dtype_promotion("strict"):
        f = jax.jit(lambda q, k, v: grid_attention(q, k, v, CAUSAL, columns="columns"))
        o = f(*low)
    assert o.dtype == jnp.bfloat16
    want = np.asarray(plain(*exact))
    error = lambda a: np.linalg.norm(np.asarray(a, np.float32) - want)
    assert error(o) <= TOLERANCE["low"] * error(plain(*low))


def test_the_kernel_runs_on_every_device():
    q, k, v = inputs()
    f = lambda q, k, v: grid_attention(q, k, v, CAUSAL, rows="rows", columns="columns",
                                       implementation="pallas")
    with jax.set_mesh(mesh_of(GRIDS["grid"][0])):
        have, grads = jax.jit(f)(q, k, v), gradients(f, q, k, v)
    close(have, attention(q, k, v, order(16, 16)))
    for a, b in zip(grads, gradients(Softmax(), q, k, v)):
        close(a, b, "gradient")


def test_traffic_counts_what_the_spec_counts():
    found = traffic(64, 64, 2, 4, heads=4, kv_heads=2, width=8)
    assert found == {"gathered": 8 * (2 * 2 * 8 + 1) * 4, "reduced": 32 * 4 * 10 * 4}
    assert traffic(64, 64, 1, 1) == {"gathered": 0, "reduced": 0}


def test_wrong_calls_say_what_was_expected():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="there is no mesh"):
        grid_attention(q, k, v, columns="columns")
    with jax.set_mesh(mesh_of(GRIDS["grid"][0])):
        for options, message in (
            ({"rows": "rows", "columns": "rows"}, "expected different mesh axes"),
            ({"columns": "lines"}, "expected one of the mesh's"),
            ({"where": Where(q_pos=jnp.zeros((2, 16), int))}, "kv_pos go"),
            ({"where": Where(kv_segment=jnp.ones((2, 16), int))}, "kv_segment go"),
        ):
            with pytest.raises(ValueError, match=message):
                grid_attention(q, k, v, **{"columns": "columns"} | options)
