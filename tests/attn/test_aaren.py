"""Aaren's own claims: a softmax over every prefix, as a stream of constant memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.aaren import Aaren
from attn.layers import MultiHead
from attn.recurrent.scan import prefix_softmax
from attn.softmax import Softmax
from tests.compiled import apply, init
from tests.laws import B, D, H, K, SEGMENTS, T, V, close, gradients, inputs


def made(attention=Aaren(), **shape):
    """(params, q, k, v)."""
    q, k, v = inputs(**shape)
    return init(attention, jax.random.key(1), q, k, v), q, k, v


def softmax(s, v):
    """Softmax over prefixes in float64: scores [B,T,H], v [B,T,K,V] -> [B,T,H,V]."""
    s, v = (np.asarray(a, np.float64) for a in (s, v))
    v = np.repeat(v, s.shape[2] // v.shape[2], 2)
    m = np.maximum.accumulate(s, 1)
    o = np.zeros((*s.shape, v.shape[-1]))
    for t in range(s.shape[1]):
        p = np.exp(s[:, :t + 1] - m[:, t, None])
        o[:, t] = np.einsum("bih,bihv->bhv", p, v[:, :t + 1]) / p.sum(1)[..., None]
    return o


def test_it_is_softmax_over_prefixes_of_4096_tokens():
    params, q, k, v = made(t=4096, b=1, v=4)
    query = 9 * params["params"]["query"]
    s = np.einsum("btkd,kgd->btkg", k, query.reshape(K, -1, D)) * D**-0.5
    o = jax.jit(Aaren().apply)({"params": {"query": query}}, q, k, v)
    want = softmax(s.reshape(1, 4096, H), v)
    assert np.abs(np.asarray(o) - want).max() <= 1e-5
    close(o, want)


@pytest.mark.parametrize("kind", ["large", "low", "ramp", "fall", "equal"])
def test_scores_of_any_size(kind):
    t = 200
    s = np.asarray(jax.random.normal(jax.random.key(2), (B, t, H)))
    v = inputs(t=t)[2]
    steps = 40.0 * np.arange(t)[None, :, None] * np.ones_like(s)
    s = {"large": 1000 + 2 * s, "low": -3000 + s, "ramp": steps - 500, "fall": -steps,
         "equal": 0 * s + 7}[kind].astype(np.float32)
    close(prefix_softmax(jnp.asarray(s), v, chunk=16)[1], softmax(s, v))


def test_the_gradient_is_exact_where_one_token_has_all_the_weight():
    t = 15
    s = np.float32(-500 + 40 * np.arange(t)[None, :, None] * np.ones((B, t, H)))
    v, do = inputs(t=t)[2], jax.random.normal(jax.random.key(3), (B, t, H, V))
    want = np.zeros(s.shape)
    wide = np.repeat(np.asarray(v, np.float64), H // K, 2)
    for i in range(t):
        p = np.exp(np.float64(s[:, :i + 1]) - s[:, i, None])
        p /= p.sum(1, keepdims=True)
        # from the greatest: what is left of the others is not rounded away
        a = np.einsum("bihv,bhv->bih", wide[:, :i + 1] - wide[:, i, None], do[:, i])
        want[:, :i + 1] += p * (a - (p * a).sum(1, keepdims=True))
    assert np.abs(want).max() < 1e-15
    for chunk in (4, 64):
        f = lambda s: prefix_softmax(s, v, chunk=chunk)[1]
        have = np.asarray(jax.vjp(f, jnp.asarray(s))[1](do)[0], np.float64)
        assert np.linalg.norm(have - want) <= 1e-6 * np.linalg.norm(want)


def test_the_query_is_learned_and_q_is_not_read():
    params, q, k, v = made()
    assert jax.tree.map(jnp.shape, params) == {"params": {"query": (H, D)}}
    f = lambda params, q: Aaren().apply(params, q, k, v)
    grads = gradients(f, params, q)
    assert (np.asarray(grads[1]) == 0).all()
    query = lambda flat: {"params": {"query": flat}}
    g = lambda a: (f(query(a), q) * jnp.cos(q.sum(-1, keepdims=True))).sum()
    own = np.asarray(params["params"]["query"])
    ahead = np.asarray(jax.random.normal(jax.random.key(4), own.shape))
    slope = (g(own + 1e-2 * ahead) - g(own - 1e-2 * ahead)) / 2e-2
    np.testing.assert_allclose(slope, (jax.grad(g)(own) * ahead).sum(), rtol=2e-3)
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    close(f(params, shape), f(params, q))


def test_the_layer_projects_no_query():
    x = jax.random.normal(jax.random.key(0), (B, T, 32))
    layer = MultiHead(Aaren(), heads=H, kv_heads=K, qk_norm=True)
    params = init(layer, jax.random.key(1), x)
    assert set(params["params"]) == {"attention", "k", "k_norm", "v", "out"}
    y = apply(layer, params, x)
    state, outs = layer.init_state(T, x), []
    for t in range(T):
        state, o = apply(layer, params, x[:, t:t + 1], state)
        outs.append(o)
    close(jnp.concatenate(outs, 1), y)
    full = MultiHead(Softmax(), heads=H, kv_heads=K, qk_norm=True)
    size = lambda p: sum(a.size for a in jax.tree.leaves(p))
    more = size(init(full, jax.random.key(1), x)) - size(params)
    assert more == 32 * 32 + 8 - 32  # W_q and the scale of its norm, not a query


def test_the_state_is_as_large_after_any_number_of_tokens():
    params, q, k, v = made()
    sizes = set()
    for size in (1, 10, 10**9):
        state = Aaren().init_state(size, q, k, v)
        sizes.add(sum(a.size for a in jax.tree.leaves(state.memory)))
    assert sizes == {B * H * (V + 2)}
    step = lambda state, n: Aaren().apply(
        params, state, *(a[:, n:n + 1] for a in (q, k, v)), method="step")
    state, _ = step(Aaren().init_state(1, q, k, v), 0)
    state, _ = step(state, 1)  # nothing runs full
    assert state.end.tolist() == [2, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_all_keys_for_every_query(packed):
    params, q, k, v = made()
    seg = jnp.asarray(SEGMENTS)
    whole, causal = Aaren(causal=False), Aaren()
    more = {"segments": seg} if packed else {}
    o = apply(whole, params, q, k, v, **more)
    last = apply(causal, params, q, k, v, **more)
    for row in range(B):
        for i in range(T):
            at = np.nonzero(SEGMENTS[row] == SEGMENTS[row, i])[0] if packed else [T - 1]
            want = last[row, at[-1]]
            close(o[row, i], 0 * want if packed and SEGMENTS[row, i] == 0 else want)
    # of other tokens, in another order
    other = jnp.asarray([[2, 1, 3, 1, 0], [3, 1, 1, 9, 3]])
    if packed:
        cross = apply(whole, params, q[:, :5], k, v, segments=(other, seg))
        for row in range(B):
            for i in range(5):
                at = np.nonzero((SEGMENTS[row] == int(other[row, i])) & (
                    SEGMENTS[row] > 0))[0]
                close(cross[row, i], o[row, at[0]] if len(at) else 0 * o[row, 0])
    else:
        close(apply(whole, params, q[:, :5], k, v), o[:, :5])


@pytest.mark.parametrize("packed", [False, True])
def test_all_keys_over_a_mesh(packed):
    params, q, k, v = made()
    more = {"segments": jnp.asarray(SEGMENTS)} if packed else {}
    f = lambda axis: lambda k, v: Aaren(causal=False, axis=axis).apply(
        params, q, k, v, **more)
    want = f(None)(k, v), gradients(f(None), k, v)
    mesh = jax.make_mesh(
        (1, 4, 2), ("data", "seq", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        have = jax.jit(f("seq"))(k, v), gradients(f("seq"), k, v)
    close(have[0], want[0])
    for a, b in zip(have[1], want[1]):
        close(a, b, "gradient")


def test_what_it_does_not_do():
    params, q, k, v = made()
    with pytest.raises(NotImplementedError, match="causal=False"):
        Aaren(causal=False).init_state(T, q, k, v)
    with pytest.raises(NotImplementedError, match="pair of segments"):
        seg = jnp.asarray(SEGMENTS)
        Aaren().apply(params, q, k, v, segments=(seg, seg))
    with pytest.raises(ValueError, match="chunk=0"):
        Aaren(chunk=0)
    with pytest.raises(ValueError, match="expected an AarenState"):
        Aaren().apply(params, None, q, k, v, method="step")
