"""The short convolution against numpy, alone and as the gated layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.baseconv import BaseConv
from attn.recurrent.shortconv import shortconv
from tests.compiled import apply, init

B, T, C = 2, 13, 6
SEGMENTS = np.array([[1] * 4 + [2] * 3 + [0] * 2 + [2] * 4, [0] + [3] * 10 + [0] * 2])
X = np.random.default_rng(0).normal(size=(B, T, C)).astype(np.float32)


def filtered(x, weight, bias):
    """One sequence [T,C], in float64."""
    row = np.concatenate([np.zeros((len(weight) - 1, x.shape[1])), x])
    taps = [row[n:n + len(x)] * weight[n] for n in range(len(weight))]
    return np.sum(taps, 0, np.float64) + bias


def close(a, b, bound=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    assert error <= bound, f"{error:.2e}"


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_filter(kernel, packed):
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(kernel, C)), rng.normal(size=C)
    segments = SEGMENTS if packed else np.ones((B, T), int)
    segment = jnp.asarray(segments, jnp.int32) if packed else None
    want = np.zeros((B, T, C))
    for row in range(B):
        for one in set(segments[row]) - {0}:
            at = np.nonzero(segments[row] == one)[0]
            want[row, at] = filtered(X[row, at], weight, bias)
    d_y = jnp.asarray(rng.normal(size=(B, T, C)), jnp.float32)
    f = lambda x, w, b: shortconv(x, w, b, segment=segment)[1]
    args = [jnp.asarray(a, jnp.float32) for a in (X, weight, bias)]
    y, back = jax.vjp(f, *args)
    close(y, want)
    dx, dw, db = back(d_y)
    # it is linear in x and in weight
    x = jnp.asarray(rng.normal(size=(B, T, C)), jnp.float32)
    close((dx * x).sum(), (d_y * (f(x, *args[1:]) - f(0 * x, *args[1:]))).sum(), 1e-4)
    close((dw * args[1]).sum() + (db * args[2]).sum(), (d_y * y).sum(), 1e-4)
    assert (np.asarray(dx)[segments == 0] == 0).all()


@pytest.mark.parametrize("variant", ["lm", "zoology"])
@pytest.mark.parametrize("packed", [False, True])
def test_streaming_is_reading_at_once(variant, packed):
    layer = BaseConv(variant, kernel=4)
    segments = jnp.asarray(SEGMENTS, jnp.int32) if packed else None
    params = init(layer, jax.random.key(0), X)
    want = apply(layer, params, X, segments=segments)
    for pieces in ((13,), (4, 4, 5), (1,) * 13):
        state, outs, at = layer.init_state(T, X), [], 0
        for n in pieces:
            seg = None if segments is None else segments[:, at:at + n]
            state, y = apply(layer, params, X[:, at:at + n], state, segments=seg)
            outs.append(y)
            at += n
        close(jnp.concatenate(outs, 1), want)
        assert state.end.tolist() == ([7, 10] if packed else [13, 13])
        assert state.last.shape == (B, 3, C * (2 if variant == "lm" else 1))
    if packed:
        assert (np.asarray(want)[SEGMENTS == 0] == 0).all()


@pytest.mark.parametrize("variant", ["lm", "zoology"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_mesh_changes_nothing(variant, packed):
    x = jnp.pad(X, ((0, 0), (0, 3), (0, 0)))
    segments = jnp.asarray(np.pad(SEGMENTS, ((0, 0), (0, 3))), jnp.int32)
    segments = segments if packed else None
    plain, split = (BaseConv(variant, kernel=4, axis=axis) for axis in (None, "seq"))
    params = init(plain, jax.random.key(0), X)
    f = lambda layer: jax.jit(jax.value_and_grad(lambda p, x: (layer.apply(
        p, x, segments=segments) ** 2).sum(), (0, 1)))(params, x)
    step = lambda layer, x: jax.jit(lambda s, x: layer.apply(params, x, s))(
        layer.init_state(T, x), x)
    want, streamed = f(plain), step(plain, x)
    mesh = jax.make_mesh((1, 4, 2), ("data", "seq", "model"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        have = f(split), step(split, x)
        step(split, X)  # 13 tokens: in the global view
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves((want, streamed))):
        close(a, b, 1e-5)


def test_wrong_calls_say_what_was_expected():
    with pytest.raises(ValueError, match="variant='fla': expected"):
        BaseConv("fla")
    with pytest.raises(ValueError, match="kernel=0: expected"):
        BaseConv(kernel=0)
    with pytest.raises(ValueError, match=r"weight .* expected \[W,C=6\]"):
        shortconv(X, jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="bias .*expected"):
        shortconv(X, jnp.ones((3, C)), jnp.ones(5))
    with pytest.raises(NotImplementedError, match="context"):
        BaseConv().init(jax.random.key(0), X, context=X)
    with pytest.raises(ValueError, match="size"):
        BaseConv().init_state(0, X)
