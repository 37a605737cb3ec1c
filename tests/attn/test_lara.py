"""LARA: its proposals in float64, its noise, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.lara import LARA
from tests.attn.test_nystrom import bounds, softmax
from tests.compiled import attend
from tests.laws import SEGMENTS, close, gradients, inputs
from tests.oracles import differences


def oracle(q, k, v, c, noise=0.0):
    """float64, as the spec writes it, with what cancels."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    n, at = q.shape[-1] ** -0.5, bounds(q.shape[1], min(c, q.shape[1]))
    means = lambda a: np.stack([a[:, i:j].mean(1) for i, j in zip(at, at[1:])], 1)
    mu = means(q) + means(k)
    w = mu + noise
    dots = lambda a, b: n * np.einsum("bchd,bshd->bhcs", a, b)
    squares = lambda a: n * (a * a).sum(-1).swapaxes(1, 2)[:, :, None] / 2
    lq, lk = dots(w, q) - squares(q), dots(w, k) - squares(k)
    own = n * (mu * w).sum(-1) - n * (mu * mu).sum(-1) / 2  # [B,c,H]
    kv = softmax(lk) @ v.swapaxes(1, 2)
    lse = np.log(np.exp(lk).sum(-1, keepdims=True))
    ratio = dots(mu, q) + lq + lse - own.swapaxes(1, 2)[..., None]
    return np.einsum("bhtc,bhcv->bthv", softmax(ratio.swapaxes(2, 3)), kv)


@pytest.mark.parametrize("t, c", [(16, 3), (7, 4), (5, 9), (1, 4)])
def test_it_is_its_definition(t, c):
    args = inputs(t=t)
    close(attend(LARA(landmarks=c), *args), oracle(*args, c))


def test_noise_is_of_the_key_and_of_its_deviation():
    args, key = inputs(), jax.random.key(5)
    noise = jax.random.normal(key, (2, 3, 4, 8), jnp.float32)
    have = attend(LARA(landmarks=3, deviation=0.5), *args, key=key)
    close(have, oracle(*args, 3, 0.5 * np.asarray(noise, np.float64)))
    close(attend(LARA(landmarks=3, deviation=0.0), *args, key=key), oracle(*args, 3))


def test_gradients_by_differences():
    args = inputs(t=9)
    do = jax.random.normal(jax.random.key(9), (*args[0].shape[:3], args[2].shape[-1]))
    grads = gradients(LARA(landmarks=4), *args)
    differences.agree(lambda *a: oracle(*a, 4), args, grads, do)


def test_padding_is_as_if_it_were_not_there():
    q, k, v = inputs()
    attention = LARA(landmarks=3)
    ids = jnp.asarray(SEGMENTS == 1, jnp.int32)
    o = attend(attention, q, k, v, segments=ids)
    for row in range(2):
        at = np.nonzero(SEGMENTS[row] == 1)[0]
        own = [a[row:row + 1, at] for a in (q, k, v)]
        close(o[row:row + 1, at], oracle(*own, 3))
    with pytest.raises(NotImplementedError, match="segments: a pair"):
        attention(q, k, v, segments=(ids, ids))
