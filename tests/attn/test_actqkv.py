"""ActQKV: the probe, which blocks a window sees, distances, budgets of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.actqkv import ActQKV
from attn.cache import probes
from attn.positions import ALiBi, RoPE
from attn.softmax import Softmax
from tests.compiled import attend
from tests.laws import close, stream

B, T, H, K, D, V = 2, 48, 4, 2, 8, 12
ACT = ActQKV(window=6, sinks=2, local=8, block=4, top_k=2, represent=2)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def turned(act, a, at):
    """a [T,.,D] at positions [T]."""
    if act.rope is None:
        return a
    at = jnp.asarray(at, jnp.int32)[None]
    return np.asarray(act.rope.rotate(jnp.asarray(a, jnp.float32)[None], at)[0], float)


def by_hand(act, q, k, v):
    """All windows of one row, in float64 loops."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    q_true, k_true = turned(act, q, np.arange(T)), turned(act, k, np.arange(T))
    q_far = turned(act, q, np.full(T, act.local))
    score, outs = np.zeros((T, H)), np.zeros((T, H, V))
    for start in range(0, T, act.window):
        ts = range(start, min(start + act.window, T))
        many = max(start - act.local - act.sinks, 0) // act.block
        near = act.sinks + many * act.block if many else 0
        flat = q_far[list(ts)].reshape(len(ts), -1)
        gap = (flat - flat.mean(0)) ** 2
        s2 = gap.sum(0) / max(len(ts) - 1, 1)
        dev = (gap / (s2 + s2.mean() / 100)).mean(1)
        p = (dev / dev.sum()) @ flat
        cos = []
        for n in range(many):
            at = range(act.sinks + 4 * n, act.sinks + 4 * n + 4)
            z = np.concatenate([np.mean([k[j, h // 2] for j in sorted(
                at, key=lambda j: -score[j, h])[:2]], 0) for h in range(H)])
            cos.append(z @ p / np.linalg.norm(z) / np.linalg.norm(p))
        top = np.argsort(-np.array(cos), kind="stable")[:act.top_k]
        far = [*range(act.sinks)] if many else []
        far += [act.sinks + 4 * n + i for n in top for i in range(4)]
        got = np.zeros((T, H))
        for t in ts:
            for h in range(H):
                at = [*far, *range(near, t + 1)]
                s = np.array([
                    q_true[t, h] @ k_true[j, h // 2] if j >= near else
                    q_far[t, h] @ k[j, h // 2] for j in at])
                e = np.exp((s - s.max()) / np.sqrt(D))
                e /= e.sum()
                outs[t, h] = e @ v[at, h // 2]
                for j, x in zip(at, e):
                    got[j, h] += x * (j >= near)
        score += got
    return outs


@pytest.mark.parametrize("rope", [None, RoPE(50.0)])
def test_a_window_sees_first_last_and_the_best_blocks(rope):
    act = dataclasses.replace(ACT, rope=rope)
    q, k, v = inputs()
    o, state = stream(act, q, k, v, T, T)
    pieces, _ = stream(act, q, k, v, T, act.window)
    close(o, pieces)
    for b in range(B):
        want = by_hand(act, q[b], k[b], v[b])
        np.testing.assert_allclose(o[b], want, rtol=2e-4, atol=2e-5)
    assert (state.k == k).all()  # before the rotation


def test_a_local_window_that_covers_all_is_exact():
    q, k, v = inputs()
    act = ActQKV(window=7, local=T, rope=RoPE())
    turned = tuple(RoPE().rotate(a, jnp.arange(T)[None]) for a in (q, k))
    want = attend(Softmax(), *turned, v)
    close(stream(act, q, k, v, T, T)[0], want)
    close(attend(act, q, k, v), want)


def test_a_probe_finds_the_block_that_a_mean_query_loses():
    """Two anchors carry what the window is about; the others are noise."""
    rng, hit = np.random.default_rng(0), np.zeros(2)
    for _ in range(40):
        z = rng.normal(size=(32, 64))
        true = rng.integers(32)
        h = 0.25 * rng.normal(size=(30, 64))
        h[[3, 20]] = 1.2 * z[true] + 0.25 * rng.normal(size=(2, 64))
        h += 0.5 * rng.normal(size=64)  # what all queries have in common
        h = jnp.asarray(h, jnp.float32)[None]
        p = probes.probe(h)[1]
        for n, query in enumerate((p, h.mean(1))):
            score = probes.block_scores(jnp.asarray(z, jnp.float32)[None], query)
            hit[n] += true in np.argsort(-np.asarray(score[0]))[:2]
    assert hit[0] >= hit[1] + 8 and hit[0] > 32, hit


def test_padding_and_equal_queries_have_a_probe():
    h = jax.random.normal(jax.random.key(0), (2, 5, 8))
    real = jnp.asarray([[True] * 5, [False] * 2 + [True] * 3])
    w, p = probes.probe(h, real)
    close(p[1], probes.probe(h[1:, 2:])[1][0])
    assert w[1, :2].tolist() == [0, 0]
    one = probes.probe(jnp.ones((1, 3, 4)))[1]
    close(one[0], jnp.ones(4))
    assert (probes.probe(h, jnp.zeros((2, 5), bool))[1] == 0).all()


def test_ragged_rows():
    q, k, v = inputs()
    segments = jnp.asarray([[0] * 6 + [1] * 42, [1] * 12 + [2] * 36])
    act = dataclasses.replace(ACT, window=6)
    o, _ = stream(act, q, k, v, T, 6, segments)
    for b, cut in ((0, 6), (1, 12)):
        own, _ = stream(act, *(a[b:b + 1, cut:] for a in (q, k, v)), T, 6)
        close(o[b, cut:], own[0])


def test_padding_is_no_window():
    """It notes no entropy, takes nothing of the pool, and moves no later token."""
    act, t = dataclasses.replace(ACT, samples=4), 36

    @jax.jit
    def shared(state, args, segments):
        pool = act.shared_by_layers((state, state), args[0].shape[1])
        return act.step(state._replace(shared=pool), *args, segments=segments)[0]

    # of its windows of 6 tokens those from 18 on have blocks
    segments = jnp.asarray([[1] * 24 + [0] * 12, [1] * t])
    state = shared(act.init_state(T, *inputs(t)), inputs(t), segments)
    assert state.seen.tolist() == [1, 3] and (state.flat[0, 1:] == 0).all()
    left, full = state.shared.left, 2 * act.top_k
    assert (left[0, 4:] == full).all() and (left[1, 4:] < full).all()
    # a token that is not there, beside one that is
    after = shared(state, inputs(1), jnp.asarray([[0], [1]]))
    assert (after.seen - state.seen).tolist() == [0, 1]
    assert after.shared.left[0, 0] == full > after.shared.left[1, 0]


def test_flat_layers_get_more():
    flat, peaked = (probes.entropy(jnp.asarray(a))[1] for a in (
        np.zeros(16), np.r_[1.0, -np.ones(15)]))
    assert flat == pytest.approx(1) and peaked < flat
    assert probes.entropy(jnp.zeros(1))[1] == 0
    means = [0.9, 1.0, 0.5]
    assert probes.shares(means, 1, 30, 1, 99, True) == 20
    assert probes.shares(means, 1, 30, 1, 99, False) == 15
    assert probes.shares(means, 2, -3, 4, 9, True) == 4


@pytest.mark.parametrize("fields, message", [
    ({"represent": 9}, "represent=9"), ({"block": 0}, "block"),
    ({"score": ALiBi(4)}, "score"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ACT, **fields)


def test_a_sequence_that_begins_stands_at_its_true_distances():
    act = dataclasses.replace(ACT, rope=RoPE(50.0))
    old, new = inputs(30), inputs(5, 1)
    state = act.init_state(40, *old)
    state, _ = jax.jit(act.step)(state, *old, segments=jnp.full((B, 30), 1))
    _, o = jax.jit(act.step)(state, *new, segments=jnp.full((B, 5), 2))
    close(o, attend(act, *new))


def test_a_longer_prompt_is_no_longer_program():
    def size(t):
        args = inputs(t)
        state = ACT.init_state(96, *args)
        return len(jax.make_jaxpr(ACT.step)(state, *args).eqns)

    assert size(96) == size(24) < size(27)  # 4 windows, and a half


def test_a_prompt_past_the_memory_is_never_silent():
    q, k, v = inputs(24)
    state = ACT.init_state(20, q, k, v)
    with pytest.raises(ValueError, match="24 tokens for a memory of 20"):
        ACT.step(state, q, k, v)
    _, o = jax.jit(ACT.step)(state, q, k, v)
    assert np.isnan(o[:, 18:]).all() and np.isfinite(o[:, :18]).all()
