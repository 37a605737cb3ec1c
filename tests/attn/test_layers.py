"""MultiHead: the four patterns, positions, what is handed over, and wrong calls."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn.based import Based
from attn.baseconv import BaseConv
from attn.landmark import Landmark
from attn.layers import MultiHead
from attn.masks import Causal, Full
from attn.positions import ALiBi, RoPE
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from models.lm import LM
from tests.compiled import apply, init
from tests.laws import close

B, T, S, E, H = 2, 12, 9, 16, 4
X = jax.random.normal(jax.random.key(0), (B, T, E))
CONTEXT = jax.random.normal(jax.random.key(1), (B, S, 6))


def made(layer, *args, **kwargs):
    params = init(layer, jax.random.key(2), *args, **kwargs)
    return params, apply(layer, params, *args, **kwargs)


def test_it_is_projection_rotation_attention_projection():
    layer = MultiHead(Softmax(), heads=H, kv_heads=2, position=RoPE())
    params, y = made(layer, X)
    p = params["params"]
    q, k, v = (jnp.einsum("bte,ehd->bthd", X, p[n]["kernel"]) for n in "qkv")
    pos = jnp.arange(T)[None]
    q, k = (RoPE().rotate(a, pos) for a in (q, k))
    close(y, jnp.einsum("bthd,hde->bte", Softmax()(q, k, v), p["out"]["kernel"]))
    assert p["k"]["kernel"].shape == (E, 2, E // H)


@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_cross_attention(mask):
    layer = MultiHead(Softmax(mask=mask), heads=H)
    params, y = made(layer, X, context=CONTEXT)
    chex.assert_shape(y, (B, T, E))
    assert params["params"]["k"]["kernel"].shape[0] == 6
    # positions of a pair: moving both moves nothing
    # from the last token on, which stands at the last one of the context
    moved = apply(layer, params, X, context=CONTEXT,
                  pos=(5 + S - T + jnp.arange(T)[None], 5 + jnp.arange(S)[None]))
    close(moved, y, "gradient")


def test_segments_of_a_pair():
    layer = MultiHead(Softmax(mask=Full()), heads=H)
    params, _ = made(layer, X, context=CONTEXT)
    seg = jnp.where(jnp.arange(T) < 5, 1, 2)[None].repeat(B, 0)
    kv = jnp.where(jnp.arange(S) < 3, 1, 2)[None].repeat(B, 0)
    y = apply(layer, params, X, context=CONTEXT, segments=(seg, kv))
    for part, other in ((slice(0, 5), slice(0, 3)), (slice(5, T), slice(3, S))):
        close(y[:, part], apply(layer, params, X[:, part], context=CONTEXT[:, other]))


@pytest.mark.parametrize("attention", [
    Softmax(), Based(feature_dim=4), Landmark(block=3), SnapKV(capacity=20, window=4),
], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "kv_heads": 2}],
                         ids=["plain", "options"])
def test_a_stream_is_the_whole(attention, options):
    layer = MultiHead(attention, heads=H, **options)
    params, y = made(layer, X)
    state, parts = layer.init_state(T, X), []
    for at, n in ((0, 5), (5, 1), (6, 6)):
        state, part = apply(layer, params, X[:, at:at + n], state)
        parts.append(part)
    close(jnp.concatenate(parts, 1), y, "gradient")


@dataclasses.dataclass(frozen=True)
class Bare:
    """A user's attention: three methods, and nothing that it inherits."""

    def __call__(self, q, k, v, *, x=None, segments=None):
        return Softmax()(q, k, v, segments=segments)

    def init_state(self, size, q, k, v, *, x=None):
        return Softmax().init_state(size, q, k, v)

    def step(self, state, q, k, v, *, x=None, segments=None):
        return Softmax().step(state, q, k, v, segments=segments)


def test_an_attention_needs_no_more_than_its_methods():
    layer, own = MultiHead(Softmax(), heads=H), MultiHead(Bare(), heads=H)
    params, y = made(layer, X)
    close(apply(own, params, X), y)
    state, first = apply(own, params, X[:, :5], own.init_state(T, X))
    close(first, y[:, :5], "gradient")
    tokens = jnp.arange(2 * T).reshape(2, T) % 9
    lm = LM(vocab=9, width=16, heads=2, attention=(Bare(), Softmax()))
    params = init(lm, jax.random.key(0), tokens)
    want = lm.clone(attention=(Softmax(),) * 2).apply(params, tokens)
    close(apply(lm, params, tokens), want)
    _, logits = apply(lm, params, tokens, lm.init_state(T, tokens))
    close(logits, want, "gradient")


def test_widths_come_from_the_attention_unless_given():
    shape = lambda layer: made(layer, X)[0]["params"]["q"]["kernel"].shape
    assert shape(MultiHead(Based(feature_dim=6), heads=H)) == (E, H, 6)
    assert shape(MultiHead(Based(feature_dim=6), heads=H, head_dim=2)) == (E, H, 2)
    assert shape(MultiHead(Softmax(), heads=H)) == (E, H, 4)
    params = made(MultiHead(Softmax(), heads=3, head_dim=4, value_dim=5), X)[0]
    assert params["params"]["v"]["kernel"].shape == (E, 3, 5)


def test_sinks_take_weight_and_dropout_needs_its_key():
    plain = MultiHead(Softmax(), heads=H)
    params, y = made(plain, X)
    sinks = MultiHead(Softmax(), heads=H, sinks=True)
    sunk = {"params": params["params"] | {"sink": jnp.full((H,), 30.0)}}
    assert np.abs(apply(sinks, sunk, X)).max() < 1e-3 * np.abs(y).max()
    noisy = MultiHead(Softmax(dropout=0.5), heads=H)
    close(apply(noisy, params, X), y)
    dropped = noisy.apply(params, X, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - y).max() > 0.01


def test_positions_are_the_only_order_without_a_mask():
    flip = lambda layer, params: layer.apply(params, X[:, ::-1])[:, ::-1]
    bare = MultiHead(Softmax(mask=Full()), heads=H, position=None)
    params, y = made(bare, X)
    close(flip(bare, params), y)
    placed = MultiHead(Softmax(mask=Full()), heads=H, position=RoPE())
    assert np.abs(flip(placed, params) - apply(placed, params, X)).max() > 1e-3
    biased = MultiHead(Softmax(score=ALiBi(H)), heads=H, position=None)
    assert np.abs(apply(biased, params, X) - y).max() > 1e-3


def test_a_short_convolution_is_a_layer_too():
    layer = BaseConv()
    params, y = made(layer, X)
    state, first = apply(layer, params, X[:, :5], layer.init_state(T, X))
    _, rest = apply(layer, params, X[:, 5:], state)
    close(jnp.concatenate([first, rest], 1), y)


def test_a_layer_in_nnx():
    layer = nnx.bridge.lazy_init(
        nnx.bridge.ToNNX(MultiHead(Softmax(), heads=H), rngs=nnx.Rngs(0)), X
    )
    names = ("q", "k", "v", "out")
    kernels = {n: {"kernel": getattr(layer, n)["kernel"][...]} for n in names}
    params = {"params": kernels}
    close(layer(X), MultiHead(Softmax(), heads=H).apply(params, X))


@pytest.mark.parametrize("layer, args, error, message", [
    (MultiHead(Softmax(), heads=4), (X[0],), ValueError, r"expected \[B,T,E\]"),
    (MultiHead(Softmax(), heads=4, kv_heads=3), (X,), ValueError, "heads=4"),
    (MultiHead(Softmax(), heads=5), (X,), ValueError, "E=16"),
    (MultiHead(Softmax(mask=Full()), heads=4), (X, "state"), NotImplementedError,
     "no stream"),
])
def test_wrong_calls(layer, args, error, message):
    if "state" in args:
        args = X, layer.init_state(T, X)
    with pytest.raises(error, match=message):
        layer.init(jax.random.key(0), *args)


@pytest.mark.parametrize("over,gate,rank", [
    ("head", "silu", None), ("all", "sigmoid", 3), (None, "silu", None),
])
def test_norm_and_gate_of_the_output(over, gate, rank):
    layer = MultiHead(
        Softmax(), heads=H, out_norm=over, out_gate=gate, gate_rank=rank, position=None
    )
    params, y = made(layer, X)
    p = params["params"]
    q, k, v = (jnp.einsum("bte,ehd->bthd", X, p[n]["kernel"]) for n in "qkv")
    o = Softmax()(q, k, v)
    if over is not None:
        axes = -1 if over == "head" else (-2, -1)
        o = o / jnp.sqrt((o * o).mean(axes, keepdims=True) + 1e-6)
        assert p["out_norm"]["scale"].shape == o.shape[3 if over == "head" else 2:]
    x = X if rank is None else X @ p["gate_down"]["kernel"]
    g = jnp.einsum("bte,ehd->bthd", x, p["gate"]["kernel"])
    o = o * (jax.nn.silu(g) if gate == "silu" else jax.nn.sigmoid(g))
    close(y, jnp.einsum("bthd,hde->bte", o, p["out"]["kernel"]))


def test_wrong_norms_and_gates_are_named():
    for wrong, message in (({"out_norm": "layer"}, "out_norm='layer'"),
                           ({"out_gate": "tanh"}, "out_gate='tanh'")):
        with pytest.raises(ValueError, match=message):
            made(MultiHead(Softmax(), heads=H, **wrong), X)
