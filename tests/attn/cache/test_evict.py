"""A cache of a fixed number of slots: one token goes for each that comes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cache import evict, kv as caches, observed
from attn.contract.segments import locate
from attn.h2o import H2O
from attn.masks import Causal
from attn.softmax import Softmax
from attn.tova import TOVA
from pallas_kernels.logits import LogitSpec
from tests.compiled import step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 24, 4, 2, 8, 12
POLICIES = {"h2o": H2O(heavy=5, recent=4), "tova": TOVA(capacity=9)}
EACH = pytest.mark.parametrize("name", POLICIES)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def rows_of(name, q, k, held):
    """Weights [H,S] of one query over the keys that each key head holds, in float64:
    0 for the others."""
    p = np.zeros((H, k.shape[0]))
    for h in range(H):
        at = sorted(held[h // (H // K)])
        s = k[at, h // (H // K)] @ q[h] / np.sqrt(D)
        e = np.exp(s - s.max())
        p[h, at] = e / e.sum()
    return p


def by_hand(name, q, k, v, prompt):
    """What is held [K] after the prompt and after each token, and outputs of tokens."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    c = np.zeros((K, T))
    held, kept, outs = [set() for _ in range(K)], [], []
    for t in range(T):
        for own in held:
            own.add(t)
        p = rows_of(name, q[t], k, held)
        group = p.reshape(K, H // K, T).sum(1)
        c = c + group if name == "h2o" else np.tile(p.mean(0), (K, 1))
        if t >= prompt:
            outs.append(np.stack([
                p[h] @ v[:, h // (H // K)] for h in range(H)]))
        if t >= prompt - 1:
            for n, own in enumerate(held):
                while len(own) > 9:
                    free = [j for j in own if name == "tova" or j < t - 3]
                    own.remove(min(free, key=lambda j: (c[n, j], -j)))
                c[n, [j for j in range(T) if j not in own]] = 0
            kept.append([sorted(own) for own in held])
    return kept, np.stack(outs)


@EACH
def test_what_goes_is_what_the_paper_says(name):
    q, k, v = inputs()
    policy, prompt = POLICIES[name], 14
    state = policy.init_state(T, *(a[:, :prompt] for a in (q, k, v)))
    state, _ = step(policy, state, *(a[:, :prompt] for a in (q, k, v)))
    for b in range(B):
        kept, outs = by_hand(name, q[b], k[b], v[b], prompt)
        now = state
        for n, t in enumerate(range(prompt, T + 1)):
            pos = np.sort(np.asarray(now.cache.pos[b]).T, 1)[:, -9:]
            assert (pos == np.broadcast_to(kept[n], (K, 9))[:len(pos)]).all()
            assert (np.sort(now.cache.pos[b], 0)[0] == -1).all()  # the free slot
            if t < T:
                now, o = step(policy, now, *(a[:, t:t + 1] for a in (q, k, v)))
                close(o[b, 0], outs[n])


@EACH
@pytest.mark.parametrize("piece", [1, 3])
def test_pieces_are_read_with_all_that_is_held(name, piece):
    q, k, v = inputs()
    policy = POLICIES[name]
    o, state = stream(policy, q, k, v, 2 * T, piece)
    assert np.isfinite(o).all() and (np.asarray(state.cache.pos) >= 0).sum(1).max() == 9
    close(o[:, :9], Softmax()(q, k, v)[:, :9])


@EACH
def test_ragged_prompts_and_new_sequences(name):
    """Left and right padding, and a sequence that ends, change nothing."""
    policy, (q, k, v) = POLICIES[name], inputs()
    alone = [stream(policy, *(a[b:b + 1, at] for a in (q, k, v)), T, 11)[1]
             for b, at in ((0, slice(2, 13)), (1, slice(5, 16)))]
    segments = jnp.asarray([
        [0] * 2 + [1] * 11 + [0] * 4, [3] * 5 + [1] * 11 + [0]])
    args = tuple(a[:, :17] for a in (q, k, v))
    state, _ = step(policy, policy.init_state(T, *args), *args, segments=segments)
    for b, want in enumerate(alone):
        for have, a in zip(state.cache[:3], want.cache[:3]):
            close(have[b], a[0])
        close(state.score[b], want.score[0])
    # one token of another sequence empties the memory of its row
    one = tuple(a[:, 20:21] for a in (q, k, v))
    state, o = step(policy, state, *one, segments=jnp.asarray([[7], [1]]))
    assert (np.asarray(state.cache.pos[0]) >= 0).sum(0).max() == 1
    close(o[0, 0], jnp.repeat(v[0, 20], H // K, 0))
    assert state.end.tolist() == [1, 12]


def test_the_sums_of_a_prompt_are_taken_in_tiles():
    q, k, v = inputs(t=2 * observed.TILE + 5)
    now = locate(None, B, q.shape[1])
    cache = Softmax().init_state(q.shape[1], q, k, v)._replace(
        k=k, v=v, pos=now.pos[..., None])
    got = jax.jit(observed.received, static_argnums=4)(
        cache, now.segment, q, now, LogitSpec(Causal()))
    p = observed.row_weights(q, cache, now.segment, now, LogitSpec(Causal()))
    close(got, observed.by_group(p, K).sum(3))


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@EACH
def test_the_kernel_gives_the_sums_too(name, backend, monkeypatch):
    from attn.contract import dispatch
    monkeypatch.setattr(dispatch, "INTERPRETED", backend)
    policy, (q, k, v) = POLICIES[name], inputs()
    kernel = type(policy)(**{**policy.__dict__, "implementation": "pallas"})
    args = tuple(a[:, :12] for a in (q, k, v))
    state, _ = step(policy, policy.init_state(T, *args), *args)
    one = tuple(a[:, 12:13] for a in (q, k, v))
    want, o = step(policy, state, *one)
    have, found = jax.jit(kernel.step)(state, *one)
    close(found, o)
    close(have.score, want.score)
    assert (have.cache.pos == want.cache.pos).all()


def test_of_equal_tokens_the_latest_goes():
    q, k, v = inputs(t=4)
    empty = evict.empty(k, v, 5)
    pos = jnp.broadcast_to(jnp.asarray([3, 0, 2, 1, -1])[None, :, None], (B, 5, K))
    state = empty._replace(cache=empty.cache._replace(pos=pos))
    after = evict.drop_one(state, jnp.zeros((B, 5, K)), 3)
    assert after.cache.pos[0, :, 0].tolist() == [-1, 0, 2, 1, -1]
    assert evict.drop_one(after, jnp.zeros((B, 5, K)), 3).cache.pos[0, 0, 0] == -1
    few = evict.best(state, jnp.zeros((B, 5, K)), 2, 3)
    assert few.cache.pos[0, :, 0].tolist() == [0, 1, -1]


@EACH
def test_the_memory_does_not_grow(name):
    policy, args = POLICIES[name], inputs(t=1)
    sizes = [sum(a.nbytes for a in jax.tree.leaves(policy.init_state(n, *args)))
             for n in (20, 40, 10_000)]
    assert len(set(sizes)) == 1


def test_parts_of_a_long_prompt_receive_what_the_whole_does(monkeypatch):
    """Rows of early parts do not look at late ones: the sums are the same."""
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, v = (jax.random.normal(key, (1, 30, n, 8)) for key, n in zip(keys, (4, 2, 2)))
    cache = caches.empty(k, v, 3)
    segments = jnp.asarray([[0] * 3 + [1] * 13 + [2] * 14])
    now = locate(segments, 1, 30, cache.end, cache.segment)
    both, segment = caches.concat(cache, k, v, now)

    def sums():
        return jax.jit(lambda *args: observed.received(*args, LogitSpec(Causal())))(
            both, segment, q, now)

    whole = sums()
    monkeypatch.setattr(observed, "TILE", 4)
    monkeypatch.setattr(observed, "PARTS", 3)
    close(sums(), whole)
