"""The kernels of linear attention against the float64 recurrence, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract import dispatch
from attn.parallel.sharding import over_mesh
from attn.recurrent.linear import recurrence as linear_recurrence
from pallas_kernels import Refused
from pallas_kernels.linear import tpu as linear_tpu
from pallas_kernels.linear.api import linear
from tests.on_device import INTERPRET
from tests.oracles.linear import (
    GRADIENT, H, K, RUNS, close, inputs, like, per_channel, recurrence
)

BACKENDS = ("tpu", "triton")
TILES = {"tpu": (16, 16), "triton": (16, 16, 4, 1, 16)}
CASES = [("none", False, 37), ("head", False, 37), ("strong", False, 37)] + [
    (kind, packed, 37) for kind in ("mixed", "mixed channel") for packed in (0, 1)
] + [("none", True, 37), ("head", True, 37), ("head", False, 1), ("channel", True, 1)]


def kernel(backend, **options):
    """The kernel interpreted, with several chunks, blocks and tiles."""
    return functools.partial(
        linear, backend=backend, tile=TILES[backend], interpret=INTERPRET, **options)


@functools.partial(jax.jit, static_argnums=0)
def both(f, segment, args, cotangents):
    """What f gives, and the gradients of its arguments."""
    call = lambda q, k, v, g, state: f(q, k, v, g, state=state, segment=segment)
    out, back = jax.vjp(call, *args)
    return out, back(cotangents)


def check(f, args, segment=None, d_o=None, d_state=None):
    """f is the recurrence, forward and backward, twice the same bits."""
    q, _, _, g, state = args
    b, t, h, d = q.shape
    runs = np.ones((b, t), np.int32) if segment is None else np.array(segment, np.int32)
    decays = np.zeros(q.shape) if g is None else np.broadcast_to(
        {1: lambda: g[None, None, :, None], 3: lambda: g[..., None], 4: lambda: g}
        [g.ndim](), q.shape)
    want, grads = recurrence(*args[:3], decays, state, runs, d_o, d_state)
    segment = None if segment is None else jnp.asarray(runs)
    found = both(f, segment, args, (d_state, d_o))
    for a, b in zip(found[0], want):
        close(a, b)
    for name, a, b in zip("qkvgs", found[1], grads):
        if name != "g" or g is not None:
            close(a, like(b, g) if name == "g" else b, GRADIENT)
    jax.tree.map(np.testing.assert_array_equal, found,
                 both(f, segment, args, (d_state, d_o)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind,packed,t", CASES)
def test_it_is_the_recurrence(kind, packed, t, backend):
    *args, d_o, d_state = inputs(t, kind)
    check(kernel(backend), args, RUNS[t] if packed else None, d_o, d_state)


def drawn(h, k, d, v, t, kind, b=1):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    g = {"none": None, "head": normal(h), "token": normal(b, t, h),
         "channel": normal(b, t, h, d)}[kind]
    return [normal(b, t, h, d), normal(b, t, k, d), normal(b, t, k, v),
            g if g is None else -np.abs(g), normal(b, h, d, v)], (
        normal(b, t, h, v), normal(b, h, d, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h,k,d,v,kind", [
    (3, 3, 24, 40, "channel"), (2, 1, 40, 20, "token"), (1, 1, 17, 33, "head"),
    (2, 1, 16, 48, "channel"),
])
def test_widths_and_heads(h, k, d, v, kind, backend):
    args, cotangents = drawn(h, k, d, v, 35, kind)
    check(kernel(backend), args, None, *cotangents)


def test_query_heads_whose_states_do_not_fit_together(monkeypatch):
    monkeypatch.setattr(linear_tpu, "_together", lambda groups, *_: groups // 2)
    *args, d_o, d_state = inputs(37, "token")
    # two chunks a block
    f = functools.partial(linear, tile=(32, 16), interpret=INTERPRET)
    check(f, args, None, d_o, d_state)


def plain(q, k, v, g):
    """o of the whole matrix, each product in the type of q."""
    low = lambda a: a.astype(q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    t = q.shape[1]
    g = g[None, None, :, None] if g.ndim == 1 else g if g.ndim == 4 else g[..., None]
    clock = jnp.cumsum(jnp.broadcast_to(g, (*q.shape[:3], g.shape[3])), 1)
    order = jnp.tril(jnp.ones((t, t), bool))[None, :, :, None, None]
    apart = jnp.where(order, clock[:, :, None] - clock[:, None], -jnp.inf)
    decay = jnp.exp(apart)
    if g.shape[3] == 1:
        s = product("bihd,bjhd->bhij", q, k) * decay[..., 0].transpose(0, 3, 1, 2)
    else:
        keys = low(decay) * k[:, None]
        s = product("bihd,bijhd->bhij", q, keys)
    return product("bhij,bjhv->bihv", low(s), v).astype(q.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_low_precision_is_as_good_as_plain(kind, backend):
    *args, d_o, _ = inputs(37, kind)
    low = [jnp.asarray(a, jnp.bfloat16) for a in args[:3]] + [jnp.asarray(args[3])]
    d_o = jnp.asarray(d_o, jnp.bfloat16)
    segment = np.ones(d_o.shape[:2], np.int32)
    (_, o), grads = recurrence(
        *low[:3], per_channel(args[3], 37), np.zeros_like(args[4]), segment, d_o,
        np.zeros_like(args[4]))
    exact = [o, *grads[:3], like(grads[3], args[3])]

    def errors(f):
        o, back = jax.jit(lambda *a: jax.vjp(f, *a))(*low)
        assert o.dtype == jnp.bfloat16
        norm = lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b)
        return [norm(a, b) for a, b in zip((o, *back(d_o)), exact)]

    f = kernel(backend, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        have = errors(lambda *a: f(*a)[1])
    for name, a, b in zip("oqkvg", have, errors(plain)):
        assert a <= 2 * b, (name, a, b)


@pytest.mark.parametrize("backend,kind,t", [
    ("tpu", "token", 43_884), ("tpu", "channel", 43_884), ("triton", "head", 3001),
])
def test_a_long_row(backend, kind, t):
    tail = 400
    (q, k, v, g, _), _ = drawn(1, 1, 8, 8, t, kind)
    g = np.minimum(g, -0.1)  # what came `tail` tokens before is e^-40 of it
    tile = (1024, 128) if backend == "tpu" else (128, 16, 4, 1, 16)
    f = lambda *a: linear(*a, tile=tile, backend=backend, interpret=INTERPRET)
    (state, o), back = jax.jit(lambda *a: jax.vjp(f, *a))(q, k, v, g)
    cut = lambda a: a if a.ndim == 1 else a[:, -tail:]
    args = [cut(a) for a in (q, k, v)]
    zero = np.zeros((1, 1, 8, 8))
    decays = cut(g) if g.ndim == 4 else cut(g)[..., None]
    decays = np.broadcast_to(decays, args[0].shape)
    (want_state, want), _ = recurrence(*args, decays, zero, np.ones((1, tail), int),
                                       args[2], zero)
    close(state, want_state), close(o[:, -100:], want[:, -100:])
    for a in back((zero.astype(np.float32), jnp.ones_like(o))):
        assert np.isfinite(a).all()


@pytest.mark.parametrize("platform", ("tpu", "gpu"))
def test_the_recurrence_takes_it(platform, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    q, k, v, g, state, *_ = inputs(16, "channel")
    segment = jnp.array(RUNS[16], jnp.int32)
    f = functools.partial(
        linear_recurrence, q, k, v, g, state=state, segment=segment, scale=0.3)
    for a, b in zip(f(implementation="pallas"), f(implementation="xla")):
        close(a, b)


@pytest.mark.parametrize("platform,kind,packed,reverse", [
    ("tpu", "channel", True, False), ("gpu", "head", False, True),
    ("tpu", "token", True, True), ("gpu", "none", True, False),
])
def test_sharding_changes_nothing(platform, kind, packed, reverse, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    q, k, v, g, _, d_o, _ = inputs(16, kind)
    k, v = (np.repeat(a, H // K, 2) for a in (k, v))
    segment = jnp.array(RUNS[16], jnp.int32) if packed else None
    form = {None: ".", 1: "H", 3: "BTH", 4: "BTHD"}[None if g is None else g.ndim]
    split = lambda *args: over_mesh(
        lambda *a: linear_recurrence(
            *a[:4], segment=a[4], axis="seq", reverse=reverse,
            implementation="pallas")[1],
        f"BTHD BTKD BTKV {form} BT -> BTHV", "seq")(*args)

    def results(f):
        out, back = jax.jit(lambda *a: jax.vjp(f, *a))(q, k, v, g)
        return out, back(d_o)

    want = results(
        lambda *a: linear_recurrence(*a, segment=segment, reverse=reverse)[1])
    mesh = jax.make_mesh((1, 4, 2), ("data", "seq", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        have = results(lambda *a: split(*a, segment))
    close(have[0], want[0])
    for a, b in zip(have[1], want[1]):
        if a is not None:
            close(a, b, GRADIENT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals_say_why(backend):
    (q, k, v, *_), _ = drawn(1, 1, 8, 8, 3, "none")
    wide = np.zeros((1, 3, 1, 257), np.float32)
    half = [jnp.asarray(a, jnp.float16) for a in (q, k, v)]
    for args, reason in (((wide, wide, v), "D=257: at most 256"),
                         ((q, k, wide), "V=257: at most 256"),
                         (half, "float16"), ((q, k, half[2]), "float32, float16")):
        with pytest.raises(Refused, match=reason):
            linear(*map(jnp.asarray, args), backend=backend, interpret=INTERPRET)
