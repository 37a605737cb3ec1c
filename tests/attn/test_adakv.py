"""AdaKV: heads compete for one budget, and what they leave is really free."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.adakv import AdaKV
from attn.cache import flat
from attn.exact.dense import weights
from attn.positions import ALiBi
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 60, 4, 2, 8, 12
ADA = AdaKV(capacity=16, window=4, kernel=1)


def inputs(t=T, seed=6):
    """One key head that looks at few keys, and one at many."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    return q.at[:, :, 2:].multiply(0.3), k, v


def prefilled(ada, q, k, v, size=T + 8):
    return step(ada, ada.init_state(size, q, k, v), q, k, v)


def by_hand(ada, q, k):
    """Which keys [B,K] sets each head keeps, in float64 loops."""
    q, k = (np.asarray(a, np.float64) for a in (q, k))
    t, w, mean = q.shape[1], ada.window, ada.capacity - ada.window
    kept = []
    for b in range(B):
        s = np.zeros((K, t - w))
        for h in range(H):
            x = q[b, -w:, h] @ k[b, :, h // 2].T / np.sqrt(D)
            e = np.where(np.tri(w, t, t - w) > 0, np.exp(x), 0)
            s[h // 2] += (e / e.sum(1, keepdims=True)).sum(0)[:-w]
        best = np.argsort(-s.ravel(), kind="stable")[:K * mean]
        count = np.bincount(best // (t - w), minlength=K)
        count = np.rint(count * (1 - ada.floor) + int(mean * ada.floor)).astype(int)
        kept.append([[*sorted(np.argsort(-s[h], kind="stable")[:count[h]]),
                      *range(t - w, t)] for h in range(K)])
    return kept


def held(state, b):
    tokens, heads = (np.asarray(a[b]).ravel() for a in (state.tokens, state.heads))
    return [sorted(tokens[heads == h].tolist()) for h in range(K)]


@pytest.mark.parametrize("floor", [0.2, 1.0])
def test_each_head_keeps_what_it_has_won(floor):
    ada = dataclasses.replace(ADA, floor=floor)
    q, k, v = inputs()
    state, o = prefilled(ada, q, k, v)
    close(o, attend(Softmax(), q, k, v))
    for b, want in enumerate(by_hand(ada, q, k)):
        assert held(state, b) == want
        sizes = [len(a) for a in want]
        assert abs(sizes[0] - sizes[1]) > 3 if floor < 1 else sizes == [16, 16]


def test_decoding_reads_what_each_head_holds():
    q, k, v = inputs()
    state, _ = prefilled(ADA, q, k, v)
    one = inputs(1, 1)
    after, o = step(ADA, state, *one)
    for b, kept in enumerate(by_hand(ADA, q, k)):
        assert held(after, b) == [[*own, T] for own in kept]
        for h in range(H):
            own = jnp.asarray(kept[h // 2])
            keys, vals = (jnp.concatenate([a[b, own, h // 2], new[b, :, h // 2]])
                          for a, new in ((k, one[1]), (v, one[2])))
            p = weights(keys @ one[0][b, 0, h] / np.sqrt(D))
            close(o[b, 0, h], p @ vals)


def test_uniform_budgets_are_snapkv():
    q, k, v = inputs()
    ada = dataclasses.replace(ADA, floor=1.0)
    snap = SnapKV(capacity=16, window=4, kernel=1)
    one = inputs(1, 1)
    states = [prefilled(a, q, k, v)[0] for a in (ada, snap)]
    close(*(step(a, state, *one)[1] for a, state in zip((ada, snap), states)))


def test_the_memory_is_the_sum_of_the_budgets():
    """The compiled step of one token holds and reads K C slots, not K times those of
    the head that has most."""
    q, k, v = jax.eval_shape(lambda: tuple(
        jnp.zeros((1, 4096, n, 64)) for n in (8, 4, 4)))
    one = tuple(jax.ShapeDtypeStruct((1, 1, *a.shape[2:]), a.dtype) for a in (q, k, v))
    found = []
    for capacity in (512, 1024):
        ada = AdaKV(capacity=capacity)
        state = jax.eval_shape(lambda a=ada: a.init_state(4096 + 16, q, k, v))
        compiled = jax.jit(ada.step, donate_argnums=0).lower(state, *one).compile()
        memory = compiled.memory_analysis()
        found.append(memory.argument_size_in_bytes)
        budget = capacity * 4 * 2 * 64 * 4  # keys and values of K C tokens
        assert abs(found[-1] / budget - 1) < 0.1, (found, budget)
        assert memory.temp_size_in_bytes < 0.6 * budget
    assert 1.8 < found[1] / found[0] < 2.2


def test_pieces_ragged_prompts_and_new_sequences():
    q, k, v = inputs()
    # a budget that covers all: pieces change nothing
    ada = dataclasses.replace(ADA, capacity=T + 1)
    close(stream(ada, q, k, v, T + 4, 7)[0], attend(Softmax(), q, k, v))
    segments = jnp.asarray([[0] * 6 + [1] * (T - 6), [2] * 9 + [1] * (T - 9)])
    state, o = step(ADA, ADA.init_state(T + 8, q, k, v), q, k, v, segments=segments)
    for b, cut in enumerate((6, 9)):
        args = tuple(a[b:b + 1, cut:] for a in (q, k, v))
        alone, own = prefilled(ADA, *args)
        assert held(state, b) == held(alone, 0)
        close(o[b, cut:], own[0])
    one = inputs(1, 1)
    state, o = step(ADA, state, *one, segments=jnp.asarray([[9], [1]]))
    assert held(state, 0) == [[0], [0]] and state.end.tolist() == [1, T - 8]
    close(o[0, 0], jnp.repeat(one[2][0, 0], 2, 0))


def test_scores_sinks_and_the_kernel(monkeypatch):
    from attn.contract import dispatch
    q, k, v = inputs()
    ada = dataclasses.replace(ADA, score=ALiBi(H), softcap=4.0)
    sink = jnp.asarray([0.0, 1.0, -1.0, 2.0])
    state, _ = jax.jit(ada.step)(ada.init_state(T + 1, q, k, v), q, k, v, sink=sink)
    one = inputs(1, 1)
    _, o = jax.jit(ada.step)(state, *one, sink=sink)
    for backend in ("tpu", "gpu"):
        monkeypatch.setattr(dispatch, "INTERPRETED", backend)
        kernel = dataclasses.replace(ada, implementation="pallas")
        close(jax.jit(kernel.step)(state, *one, sink=sink)[1], o)


def test_a_flat_cache_drops_what_has_no_room():
    q, k, v = inputs(4)
    cache = flat.empty(k, v, 2)
    assert cache.pos.shape == (B, 2, K)
    pos = jnp.asarray([[0, 3], [5, -1]])[None].repeat(B, 0)
    cache = cache._replace(pos=pos)
    assert cache.tokens[0].tolist() == [[0, 1], [2, -1]]
    assert cache.heads[0].tolist() == [[0, 1], [1, -1]] and cache.used[0] == 3
    kept = flat.keep(cache, pos != 0, 1)
    assert kept.pos[0].tolist() == [[3, 5]]


@pytest.mark.parametrize("fields, message", [
    ({"floor": 1.5}, "floor=1.5"), ({"window": 16}, "window=16"),
    ({"kernel": 2}, "kernel=2"), ({"pool": "sum"}, "pool"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ADA, **fields)
