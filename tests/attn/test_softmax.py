"""Exact attention against float64: every option, the gradient of every input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Full, Mask, Sink, Window
from attn.positions import ALiBi
from attn.softmax import Softmax
from experiments.measure import cost
from tests.laws import TOLERANCE, close
from tests.oracles.softmax import best as attend, oracle

B, T, S, H, K, D, V = 2, 21, 29, 4, 2, 8, 12
TILE = (8, 10)


class ByHead(Mask):
    """Even heads see all that came, odd heads the last three."""

    def __call__(self, h, i, j):
        return (j <= i) & ((h % 2 == 0) | (i - j < 3))

    def bounds(self, i, j):
        return Causal().bounds(i, j)[0], i[0] != i[0]


def inputs(t=T, s=S, scale=1.0):
    keys = jax.random.split(jax.random.key(5), 4)
    shapes = (B, t, H, D), (B, s, K, D), (B, s, K, V), (B, t, H, V)
    q, *rest = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes))
    return q * scale, *rest


def holds(q, k, v, do, *, bias=None, sink=None, dlse=None, tile=TILE, **options):
    """attend agrees with the oracle: o, lse and every gradient."""
    o, lse, want = oracle(q, k, v, do, bias=bias, sink=sink, dlse=dlse, **options)
    args = {"q": q, "k": k, "v": v} | {
        n: a for n, a in (("bias", bias), ("sink", sink)) if a is not None
    }
    f = lambda a: attend(a["q"], a["k"], a["v"], bias=a.get("bias"), sink=a.get("sink"),
                         tile=tile, **options)
    (o_have, lse_have), back = jax.vjp(jax.jit(f), args)
    close(o_have, o)
    finite = np.isfinite(lse)
    assert (np.isfinite(lse_have) == finite).all()
    close(np.where(finite, lse_have, 0), np.where(finite, lse, 0))
    cotangent = jnp.zeros_like(lse_have) if dlse is None else dlse
    for name, grad in back((do, cotangent))[0].items():
        # where a row has one key, or a bias is one for the row, the gradient is 0
        gap = np.linalg.norm(np.asarray(grad, np.float64) - want[name])
        assert gap <= TOLERANCE["gradient"] * max(np.linalg.norm(want[name]), 1), name


SINKS = Causal() & (Window(5) | Sink(2))


@pytest.mark.parametrize("options", [
    {}, {"mask": Causal()}, {"mask": SINKS}, {"mask": Window(3, right=4)},
    {"mask": ByHead()}, {"mask": Causal(), "softcap": 2.0},
    {"mask": Causal(), "score": ALiBi(H)}, {"mask": ~Full()},
    {"mask": ~Causal(), "softcap": 3.0},
], ids=str)
@pytest.mark.parametrize("sizes", [(T, S), (S, S), (1, 1), (1, S), (17, 16)])
def test_against_float64(options, sizes):
    holds(*inputs(*sizes), **options)


@pytest.mark.parametrize("shape", [
    (B, H, T, S), (1, H, T, S), (B, 1, T, S), (1, 1, T, S), (1, H, 1, S), (B, 1, T, 1),
    (1, 1, 1, 1),
])
def test_bias_of_any_broadcast_form(shape):
    bias = jax.random.normal(jax.random.key(1), shape)
    holds(*inputs(), bias=bias, mask=Causal())


def test_sinks_and_the_cotangent_of_lse():
    q, k, v, do = inputs()
    sink = jnp.array([-1.0, 0.0, 2.0, 5.0])
    dlse = jax.random.normal(jax.random.key(2), (B, H, T))
    holds(q, k, v, do, mask=Causal(), sink=sink, dlse=dlse)
    holds(q, k, v, do, mask=SINKS, dlse=dlse, softcap=4.0)
    holds(q, k, v, do, mask=~Full(), sink=sink, dlse=dlse)


def test_large_logits_and_tiles_of_any_size():
    for tile in ((64, 64), (1, 1), (5, 29), (21, 3)):
        holds(*inputs(scale=30.0), mask=Causal(), tile=tile)


def test_dropout_by_a_given_choice():
    keep = jax.random.bernoulli(jax.random.key(3), 0.7, (B, H, T, S))
    holds(*inputs(), mask=Causal(), keep=keep, dropout=0.3)


def test_dropout_by_a_key():
    q, k, v, _ = inputs()
    f = lambda key, tile=TILE: attend(
        q, k, v, dropout=0.4, key=jax.random.key(key), tile=tile
    )[0]
    one, again, tiles, other = f(0), f(0), f(0, (7, 13)), f(1)
    assert (one == again).all() and not (one == other).all()
    close(tiles, one)
    # values of one make the outputs the sum of the kept weights
    ones = jnp.ones_like(v)
    kept = lambda key: attend(q * 0, k, ones, dropout=0.4, key=key)[0]
    shares = jax.vmap(kept)(jax.random.split(jax.random.key(4), 300))
    assert abs(float(shares.mean()) - 1) < 0.005
    close(shares.var(), 0.4 / 0.6 / S * np.ones(()), "low")
    plain = Softmax(mask=Full(), dropout=0.4)
    close(plain(q, k, v), Softmax(mask=Full())(q, k, v))


def test_slots_that_are_empty_or_differ_by_head():
    q, k, v, _ = inputs()
    pos = np.random.default_rng(0).integers(-1, T, (B, S, K))
    q_pos = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    o, lse = attend(q, k, v, mask=Causal(), q_pos=q_pos, kv_pos=jnp.asarray(pos),
                    tile=TILE)
    for b in range(B):
        for h in range(H):
            own = pos[b, :, h // 2]
            for t in (0, 9, T - 1):
                at = np.nonzero((own >= 0) & (own <= t))[0]
                s = np.asarray(k[b, at, h // 2]) @ np.asarray(q[b, t, h]) / np.sqrt(D)
                p = np.exp(s) / max(np.exp(s).sum(), 1e-30)
                close(o[b, t, h], p @ np.asarray(v[b, at, h // 2]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    q, k, v, _ = (a.astype(dtype) for a in inputs(T, T))
    o, lse = attend(q, k, v, mask=Causal(), tile=TILE)
    assert o.dtype == dtype and lse.dtype == jnp.float32
    exact = attend(*(a.astype(jnp.float32) for a in (q, k, v)), mask=Causal())[0]
    gap = jnp.linalg.norm(o.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert gap < (0.006 if dtype == jnp.bfloat16 else 0.001)


def test_packed_rows_cost_less_time_but_no_more_memory():
    shape = lambda t: tuple(jax.ShapeDtypeStruct((1, t, h, 16), jnp.float32)
                            for h in (4, 2, 2))
    run = lambda t: jax.ShapeDtypeStruct((1, t), jnp.int32)
    f = lambda q, k, v, s: (Softmax()(q, k, v, segments=s) ** 2).sum()
    space = [cost.memory(jax.grad(f, (0, 1, 2)), *shape(t), run(t))
             for t in (2048, 4096, 8192)]
    assert cost.slope(space) < 1.1


@pytest.mark.parametrize("mask, room", [(SINKS, 8), (Causal() & Window(5), 6)])
@pytest.mark.parametrize("piece", [1, 3, 7])
def test_a_ring_holds_what_can_be_seen_and_never_ends(mask, room, piece):
    q, k, v, _ = inputs(T, T)
    attention = Softmax(mask)
    state, outs = attention.init_state(1000, q, k, v), []
    assert state.k.shape[1] == room
    for at in range(0, T, piece):
        part = slice(at, at + piece)
        state, o = attention.step(state, q[:, part], k[:, part], v[:, part])
        outs.append(o)
    close(jnp.concatenate(outs, 1), attention(q, k, v))


def test_cross_attention_with_lengths():
    q, k, v, _ = inputs()
    seg = np.zeros((B, S), np.int32)
    seg[0, :11], seg[1, :S] = 1, 1
    o = Softmax(mask=Full())(q, k, v, segments=(jnp.ones((B, T), jnp.int32),
                                                jnp.asarray(seg)))
    close(o[:1], Softmax(mask=Full())(q[:1], k[:1, :11], v[:1, :11]))
    close(o[1:], Softmax(mask=Full())(q[1:], k[1:], v[1:]))


def test_packed_cross_attention_aligns_at_the_last_token():
    q, k, v, _ = inputs()
    q_seg = jnp.repeat(jnp.array([[1, 2]]), 7, 1).repeat(B, 0)
    kv_seg = jnp.repeat(jnp.array([[1, 2]]), 10, 1).repeat(B, 0)
    o = Softmax()(q[:, :14], k[:, :20], v[:, :20], segments=(q_seg, kv_seg))
    for a, b in ((slice(0, 7), slice(0, 10)), (slice(7, 14), slice(10, 20))):
        close(o[:, a], Softmax()(q[:, a], k[:, b], v[:, b]))


@pytest.mark.parametrize("make, message", [
    (lambda: Softmax(dropout=1.0), "dropout=1.0"),
    (lambda: Softmax(softcap=0.0), "softcap=0.0"),
    (lambda: Softmax(mask=Causal() & Sink(0)), "hides every key"),
    (lambda: Softmax(mask=Full()).step(None, *inputs(T, T)[:3]), "no stream|Cache"),
])
def test_wrong_fields(make, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make()


def test_a_bias_has_no_place_in_a_stream():
    q, k, v, _ = inputs(T, T)
    state = Softmax().init_state(T, q, k, v)
    with pytest.raises(NotImplementedError, match="bias"):
        Softmax().step(state, q, k, v, bias=jnp.zeros((1, 1, T, T)))
    with pytest.raises(ValueError, match="expected a Cache"):
        Softmax().step((), q, k, v)
    other = dataclasses.replace(Softmax(), mask=Causal()).init_state(T, q, q, q)
    with pytest.raises(ValueError, match="the state holds"):
        Softmax().step(other, q, k, v)


def test_a_call_goes_on_behind_the_warning_of_heads_in_the_place_of_tokens():
    q = jax.ShapeDtypeStruct((1, 3, 8, 4), jnp.float32)
    with pytest.warns(UserWarning, match="swap axes 1 and 2"):
        assert jax.eval_shape(Softmax(), q, q, q).shape == q.shape
