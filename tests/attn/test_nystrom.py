"""Nystrom: its three matrices in float64, spans that do not divide, its convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Full
from attn.nystrom import Nystrom
from attn.softmax import Softmax
from tests.compiled import apply, attend, init
from tests.laws import SEGMENTS, close, gradients, inputs
from tests.oracles import differences


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def bounds(t, c):
    """Where spans begin and end: the shorter ones first."""
    sizes = [t // c] * (c - t % c) + [t // c + 1] * (t % c)
    return np.cumsum([0, *sizes])


def oracle(q, k, v, c, conv=None, iterations=6):
    """float64, by the whole matrices."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    at = bounds(q.shape[1], c)
    means = lambda a: np.stack([a[:, i:j].mean(1) for i, j in zip(at, at[1:])], 1)
    dots = lambda a, b: softmax(
        np.einsum("bthd,bshd->bhts", a, b) * q.shape[-1] ** -0.5)
    f, a, b = dots(q, means(k)), dots(means(q), means(k)), dots(means(q), k)
    z = a.swapaxes(-1, -2) / a.sum(-2).max(-1)[..., None, None]
    one = np.eye(c)
    for _ in range(iterations):
        az = a @ z
        z = z / 4 @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    o = np.einsum("bhts,bshv->bthv", f @ z @ b, v)
    if conv is not None:
        half = conv.shape[1] // 2
        wide = np.pad(v, ((0, 0), (half, half), (0, 0), (0, 0)))
        o = o + sum(conv[:, i, None] * wide[:, i:i + q.shape[1]]
                    for i in range(conv.shape[1]))
    return o


@pytest.mark.parametrize("c", [1, 3, 4, 7])
def test_it_is_its_definition(c):
    args = inputs()
    close(apply(Nystrom(landmarks=c), {}, *args), oracle(*args, c))


def test_gradients_by_differences_of_the_convolution_too():
    args, conv = inputs(t=9), 0.3 * jax.random.normal(jax.random.key(2), (4, 3))
    module = Nystrom(landmarks=4, conv=3)
    f = lambda q, k, v, conv: module.apply({"params": {"conv": conv}}, q, k, v)
    close(jax.jit(f)(*args, conv), oracle(*args, 4, np.asarray(conv)))
    do = jax.random.normal(jax.random.key(9), (*args[0].shape[:3], args[2].shape[-1]))
    differences.agree(lambda *a: oracle(*a[:3], 4, a[3]), (*args, conv),
                      gradients(f, *args, conv), do)
    assert init(module, jax.random.key(0), *args)["params"]["conv"].shape == (4, 3)


def test_padding_is_as_if_it_were_not_there():
    q, k, v = inputs()
    real = jnp.asarray(SEGMENTS == 1)
    for c in (3, 5, 8):  # fewer landmarks than tokens, as many, and more
        module = Nystrom(landmarks=c)
        o = apply(module, {}, q, k, v, segments=real.astype(jnp.int32))
        for row in range(2):
            at = np.nonzero(SEGMENTS[row] == 1)[0]
            own = [a[row:row + 1, at] for a in (q, k, v)]
            close(o[row:row + 1, at], apply(module, {}, *own))


def test_it_has_limits():
    args = inputs()
    exact = attend(Softmax(mask=Full()), *args)
    close(apply(Nystrom(landmarks=16), {}, *args), exact)
    few, many = (np.linalg.norm(apply(Nystrom(landmarks=c), {}, *args) - exact)
                 for c in (2, 12))
    assert many < few
    # a start that the batch shares is a matrix's own where there is but one
    shared, own = (
        Nystrom(landmarks=4, shared_start=shared) for shared in (True, False))
    one = [a[:1, :, :1] for a in args]
    close(apply(shared, {}, *one), apply(own, {}, *one))
    assert np.abs(apply(shared, {}, *args) - apply(own, {}, *args)).max() > 1e-3
    with pytest.raises(ValueError, match="conv=2: expected an odd number"):
        Nystrom(conv=2)
    with pytest.raises(NotImplementedError, match="several sequences in a row"):
        Nystrom().apply({}, *args, segments=jnp.asarray(SEGMENTS))
    with pytest.raises(ValueError, match="T must be S"):
        Nystrom().apply({}, args[0][:, :5], *args[1:])
