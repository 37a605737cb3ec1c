"""The grid: coordinates, MD-LRPE and MD-TPE against plain numpy, for 1 to 3 axes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.grid import MDLRPE, MDTPE, along, coordinates
from attn.layers import MultiHead
from attn.lightnet import LightNet
from attn.masks import Full
from attn.positions import RoPE
from attn.softmax import Softmax
from models.pixels import PixelNet
from tests.compiled import apply, init
from tests.laws import close

DIMS = ((5,), (3, 4), (2, 3, 4))
GRID = pytest.mark.parametrize("dims", DIMS)


@GRID
def test_coordinates_are_row_by_row_behind_the_extra_tokens(dims):
    total = int(np.prod(dims))
    want = np.stack(np.unravel_index(np.arange(total), dims), -1)
    at = np.asarray(coordinates(jnp.arange(total + 2), dims, 2))
    np.testing.assert_array_equal(at[2:], want)
    assert (at[:2] == 0).all()
    beyond = coordinates(jnp.asarray([total]), dims)
    np.testing.assert_array_equal(beyond, [[dims[0], *[0] * (len(dims) - 1)]])


def turned(module, x, theta=None):
    params = {} if theta is None else {"params": {"theta": jnp.asarray(theta)}}
    pos = jnp.arange(x.shape[1])[None]
    return apply(module, params, x, pos, method="rotate")


@GRID
def test_a_product_depends_on_how_far_apart_tokens_are(dims):
    t, d, m = int(np.prod(dims)), 7, len(dims)
    q, k = (jax.random.normal(jax.random.key(n), (1, t, 2, d)) for n in (0, 1))
    theta = np.random.default_rng(0).normal(size=(2, -(-d // m))).astype("f4")
    module = MDLRPE(dims)
    a, b = (turned(module, x, theta) for x in (q, k))
    assert a.shape == (1, t, 2, 2 * d) and module.doubles
    at = np.stack(np.unravel_index(np.arange(t), dims), -1)
    apart = (at[:, None] - at[None])[:, :, None, :, None] * theta[:, None].astype("f8")
    cos = np.cos(apart.reshape(t, t, 2, -1)[..., :d])
    want = np.einsum("bthd,bshd,tshd->bhts", q, k, cos)
    close(jnp.einsum("bthd,bshd->bhts", a, b), want)
    slope = jax.grad(lambda theta: (turned(module, q, theta)[..., ::2] ** 2).sum())
    # d/dtheta of (x cos)^2 + (x sin)^2 over every second channel, in float64
    away = at[:, None, :, None] * np.ones_like(theta, "f8")[:, None]
    away = away.reshape(t, 2, -1)[..., :d]
    angle = (at[:, None, :, None] * theta[:, None].astype("f8")).reshape(t, 2, -1)
    square = (np.asarray(q, "f8") ** 2 * np.sin(2 * angle[..., :d]) * away)[0]
    kept = np.arange(2 * d) % 2 == 0.0
    want = (square * (1.0 * kept[d:] - kept[:d])).sum((0, 2))
    close(slope(theta).sum(-1), want, "gradient")


def test_theta_of_one_axis_and_the_fixed_form():
    x = jax.random.normal(jax.random.key(0), (1, 6, 4, 8))
    learned = MDLRPE((6,))
    params = init(learned, jax.random.key(0), x, jnp.arange(6)[None], method="rotate")
    theta = params["params"]["theta"]
    close(theta, np.broadcast_to(10000.0 ** (-2 * np.arange(8) / 8), (4, 8)))
    close(turned(MDLRPE((6,), learned=False), x), turned(learned, x, theta))
    # the rotary form of one axis is RoPE, and of two it keeps the width
    rotary = MDLRPE((6,), kind="rotary", learned=False)
    close(turned(rotary, x), RoPE().rotate(x, jnp.arange(6)[None]))
    flat = turned(MDLRPE((2, 3), kind="rotary", learned=False), x)
    assert flat.shape == x.shape
    close(jnp.linalg.norm(flat), jnp.linalg.norm(x))


def test_a_layer_learns_theta_and_key_heads_share_it():
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    for attention in (Softmax(mask=Full()), LightNet(causal=False)):
        layer = MultiHead(attention, 4, 2, position=MDLRPE((3, 4), heads=2))
        params = jax.jit(layer.init)(jax.random.key(1), x)
        assert params["params"]["position"]["theta"].shape == (2, 2)
        grads = jax.jit(jax.grad(lambda p: (layer.apply(p, x) ** 2).sum()))(params)
        assert np.abs(grads["params"]["position"]["theta"]).max() > 0
    # softmax rotates two key heads by themselves, and has four rows for them
    with pytest.raises(ValueError, match="heads=4"):
        MultiHead(Softmax(), 4, 2, position=MDLRPE((3, 4), heads=4)).init(
            jax.random.key(1), x
        )


def filtered(p, x, dims, heads, exp):
    """MD-TPE in float64, token by token along each axis."""
    b, t, e = x.shape
    x, out = x.reshape(b, *dims, heads, -1), 0
    for a in range(len(dims)):
        log = -np.exp(p[f"decay_{a}"]) if exp else -np.log1p(np.exp(-p[f"decay_{a}"]))
        gain = (p[f"q_{a}"] * p[f"k_{a}"]).sum(-1)
        y = np.zeros_like(x)
        for i, j in itertools.product(range(dims[a]), repeat=2):
            if j <= i:
                to, of = ((slice(None),) * (a + 1) + (n,) for n in (i, j))
                y[to] += (gain * np.exp((i - j) * log))[:, None] * x[of]
        y = y / np.sqrt((y ** 2).mean(-1, keepdims=True) + 1e-6)
        y = y * p[f"norm_{a}"]["scale"]
        out = out + y.reshape(b, t, e) @ p[f"out_{a}"]["kernel"]
    return out


@GRID
@pytest.mark.parametrize("decay", ["sigmoid", "exp"])
def test_mdtpe_is_the_filter(dims, decay):
    t = int(np.prod(dims))
    x = jax.random.normal(jax.random.key(0), (2, t, 8))
    module = MDTPE(dims, heads=2, decay_param=decay, chunk=2)
    params = init(module, jax.random.key(1), x)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    want = filtered(p, np.asarray(x, np.float64), dims, 2, decay == "exp")
    close(jax.jit(module.apply)(params, x), want)


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_of_the_filter(axis):
    rng = np.random.default_rng(axis)
    args = [rng.normal(size=n) for n in ((1, 3, 5, 2, 4), 2)] + [[-0.01, -30.0]]
    args = [np.asarray(a, np.float64) for a in args]
    w = rng.normal(size=args[0].shape)

    def reference(x, gain, log):
        i = np.arange(x.shape[axis + 1])
        apart = (i[:, None] - i)[..., None]
        toeplitz = np.where(apart >= 0, np.exp(np.maximum(apart, 0) * log), 0) * gain
        form = ("bcwhv,ich->biwhv", "bwchv,ich->bwihv")[axis]
        return (w * np.einsum(form, x, toeplitz)).sum()

    f = lambda x, *how: (jnp.asarray(w, "f4") * along(x, axis, *how, chunk=2)).sum()
    given = [jnp.asarray(a, jnp.float32) for a in args]
    grads = jax.jit(jax.grad(f, (0, 1, 2)))(*given)
    close(f(*given), reference(*args))
    for n, gradient in enumerate(grads):
        away = rng.normal(size=args[n].shape)
        at = lambda e: [a + e * away if m == n else a for m, a in enumerate(args)]
        slope = (reference(*at(1e-5)) - reference(*at(-1e-5))) / 2e-5
        size = np.linalg.norm(gradient) * np.linalg.norm(away)
        assert abs((gradient * away).sum() - slope) <= 2e-5 * size, n


def test_mdtpe_looks_back_along_its_axes_only():
    x = jax.random.normal(jax.random.key(0), (1, 12, 4))
    module = MDTPE((3, 4), heads=1)
    params = init(module, jax.random.key(1), x)
    total = lambda x: module.apply(params, x).sum(-1)
    moved = jax.jit(jax.jacobian(total))(x)[0, :, 0]
    at = np.stack(np.unravel_index(np.arange(12), (3, 4)), -1)
    back = at[:, None] - at[None]
    line = (back >= 0).all(-1) & (back == 0).any(-1)
    reach = np.abs(moved).max(-1)
    assert (reach[~line] == 0).all() and (reach[line] > 0).all()


def test_a_network_of_pixels_takes_both():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    model = PixelNet(
        attention=(LightNet(causal=False),) * 2, encoder=MDTPE((4, 4)),
        position=MDLRPE((4, 4)),
    )
    params = jax.jit(model.init)(jax.random.key(1), x)
    layers = params["params"]["layers"]
    for n in range(2):
        assert "theta" in layers[f"layer_{n}"]["mixer"]["position"]
    assert jax.eval_shape(model.apply, params, x).shape == (2, 10)


def test_wrong_settings_say_what_was_expected():
    x = jnp.ones((1, 6, 4))
    for make, message in (
        (lambda: MDLRPE(()), r"dims=\(\)"), (lambda: MDLRPE((3, 0)), "dims="),
        (lambda: MDLRPE((3,), extra=-1), "extra=-1"),
        (lambda: MDLRPE((3,), kind="sine"), "kind='sine'"),
        (lambda: MDTPE((3,), decay_param="tanh"), "decay_param='tanh'"),
        (lambda: MDTPE((2, 4)).init(jax.random.key(0), x), "T=8 tokens"),
        (lambda: MDTPE((2, 3), heads=3).init(jax.random.key(0), x), "heads=3"),
        (lambda: turned(MDLRPE((6,), kind="rotary", learned=False),
                        jnp.ones((1, 6, 1, 3))), "even number"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
