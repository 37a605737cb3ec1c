"""MLA: the equation, streams of it with the absorbed form, and what a token costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.mla import MLA
from attn.positions import RoPE
from tests.compiled import apply, init

B, T, E = 2, 16, 24
LAYERS = {
    "plain": MLA(heads=4, rank=6, head_dim=5, shared_dim=4, value_dim=7),
    "turned": MLA(heads=2, rank=8, head_dim=4, shared_dim=4, value_dim=8, query_rank=5,
                  position=RoPE()),
}
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 3, [0] * 3 + [1] * 5 + [3] * 8])
X = jax.random.normal(jax.random.key(0), (B, T, E))


@functools.cache
def drawn(name):
    return init(LAYERS[name], jax.random.key(1), X)


def close(a, b, bound=1e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.mark.parametrize("t", [1, 13])
def test_the_layer_is_its_equation(t):
    layer, x = LAYERS["plain"], X[:, :t]
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), drawn("plain"))["params"]
    x64 = np.asarray(x, np.float64)
    q = np.einsum("bte,ehd->bthd", x64, p["q"]["kernel"])
    down = x64 @ p["kv_down"]["kernel"]
    c, r = down[..., :6], down[..., 6:]
    c = c / np.sqrt((c * c).mean(-1, keepdims=True) + 1e-6) * p["kv_norm"]["scale"]
    k = np.einsum("btc,chd->bthd", c, p["k_up"])
    k = np.concatenate([k, np.repeat(r[:, :, None], 4, 2)], -1)
    s = np.einsum("bihd,bjhd->bhij", q, k) / 3
    s = np.exp(np.where(np.tril(np.ones((t, t), bool)), s, -np.inf))
    w = s / s.sum(-1, keepdims=True)
    o = np.einsum("bhij,bjc,chv->bihv", w, c, p["v_up"])
    want = np.einsum("bthv,hve->bte", o, p["out"]["kernel"])
    close(apply(layer, drawn("plain"), x), want)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_stream_is_the_whole(name, packed):
    layer, params = LAYERS[name], drawn(name)
    segments = SEGMENTS if packed else None
    want = apply(layer, params, X, segments=segments)
    if packed:
        alone = apply(layer, params, X[:1, 5:13])
        close(want[:1, 5:13], alone)
        # padding gives no attention, so nothing goes through `out`
        assert not np.asarray(want)[np.asarray(SEGMENTS) == 0].any()
    step = jax.jit(layer.apply)
    for piece in (1, 4, 16):
        state, outs = layer.init_state(T, X), []
        for at in range(0, T, piece):
            part = slice(at, at + piece)
            seg = None if segments is None else segments[:, part]
            state, y = step(params, X[:, part], state, segments=seg)
            outs.append(y)
        close(jnp.concatenate(outs, 1), want)


def test_no_token_sees_the_future_and_gradients_are_finite():
    layer, params = LAYERS["turned"], drawn("turned")

    def at(params, x):
        return (layer.apply(params, x)[:, 6] ** 2).sum()

    params_grad, x_grad = jax.jit(jax.grad(at, (0, 1)))(params, X)
    assert not np.asarray(x_grad)[:, 7:].any() and np.asarray(x_grad)[:, :7].any()
    assert all(np.isfinite(a).all() and np.asarray(a).any()
               for a in jax.tree.leaves(params_grad))


def test_low_precision():
    layer = LAYERS["turned"].clone(dtype=jnp.bfloat16)
    low = X.astype(jnp.bfloat16)
    want = apply(LAYERS["turned"], drawn("turned"), low.astype(jnp.float32))
    found = apply(layer, drawn("turned"), low)
    assert found.dtype == jnp.bfloat16
    close(found, want, 2e-2)


def test_a_token_costs_its_latent():
    """C + R numbers and a position, whatever the heads are."""
    layer, sizes = LAYERS["plain"], []
    for size in (16, 32):
        state = layer.init_state(size, X)
        sizes.append(sum(a.nbytes for a in jax.tree.leaves(state)) // B)
    assert sizes[1] - sizes[0] == 16 * ((6 + 4) * 4 + 4)
    with pytest.raises(ValueError, match="MLA: heads=0|heads=0"):
        MLA(heads=0).init(jax.random.key(0), X)
    with pytest.raises(NotImplementedError, match="a stream of 9 does not know"):
        MLA(heads=2, position=RoPE(scaling="dynamic", original=8)).init_state(9, X)
