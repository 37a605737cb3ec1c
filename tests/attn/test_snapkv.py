"""SnapKV: what the end of the prompt points to is kept, the rest is really freed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract.segments import locate
from attn.positions import ALiBi
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 40, 4, 2, 8, 12
SNAP = SnapKV(capacity=12, window=4, kernel=3)


def inputs(t=T):
    keys = jax.random.split(jax.random.key(6), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def prefilled(snap, q, k, v, size=T + 8):
    return step(snap, snap.init_state(size, q, k, v), q, k, v)


def by_hand(snap, q, k):
    """The positions [B,heads,C] kept, in float64 loops."""
    q, k = (np.asarray(a, np.float64) for a in (q, k))
    t, w, heads = q.shape[1], snap.window, K if snap.share_group else H
    kept = np.zeros((B, heads, snap.capacity), int)
    for b in range(B):
        pooled = np.zeros((H, t - w))
        for h in range(H):
            s = q[b, :, h] @ k[b, :, h // (H // K)].T / np.sqrt(D)
            e = np.where(np.tri(t) > 0, np.exp(s), 0)
            vote = (e / e.sum(1, keepdims=True))[-w:].sum(0)[:-w]
            half = snap.kernel // 2
            for j in range(t - w):
                near = vote[max(j - half, 0):j + half + 1]
                pooled[h, j] = near.max() if snap.pool == "max" else near.sum()
        if snap.share_group:
            pooled = pooled.reshape(K, H // K, -1).mean(1)
        for head in range(heads):
            best = np.argsort(-pooled[head], kind="stable")[:snap.capacity - w]
            kept[b, head] = [*sorted(best), *range(t - w, t)]
    return kept


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("share", [True, False])
def test_the_window_and_the_most_voted_keys_are_kept(pool, share):
    snap = dataclasses.replace(SNAP, pool=pool, share_group=share)
    if pool == "max":
        snap = dataclasses.replace(snap, kernel=1)  # wider ones tie
    q, k, v = inputs()
    state, o = prefilled(snap, q, k, v)
    want = by_hand(snap, q, k)
    assert (np.moveaxis(np.asarray(state.pos[:, :12]), 1, 2) == want).all()
    close(o, attend(Softmax(), q, k, v))  # the prompt itself is read exactly
    rows = np.moveaxis(want, 2, 1)
    keys = k if share else jnp.repeat(k, H // K, 2)
    taken = np.take_along_axis(np.asarray(keys), rows[..., None], 1)
    assert (np.asarray(state.k[:, :12]) == taken).all()


def test_decoding_reads_what_was_kept_and_what_came_after():
    q, k, v = inputs()
    more = inputs(3)
    state, _ = prefilled(SNAP, q, k, v)
    kept = np.asarray(state.pos[:, :12])
    ks = [np.take_along_axis(np.asarray(a), kept[..., None], 1) for a in (k, v)]
    for n in range(3):
        one = tuple(a[:, n:n + 1] for a in more)
        state, o = step(SNAP, state, *one)
        ks = [np.concatenate([a, b], 1) for a, b in zip(ks, one[1:])]
        close(o, attend(Softmax(), one[0], *(jnp.asarray(a) for a in ks)))
    assert state.end.tolist() == [T + 3] * 2
    assert state.pos[0, 12:15, 0].tolist() == [T, T + 1, T + 2]


def test_memory_is_really_freed():
    bytes_of = lambda snap, t: sum(
        a.nbytes for a in prefilled(snap, *inputs(t), size=t + 8)[0]
    )
    assert bytes_of(SNAP, 40) == bytes_of(SNAP, 80)
    exact = Softmax().init_state(88, *inputs(80))
    assert bytes_of(SNAP, 80) < 0.3 * sum(a.nbytes for a in exact)


def test_a_capacity_that_covers_all_is_exact():
    q, k, v = inputs()
    snap = dataclasses.replace(SNAP, capacity=T)
    close(stream(snap, q, k, v, T, 1)[0], attend(Softmax(), q, k, v))
    state, _ = step(snap, snap.init_state(T + 1, q, k, v), q, k, v)
    _, o = step(snap, state, *(a[:, :1] for a in (q, k, v)))
    exact, _ = step(Softmax(), Softmax().init_state(T + 1, q, k, v), q, k, v)
    close(o, step(Softmax(), exact, *(a[:, :1] for a in (q, k, v)))[1])


def test_a_needle_the_question_points_to_survives_and_recency_loses_it():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, 1, D)) * 0.1, jnp.float32)
               for _ in range(3))
    key = 6 * jnp.eye(D)[0]
    k, v = k.at[0, 7, 0].set(key), v.at[0, 7, 0].set(9.0)
    q = q.at[0, -SNAP.window:, 0].set(key)
    state, _ = prefilled(SNAP, q, k, v)
    assert {6, 7, 8} <= set(np.asarray(state.pos[0, :12, 0]).tolist())
    _, o = step(SNAP, state, q[:, -1:], k[:, :1], v[:, :1])
    assert (np.asarray(o) > 8.9).all()
    recent = attend(Softmax(), q[:, -1:], k[:, -12:], v[:, -12:])
    assert (np.asarray(recent) < 1).all()


def test_ragged_prompts_are_voted_on_by_their_own_end():
    q, k, v = inputs()
    lengths = (T, 25)
    segments = jnp.asarray([[int(t < n) for t in range(T)] for n in lengths])
    state, o = step(SNAP, SNAP.init_state(T + 8, q, k, v), q, k, v, segments=segments)
    for b, n in enumerate(lengths):
        alone, o_alone = prefilled(SNAP, *(a[b:b + 1, :n] for a in (q, k, v)))
        assert (state.pos[b, :12] == alone.pos[0, :12]).all()
        close(o[b, :n], o_alone[0])
    assert locate(segments, B, T).next_pos.tolist() == list(lengths)


@pytest.mark.parametrize("fields, message", [
    ({"window": 12}, "window=12, capacity=12"), ({"window": 0}, "window=0"),
    ({"kernel": 4}, "kernel=4"), ({"pool": "sum"}, "pool='sum'"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SNAP, **fields)


def test_votes_are_the_weights_of_the_attention():
    """With softcap, score and sinks, against float64: what it keeps is what its own
    last queries look at."""
    q, k, v = inputs()
    scores = ALiBi(H)
    sink = jnp.asarray([0.0, 3.0, -jnp.inf, 1.0])
    attention = SnapKV(capacity=9, window=4, kernel=1, softcap=1.5, score=scores)
    logit = np.einsum("bthd,bshd->bhts", *(np.asarray(a, np.float64) for a in (
        q[:, -4:], jnp.repeat(k, H // K, 2)))) * D**-0.5
    logit = 1.5 * np.tanh(logit / 1.5)
    i, j = np.arange(T - 4, T)[:, None], np.arange(T)[None]
    own = np.asarray(scores(np.arange(H)[:, None, None], i[None], j[None]), np.float64)
    e = np.where(j <= i, np.exp(logit + own), 0)
    total = e.sum(-1, keepdims=True) + np.exp(np.asarray(sink))[:, None, None]
    votes = (e / total).sum(2)
    mean = votes.reshape(B, K, H // K, T).mean(2)[..., :T - 4]
    kept = np.sort(np.argsort(-mean, axis=-1)[..., :5], -1)
    state = attention.init_state(T, q, k, v)
    state, _ = jax.jit(attention.step)(state, q, k, v, sink=sink)
    np.testing.assert_array_equal(np.moveaxis(state.pos[:, :5], 2, 1), kept)
    other, _ = SnapKV(capacity=9, window=4, kernel=1).step(
        attention.init_state(T, q, k, v), q, k, v)
    assert (other.pos[:, :5] != state.pos[:, :5]).any()
