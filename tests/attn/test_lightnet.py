"""LightNet against its definition in float64: softmax of keys over time, by channel."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.grid import MDLRPE
from attn.layers import MultiHead
from attn.lightnet import LightNet
from models.lm import LM
from tests.laws import SEGMENTS, B, D, H, T, V, close, gradients, inputs, stream

NONE = -np.inf


def silu(q):
    return q / (1 + np.exp(-q))


def definition(q, k, v, causal, q_seg=None, kv_seg=None, init=NONE, turn=1.0):
    """o [B,T,H,V] in float64; turn [T,S,H,D]: what a position multiplies pairs with."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (b, t, h, d), s = q.shape, k.shape[1]
    k, v = (np.repeat(a, h // a.shape[2], 2) for a in (k, v))
    seen = np.ones((b, t, s), bool)
    if q_seg is not None:
        seen = (q_seg[..., None] == kv_seg[:, None]) & (kv_seg[:, None] > 0)
    if causal:
        seen = seen & np.tril(np.ones((t, s), bool))
    logits = np.where(seen[..., None, None], k[:, None], -np.inf)
    top = np.maximum(logits.max(2, keepdims=True), init)
    top = np.where(np.isfinite(top), top, 0)
    each = np.exp(logits - top)
    total = each.sum(2, keepdims=True) + np.exp(init - top)
    share = each / np.where(total > 0, total, 1) * turn
    return np.einsum("bthd,btshd,bshv->bthv", silu(q), share, v) / np.sqrt(d)


def slopes_agree(f, reference, args, bound=2e-5):
    """Every gradient of f along a random direction against float64 differences."""
    rng, args = np.random.default_rng(0), [np.asarray(a, np.float64) for a in args]
    w = np.asarray(jax.random.normal(jax.random.key(9), reference(*args).shape), "f8")
    found = gradients(f, *(jnp.asarray(a, jnp.float32) for a in args))
    for n, (a, gradient) in enumerate(zip(args, found)):
        away = rng.normal(size=a.shape)
        at = lambda e: [x + e * away if m == n else x for m, x in enumerate(args)]
        scalar = lambda e: (w * reference(*at(e))).sum()
        slope = (scalar(1e-5) - scalar(-1e-5)) / 2e-5
        size = np.linalg.norm(np.asarray(gradient, "f8")) * np.linalg.norm(away)
        assert abs((gradient * away).sum() - slope) <= bound * size + 1e-8, n


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("init", [NONE, 0.0])
def test_it_is_the_definition(causal, packed, init):
    q, k, v = inputs()
    attention = LightNet(causal=causal, init_lse=init, chunk=5)
    seg = (SEGMENTS, SEGMENTS) if packed else (None, None)
    segments = jnp.asarray(SEGMENTS) if packed else None
    f = jax.jit(lambda *a: attention(*a, segments=segments))
    for size in (1, 30):
        o = f(q, size * k, v)
        close(o, definition(q, size * k, v, causal, *seg, init))
    chex.assert_trees_all_equal(o, f(q, 30 * k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_definition(causal):
    q, k, v = inputs(t=7)
    for size, init in ((1, NONE), (1, 0.0), (30, NONE)):
        f = LightNet(causal=causal, init_lse=init, chunk=3)
        slopes_agree(f, lambda *a: definition(*a, causal, init=init), (q, size * k, v))
    segments = jnp.asarray(SEGMENTS[:, 2:9])
    f = lambda *a: LightNet(causal=causal)(*a, segments=segments)
    seg = SEGMENTS[:, 2:9]
    slopes_agree(f, lambda *a: definition(*a, causal, seg, seg), (q, k, v))


def recurrence(memory, top, total, q, k, v):
    """o [B,T,H,V], the recurrence as it is written, in float64."""
    z, outs = top + np.log(total), []
    k, v = (np.repeat(a, H // a.shape[2], 2) for a in (k, v))
    for t in range(q.shape[1]):
        old, z = z, np.logaddexp(z, k[:, t])
        write = np.einsum("bhd,bhv->bhdv", np.exp(k[:, t] - z), v[:, t])
        memory = np.exp(old - z)[..., None] * memory + write
        outs.append(np.einsum("bhd,bhdv->bhv", silu(q[:, t]), memory))
    return np.stack(outs, 1) / np.sqrt(D)


def test_what_a_state_holds_is_exact_and_has_gradients():
    q, k, v = inputs(t=11)
    for size in (1, 30):
        attention = LightNet(chunk=4)
        _, state = stream(attention, q[:, :5], size * k[:, :5], v[:, :5], T, 2)
        rest = q[:, 5:], size * k[:, 5:], v[:, 5:]

        def f(memory, top, total, *rest):
            held = state._replace(memory=memory, top=top, total=total)
            return attention.step(held, *rest)[1]

        args = [np.asarray(a, np.float64) for a in (*state[:3], *rest)]
        close(jax.jit(f)(*state[:3], *rest), recurrence(*args))
        slopes_agree(f, recurrence, args)


def test_an_empty_state_has_no_decay_to_give():
    q, k, v = inputs(t=1)
    state = LightNet().init_state(4, q, k, v)
    assert (state.z == -np.inf).all()
    f = lambda q, k, v: LightNet().step(state, q, k, v)[1]
    close(f(q, k, v), definition(q, k, v, True))
    # one token alone has the whole share, whatever its key is
    dq, dk, dv = gradients(f, q, k, v)
    assert (np.asarray(dk) == 0).all() and np.isfinite(dq).all()
    assert np.abs(dv).max() > 0


def test_keys_that_rise_and_fall_by_hundreds():
    q, k, v = inputs(t=15)
    for ramp in (200.0, -200.0):
        far = k + ramp * jnp.arange(15)[None, :, None, None]
        o = jax.jit(LightNet(chunk=4))(q, far, v)
        close(o, definition(q, far, v, True))
        chex.assert_tree_all_finite(gradients(LightNet(chunk=4), q, far, v))


def test_queries_may_come_from_elsewhere():
    q, k, v = inputs()
    pair = SEGMENTS[:, 3:8], SEGMENTS
    one_scan = LightNet(causal=False)
    for segments in (None, pair):
        more = (None, None) if segments is None else segments
        as_jax = None if segments is None else tuple(map(jnp.asarray, pair))
        o = jax.jit(one_scan)(q[:, :5], k, v, segments=as_jax)
        close(o, definition(q[:, :5], k, v, False, *more))


def test_without_order_tokens_may_come_in_any():
    q, k, v = inputs()
    order = np.random.default_rng(0).permutation(T)
    one_scan = jax.jit(LightNet(causal=False))
    o = one_scan(q, k, v)
    close(one_scan(*(a[:, order] for a in (q, k, v))), o[:, order])
    # the last token of the ordered form has read the same keys
    close(jax.jit(LightNet())(q, k, v)[:, -1], o[:, -1])


@pytest.mark.parametrize("causal", [True, False])
def test_a_position_turns_shares_and_not_keys(causal):
    q, k, v = inputs()
    module = MDLRPE((3, 5), extra=1, learned=False)
    n = np.maximum(np.arange(T) - 1, 0)
    at = np.stack([n // 5, n % 5], -1)
    theta = 10000.0 ** (-2 * np.arange(D // 2) / D)
    angle = (at[:, :, None] * theta).reshape(T, D)
    turn = np.cos(angle[:, None] - angle[None])[:, :, None]
    call = jax.jit(lambda *a: module.apply(
        {}, *a, method=lambda m, *a: LightNet(causal=causal, rope=m, chunk=5)(*a)
    ))
    close(call(q, k, v), definition(q, k, v, causal, turn=turn))


def test_the_layer_of_the_paper_streams():
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    for position in (None, MDLRPE((9,))):
        layer = MultiHead(
            LightNet(), 2, head_dim=4, value_dim=8, position=position, out_norm="all",
            out_gate="silu", gate_rank=3,
        )
        params = jax.jit(layer.init)(jax.random.key(1), x)
        names = {"q", "k", "v", "gate_down", "gate", "out_norm", "out"}
        assert set(params["params"]) == names | ({"position"} if position else set())
        call = jax.jit(layer.apply)
        state, first = call(params, x[:, :4], layer.init_state(9, x[:, :4]))
        _, rest = call(params, x[:, 4:], state)
        close(jnp.concatenate([first, rest], 1), call(params, x))


def test_a_model_streams_and_scans_it():
    tokens = jnp.arange(10)[None] % 7
    model = LM(
        vocab=7, width=16, heads=2, attention=(LightNet(),) * 2, position=MDLRPE((10,))
    )
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    call = jax.jit(model.apply)
    want = call(params, tokens)
    close(jax.jit(model.clone(scan=True).apply)(params, tokens), want)
    state, first = call(params, tokens[:, :6], model.init_state(10, tokens))
    _, rest = call(params, tokens[:, 6:], state)
    close(jnp.concatenate([first, rest], 1), want)


def test_sharding_changes_nothing_under_a_position():
    q, k, v = inputs()
    k = jnp.concatenate([k[:, :6], k[:, 6:] + 40], 1)
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "seq", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    module = MDLRPE((4, 4), learned=False)
    f = lambda axis: jax.jit(jax.value_and_grad(lambda *a: (module.apply(
        {}, *a, method=lambda m, *a: LightNet(rope=m, axis=axis, init_lse=0.0)(*a)
    ) ** 2).sum(), (0, 1, 2)))
    want = f(None)(q, k, v)
    with jax.set_mesh(mesh):
        have = f("seq")(q, k, v)
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want)):
        close(a, b, "gradient")


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (
        ({"activation": "relu"}, "activation='relu'"), ({"chunk": 0}, "chunk=0"),
        ({"init_lse": np.inf}, "init_lse=inf"), ({"init_lse": np.nan}, "init_lse=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            LightNet(**wrong)
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="causal=False"):
        LightNet(causal=False).init_state(4, q, k, v)
    with pytest.raises(ValueError, match="T must be S"):
        LightNet()(q[:, :5], k, v)
    with pytest.raises(NotImplementedError, match="a pair of segments"):
        LightNet()(q, k, v, segments=(jnp.asarray(SEGMENTS),) * 2)
    state = LightNet().init_state(4, q, k, v)
    with pytest.raises(ValueError, match=f"expected .{B}, {H}, {D}, {V - 1}"):
        LightNet().step(state, q, k, v[..., :-1])
