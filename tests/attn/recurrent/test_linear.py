"""The linear recurrence against the float64 recurrence, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.parallel.sharding import over_mesh
from attn.recurrent import linear
from attn.recurrent.linear import naive
from attn.recurrent.noncausal import noncausal
from experiments.measure import cost
from tests.oracles.linear import (
    B, D, DECAYS, GRADIENT, H, K, RUNS, V, close, inputs, like, per_channel, recurrence
)


@pytest.mark.parametrize("t", [1, 37])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", DECAYS)
def test_it_is_the_recurrence(kind, packed, t):
    q, k, v, g, state, d_o, d_state = inputs(t, kind)
    segment = np.array(RUNS[t] if packed else np.ones((B, t)), np.int32)
    want, grads = recurrence(q, k, v, per_channel(g, t), state, segment, d_o, d_state)

    @functools.partial(jax.jit, static_argnums=0)
    def both(chunk, *args):
        f = lambda q, k, v, g, state: linear.recurrence(
            q, k, v, g, state=state, segment=segment if packed else None, chunk=chunk
        )
        out, back = jax.vjp(f, *args)
        return out, back((d_state, d_o))

    for chunk in (16, 64) if t > 1 else (64,):
        have, back = both(chunk, q, k, v, g, state)
        close(have[0], want[0]), close(have[1], want[1])
        for name, a, b in zip("qkvgs", back, grads):
            if name == "g":
                if g is None:
                    continue
                b = like(b, g)
            close(a, b, GRADIENT)


@pytest.mark.parametrize("kind, packed", [
    ("none", True), ("head", False), ("token", True), ("mixed channel", True),
])
def test_the_loop_is_the_recurrence(kind, packed):
    q, k, v, g, state, d_o, d_state = inputs(37, kind)
    segment = np.array(RUNS[37] if packed else np.ones((B, 37)), np.int32)
    want, grads = recurrence(q, k, v, per_channel(g, 37), state, segment, d_o, d_state)
    f = lambda q, k, v, g, state: naive(
        q, k, v, g, state=state, segment=segment if packed else None)
    have, back = jax.jit(lambda *a: jax.vjp(f, *a))(q, k, v, g, state)
    close(have[0], want[0]), close(have[1], want[1])
    for name, a, b in zip("qkvgs", back((d_state, d_o)), grads):
        if name != "g" or g is not None:
            close(a, like(b, g) if name == "g" else b, GRADIENT)


@pytest.mark.parametrize("kind", ["head", "mixed channel"])
def test_the_chunk_is_only_a_tile(kind):
    q, k, v, g, state, *_ = inputs(37, kind)
    want = linear.recurrence(q, k, v, g, state=state)
    for chunk in (1, 7, 1000):
        for a, b in zip(linear.recurrence(q, k, v, g, state=state, chunk=chunk), want):
            close(a, b)


def test_one_token_is_a_chunk_of_one():
    q, k, v, g, state, *_ = inputs(2, "channel")
    for segment in (None, np.array([[1, 0], [1, 5]], np.int32)):
        want, rows = linear.recurrence(q, k, v, g, state=state, segment=segment)
        for t in range(2):
            now = None if segment is None else np.minimum(segment[:, t:t + 1], t + 1)
            part = (a[:, t:t + 1] for a in (q, k, v, g))
            state, o = naive(*part, state=state, segment=now)
            close(o, rows[:, t:t + 1])
        close(state, want)
        state = inputs(2, "channel")[4]


def test_low_precision_keeps_a_float32_state():
    q, k, v, *_ = inputs(37)
    low = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    with jax.numpy_dtype_promotion("strict"):
        state, o = linear.recurrence(*low)
    assert state.dtype == o.dtype == jnp.float32
    want = linear.recurrence(*(a.astype(jnp.float32) for a in low))
    close(state, want[0]), close(o, want[1])


def test_without_order_every_key_of_the_run_is_seen():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, 5, H, D))
    k, v = rng.normal(size=(B, 9, K, D)), rng.normal(size=(B, 9, K, V))
    q_segment = np.array([[7, 7, 2, 0, 3], [1, 1, 1, 1, 1]])
    kv_segment = np.array([[2] * 3 + [0] * 2 + [7] * 4, [1] * 4 + [0] * 5])
    pairs = np.einsum("bthd,bshd->bhts", q, np.repeat(k, H // K, 2))
    weigh = lambda seen: np.einsum(
        "bhts,bshv->bthv", pairs * seen[:, None], np.repeat(v, H // K, 2)
    )
    seen = (q_segment[..., None] == kv_segment[:, None]) & (kv_segment[:, None] > 0)
    args = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    close(noncausal(*args), weigh(np.ones_like(seen)))
    runs = (jnp.asarray(a, jnp.int32) for a in (q_segment, kv_segment))
    close(noncausal(*args, **dict(zip(("q_segment", "kv_segment"), runs))), weigh(seen))


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_memory_is_linear(kind):
    def f(q, k, v, g):
        return (linear.recurrence(q, k, v, g)[1] ** 2).sum()

    wanted = (0, 1, 2) if kind == "none" else (0, 1, 2, 3)
    sizes = [
        cost.memory(jax.grad(f, wanted), *inputs(t, kind)[:4])
        for t in (1024, 2048, 4096)
    ]
    assert cost.slope(sizes) < 1.05, sizes


def split(q, k, v, g, segment, reverse=False):
    """`recurrence` over the mesh in force."""
    form = {None: ".", 1: "H", 3: "BTH", 4: "BTHD"}[None if g is None else g.ndim]
    return over_mesh(
        lambda *a: linear.recurrence(
            *a[:4], segment=a[4], chunk=4, axis="seq", reverse=reverse)[1],
        f"BTHD BTKD BTKV {form} BT -> BTHV", "seq",
    )(q, k, v, g, segment)


@pytest.mark.parametrize("sizes,kind,packed,reverse", [
    ((1, 4, 2), "channel", True, False), ((1, 4, 2), "head", False, True),
    ((2, 4, 1), "token", True, True), ((2, 4, 1), "none", False, False),
    ((1, 2, 4), "head", True, False), ((1, 2, 4), "mixed channel", False, False),
])
def test_sharding_changes_nothing(sizes, kind, packed, reverse):
    t = 16
    q, k, v, g, _, d_o, _ = inputs(t, kind)
    k, v = (np.repeat(a, H // K, 2) for a in (k, v))
    segment = jnp.array(RUNS[t], jnp.int32) if packed else None
    args = (q, k, v) if g is None else (q, k, v, g)

    def gradients(f):
        def both(*args):
            g = args[3] if len(args) == 4 else None
            out, back = jax.vjp(lambda *a: f(*a[:3], g if len(a) < 4 else a[3]), *args)
            return out, back(d_o)
        return jax.jit(both)(*args)

    want = gradients(
        lambda *a: linear.recurrence(*a, segment=segment, reverse=reverse)[1]
    )
    mesh = jax.make_mesh(
        sizes, ("data", "seq", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    with jax.set_mesh(mesh):
        have = gradients(lambda *a: split(*a, segment, reverse))
    close(have[0], want[0])
    for a, b in zip(have[1], want[1]):
        close(a, b, GRADIENT)


def test_a_constant_decay_takes_one_gather():
    mesh = jax.make_mesh(
        (1, 4, 2), ("data", "seq", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    with jax.set_mesh(mesh):
        for t in (16, 64):
            q, k, v, g, *_ = inputs(t, "head")
            text = jax.jit(lambda *a: split(*a, None)).lower(q, k, v, g).compile()
            lines = [s for s in text.as_text().splitlines() if " all-gather(" in s]
            assert len(lines) == 1 and f"f32[4,{B},{H // 2},{D},{V}]" in lines[0], lines


def test_wrong_calls_say_what_was_expected():
    q, k, v, g, state, *_ = inputs(5, "token")
    with pytest.raises(ValueError, match=r"log_decay .*\(2, 5\): expected \(4,\)"):
        linear.recurrence(q, k, v, g[..., 0])
    with pytest.raises(ValueError, match="state .*expected"):
        linear.recurrence(q, k, v, g, state=state[:1])
    with pytest.raises(ValueError, match="segment .*expected"):
        linear.recurrence(q, k, v, g, segment=jnp.ones((B, 4), jnp.int32))
    with pytest.raises(ValueError, match="chunk=0: expected"):
        linear.recurrence(q, k, v, g, chunk=0)
    with pytest.raises(ValueError, match="T must be S"):
        linear.recurrence(q, k[:, :4], v[:, :4])
