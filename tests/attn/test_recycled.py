"""Recycled Attention: which steps read all, what the others read, what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.exact.dense import weights
from attn.recycled import Recycled
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 30, 4, 2, 8, 12
FEW = Recycled(capacity=5, stride=4)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def row(q, k, held):
    """Weights [2,S] of the two heads of a group over the keys held, in float64."""
    s = np.full((2, len(k)), -np.inf)
    s[:, held] = q @ k[held].T / np.sqrt(D)
    p = np.exp(s - s.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("group", ["max", "mean"])
def test_full_steps_choose_and_the_others_read_few(group):
    policy, prompt = dataclasses.replace(FEW, group=group), 12
    q, k, v = inputs()
    args = tuple(a[:, :prompt] for a in (q, k, v))
    state, o = step(policy, policy.init_state(T, *args), *args)
    close(o, attend(Softmax(), *args))
    join = getattr(np, group)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))

    def best(b, c, t):
        p = join(row(q[b, t, 2 * c:2 * c + 2], k[b, :t + 1, c], range(t + 1)), axis=0)
        return sorted(np.argsort(-p, kind="stable")[:5].tolist())

    held = {(b, c): best(b, c, prompt - 1) for b in range(B) for c in range(K)}
    for n, t in enumerate(range(prompt, T)):
        state, o = step(policy, state, *(
            jnp.asarray(a[:, t:t + 1], jnp.float32) for a in (q, k, v)))
        for (b, c), own in held.items():
            full = (n + 1) % 4 == 0
            own = list(range(t + 1)) if full else [*own, t]
            p = row(q[b, t, 2 * c:2 * c + 2], k[b, :t + 1, c], own)
            close(o[b, 0, 2 * c:2 * c + 2], p @ v[b, :t + 1, c])
            if full:
                own = best(b, c, t)
            else:
                own = sorted(set(own) - {min(own[:-1], key=lambda j: join(p[:, j]))})
            held[b, c] = own
            have = np.sort(np.asarray(state.few.cache.pos[b, :, c]))[1:].tolist()
            assert have == own, (t, full)


def test_rows_decide_for_themselves():
    """A row whose queries stay the same is recycled, one whose queries turn is not."""
    policy = Recycled(capacity=3, schedule="similarity", check_every=1, threshold=0.9)
    q, k, v = inputs()
    q = q.at[1].set(q[1, :1])
    args = tuple(a[:, :20] for a in (q, k, v))
    state, _ = step(policy, policy.init_state(T, *args), *args)
    want = attend(Softmax(), q, k, v)
    for t in range(20, 24):
        state, o = step(policy, state, *(a[:, t:t + 1] for a in (q, k, v)))
        close(o[0], want[0, t:t + 1])
        assert np.abs(o[1] - want[1, t:t + 1]).max() > 1e-3


def test_ragged_rows_and_new_sequences():
    q, k, v = inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 25, [1] * 9 + [2] * 21])
    state, _ = step(FEW, FEW.init_state(T + 4, q, k, v), q, k, v, segments=segments)
    for b, cut in ((0, 5), (1, 9)):
        args = tuple(a[b:b + 1, cut:] for a in (q, k, v))
        alone, _ = step(FEW, FEW.init_state(T + 4, *args), *args)
        assert (state.few.cache.pos[b] == alone.few.cache.pos[0]).all()
    one = inputs(1, 1)
    state, o = step(FEW, state, *one, segments=jnp.asarray([[7], [2]]))
    close(o[0, 0], jnp.repeat(one[2][0, 0], 2, 0))
    assert state.since.tolist() == [0, 1]


def test_training_that_goes_on_reads_the_same_pattern():
    policy = Recycled(capacity=3, stride=4)
    q, k, v = inputs(12)
    o = jax.jit(policy.trained)(q, k, v)
    close(o[:, :4], attend(Softmax(), q, k, v)[:, :4])
    close(o[:, 7::4], attend(Softmax(), q, k, v)[:, 7::4])
    p = weights(jnp.einsum(
        "bhd,bshd->bhs", q[:, 3], jnp.repeat(k[:, :4], 2, 2)) / 8**.5)
    importance = np.asarray(p).reshape(B, K, 2, 4).max(2)
    at = np.sort(np.argsort(-importance, 2)[..., :3], 2)
    for b, c in np.ndindex(B, K):
        own = jnp.asarray([*at[b, c], 4, 5])
        heads = slice(2 * c, 2 * c + 2)
        close(o[b, 5, heads], attend(Softmax(), q[b:b + 1, 5:6, heads],
              k[b:b + 1, own, c:c + 1], v[b:b + 1, own, c:c + 1])[0, 0])
    grads = jax.jit(jax.grad(lambda *a: (policy.trained(*a) ** 2).sum(), (0, 1, 2)))(
        q, k, v)
    assert all(np.isfinite(a).all() and np.abs(a).max() > 0 for a in grads)


def test_training_on_less_than_a_stride_is_exact_and_a_softcap_is_refused():
    q, k, v = inputs(5)
    close(jax.jit(Recycled(capacity=3, stride=8).trained)(q, k, v),
          attend(Softmax(), q, k, v))
    with pytest.raises(NotImplementedError, match="softcap=1.0 is not there"):
        Recycled(softcap=1.0).trained(q, k, v)


def test_what_is_recycled_recovers_more_than_what_is_recent():
    """Of queries that stay alike, the recycled keys hold most of the weight."""
    q, k, v = inputs(60)
    q = 2 * (q[:, :1] + 0.3 * q)
    policy = Recycled(capacity=8, stride=10)
    args = tuple(a[:, :50] for a in (q, k, v))
    state, _ = step(policy, policy.init_state(60, *args), *args)
    p = np.asarray(weights(jnp.einsum(
        "bhd,bshd->bhs", q[:, 55], jnp.repeat(k[:, :50], 2, 2)) / 8**.5))
    kept = np.asarray(state.few.cache.pos).swapaxes(1, 2)  # [B,K,9]
    mass = np.mean([p[b, h, kept[b, h // 2][kept[b, h // 2] >= 0]].sum()
                    for b in range(B) for h in range(H)])
    assert mass > p[..., [0, 1, *range(44, 50)]].sum(-1).mean() + 0.2


@pytest.mark.parametrize("fields", [
    {"capacity": 0}, {"stride": 0}, {"schedule": "never"}, {"group": "sum"}])
def test_wrong_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Recycled(**fields)


def test_pieces_are_exact():
    q, k, v = inputs()
    close(stream(FEW, q, k, v, T, 7)[0][:, :28], attend(Softmax(), q, k, v)[:, :28])
