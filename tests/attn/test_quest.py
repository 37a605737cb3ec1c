"""Quest: bounds of pages hold, and the pages with the greatest are read exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.quest import Quest
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 29, 4, 2, 8, 12
QUEST = Quest(page=4, budget=8, least=2)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def filled(quest, q, k, v, size=T + 3):
    return step(quest, quest.init_state(size, q, k, v), q, k, v)


@pytest.mark.parametrize("piece", [1, 5, T])
def test_bounds_hold_however_tokens_came(piece):
    q, k, v = inputs()
    _, state = stream(QUEST, q, k, v, T + 3, piece)
    u = np.asarray(QUEST.bounds(state, q[:, 0]))
    dots = np.einsum("bhd,bshd->bhs", q[:, 0], jnp.repeat(k, 2, 2))
    for page in range(8):
        part = slice(4 * page, min(4 * page + 4, T))
        want = np.maximum(
            q[:, 0] * jnp.repeat(k[:, part].min(1), 2, 1),
            q[:, 0] * jnp.repeat(k[:, part].max(1), 2, 1)).sum(-1)
        np.testing.assert_allclose(u[:, :, page], want, rtol=1e-5, atol=1e-5)
        assert (dots[..., part].max(-1) <= u[:, :, page] + 1e-5).all()
    assert u.shape[2] == 8 and np.isfinite(u).all()


def test_one_token_reads_the_best_pages_exactly():
    q, k, v = inputs()
    one = inputs(1, 1)
    state, o = filled(QUEST, q, k, v)
    close(o, attend(Softmax(), q, k, v))
    after, o = step(QUEST, state, *one)
    k, v = (np.concatenate([a, b], 1) for a, b in zip((k, v), one[1:]))
    u = np.asarray(QUEST.bounds(after, one[0][:, 0]))
    for b in range(B):
        for h in range(H):
            pages = np.argsort(-u[b, h])[:2]
            at = [j for j in range(T + 1) if j // 4 in pages]
            s = k[b, at, h // 2] @ np.asarray(one[0][b, 0, h]) / np.sqrt(D)
            p = np.exp(s - s.max())
            close(o[b, 0, h], p @ v[b, at, h // 2] / p.sum())


def test_the_newest_page_can_be_asked_for():
    q, k, v = inputs()
    k = k.at[:, -1:].set(0)
    for newest in (False, True):
        quest = dataclasses.replace(QUEST, newest=newest)
        state, _ = filled(quest, 3 * q, k, v)
        slots = quest.chosen_slots(state, 3 * q[:, 0])
        assert slots.shape == (B, 8, H)
        assert (slots == T - 1).any(1).all() or not newest


def test_ragged_rows_and_new_sequences():
    q, k, v = inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 24, [1] * 20 + [2] * 9])
    state, _ = step(QUEST, QUEST.init_state(T + 3, q, k, v), q, k, v, segments=segments)
    for b, at in ((0, slice(5, 29)), (1, slice(20, 29))):
        alone, _ = filled(QUEST, *(a[b:b + 1, at] for a in (q, k, v)))
        close(QUEST.bounds(state, q[:, 0])[b, :, :6][:, :-(-(at.stop - at.start) // 4)],
              QUEST.bounds(alone, q[b:b + 1, 0])[0][:, :-(-(at.stop - at.start) // 4)])
    one = inputs(1, 1)
    state, o = step(QUEST, state, *one, segments=jnp.asarray([[4], [2]]))
    close(o[0, 0], jnp.repeat(one[2][0, 0], 2, 0))
    assert (np.asarray(QUEST.bounds(state, q[:, 0]))[0, :, 1:] == -np.inf).all()


@pytest.mark.parametrize("fields", [{"page": 0}, {"budget": 0}, {"least": 0}])
def test_wrong_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Quest(**fields)
