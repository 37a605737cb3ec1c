"""FlexPrefill: patterns of heads that are known, budgets, what there is no room for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.flexprefill import FlexPrefill
from attn.softmax import Softmax
from attn.sparse import block_scores
from tests.compiled import attend
from tests.laws import close, gradients, inputs, stream

T, B, D = 512, 16, 16
# three columns in three blocks are three tokens, which make one block: the budget
# has to leave room for them
FLEX = FlexPrefill(
    block=B, vs_divisor=B, min_budget=4 * B, tau=0.0, capacity=None)


def heads():
    """q, k [1,T,4,D] of heads that see: first and near tokens; a few columns; blocks of
    the same kind; all alike."""
    rng = np.random.default_rng(0)
    q, k = np.zeros((2, T, 4, D)), np.zeros((2, T, 4, D))
    q, k = q[:1], k[:1]
    # near: positions as slow rotations, so that q.k falls with the distance
    angle = np.arange(T)[:, None] * np.geomspace(0.3, 0.02, D // 2)[None]
    wave = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    q[0, :, 0], k[0, :, 0] = 8 * wave, wave
    k[0, 0, 0] = 3 * wave[-1]
    q[0, :, 1, 0], k[0, [5, 100, 230], 1, 0] = 10, 4
    kind = rng.permutation(np.arange(T // B) % D)
    q[0, :, 2] = np.eye(D)[np.repeat(rng.permutation(kind), B)] * 24
    k[0, :, 2] = np.eye(D)[np.repeat(kind, B)]
    noise = rng.normal(size=k.shape) * 0.05
    return tuple(jnp.asarray(a + noise, jnp.float32) for a in (q, k))


def mass(attention, q, k):
    """The share of all weights [H] that falls on active blocks."""
    active = jax.jit(attention.pattern)(q, k).active
    s = np.einsum("bthd,bshd->bhts", *(np.asarray(a, np.float64) for a in (q, k)))
    s = np.where(np.tri(T) > 0, s / np.sqrt(D), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    n = T // B
    blocks = p.reshape(1, 4, n, B, n, B).sum((3, 5))
    return (blocks * np.asarray(active)).sum((2, 3))[0] / T


def test_known_heads_get_what_they_ask_for():
    q, k = heads()
    held, shares = [], []
    for gamma in (0.7, 0.9, 0.99):
        attention = dataclasses.replace(FLEX, gamma=gamma)
        held.append(mass(attention, q, k))
        shares.append(jax.jit(attention.share)(q, k).active[0])
    held, shares = np.array(held), np.array(shares)
    assert (held[1][[0, 1]] > 0.85).all() and (shares[1][[0, 1]] < 0.4).all(), (
        held, shares)
    assert (np.diff(held, axis=0) >= 0).all() and (np.diff(shares, axis=0) >= 0).all()
    assert shares[1][3] > 0.6  # where all are alike, all are asked for


def test_query_aware_heads_are_those_that_pooled_blocks_predict():
    q, k = heads()
    attention = dataclasses.replace(FLEX, tau=0.1)
    found = jax.jit(attention.pattern)(q, k)
    aware = np.asarray(found.query_aware[0])
    assert (aware == (np.asarray(found.divergence[0]) < 0.1)).all()
    assert aware[3] and not aware[1]
    assert not jax.jit(FLEX.pattern)(q, k).query_aware.any()


def test_the_call_is_attention_to_the_active_blocks():
    q, k, v = inputs(t=75)
    attention = FlexPrefill(
        block=8, gamma=0.6, min_budget=8, vs_divisor=8, tau=0.3, capacity=None)
    active = jax.jit(attention.pattern)(q, k).active
    seen = np.repeat(np.repeat(active, 8, 2), 8, 3)[:, :, :75, :75]
    assert 0.2 < seen.mean() < 0.5

    def dense(q, k, v):
        return Softmax()(q, k, v, mask=jnp.asarray(seen))

    close(attend(attention, q, k, v), jax.jit(dense)(q, k, v))
    for a, b in zip(gradients(lambda *a: attention(*a), q, k, v),
                    gradients(dense, q, k, v)):
        close(a, b, "gradient")


def test_what_there_is_no_room_for_is_dropped_and_said():
    q, k, _ = inputs(t=128)
    few = FlexPrefill(block=8, gamma=0.95, min_budget=8, vs_divisor=8, capacity=4)
    pattern = jax.jit(few.pattern)(q, k)
    chosen = np.asarray(few._listed(pattern))
    asked = np.asarray(pattern.active)
    for row in np.ndindex(asked.shape[:3]):
        kept = set(chosen[row][chosen[row] >= 0].tolist())
        assert len(kept) == min(asked[row].sum(), 4)
        assert {0, row[2]} <= kept <= set(np.flatnonzero(asked[row]).tolist())
    share = jax.jit(few.share)(q, k)
    np.testing.assert_allclose(
        share.active, asked.sum((2, 3)) / (16 * 17 / 2), rtol=1e-6)
    np.testing.assert_allclose(
        share.read, (chosen >= 0).sum((2, 3)) / (16 * 17 / 2), rtol=1e-6)
    assert (np.asarray(share.capped) == (asked.sum(-1) > 4).sum(-1)).all()
    assert (share.capped > 0).all()


def test_a_stream_reads_its_first_piece_as_a_call():
    q, k, v = inputs(t=48)
    attention = FlexPrefill(block=8, gamma=0.6, min_budget=8, vs_divisor=8)
    first, exact = (attend(a, *(x[:, :47] for x in (q, k, v)))
                    for a in (attention, Softmax()))
    o, _ = stream(attention, q, k, v, 60, 47)
    close(o[:, :47], first)
    assert np.abs(first - exact).max() > 0.01
    close(o[:, 47:], attend(Softmax(), q, k, v)[:, 47:])
    again, _ = stream(attention, q, k, v, 60, 24)
    close(again[:, 24:], attend(Softmax(), q, k, v)[:, 24:])


def test_short_prompts_are_read_exactly():
    q, k, v = inputs(t=40)
    close(attend(FlexPrefill(), q, k, v), attend(Softmax(), q, k, v))
    assert FlexPrefill(block=20, min_budget=1).dense_for(40)
    assert not FlexPrefill(block=19, min_budget=1).dense_for(40)


def test_budgets_bound_the_numbers_of_blocks():
    attention = FlexPrefill(block=16, min_budget=40, max_budget=64, vs_divisor=16)
    tokens = jnp.array([1, 50, 63, 64, 9999])
    assert attention._blocks(tokens, 30).tolist() == [3, 4, 4, 4, 4]
    assert attention._blocks(tokens, 2).tolist() == [2] * 5
    # where the most is below the least, the most holds
    odd = dataclasses.replace(attention, max_budget=16)
    assert odd._blocks(tokens, 30).tolist() == [1] * 5


def test_diagonals_by_loops():
    a = np.random.default_rng(0).random((2, 5, 9))
    want = [[sum(row[i, j - 4 + i] for i in range(5) if 0 <= j - 4 + i < 9)
             for j in range(9)] for row in a]
    np.testing.assert_allclose(
        block_scores.diagonals(jnp.asarray(a, jnp.float32)), want, rtol=1e-6)


def test_a_divergence_of_zeros_is_a_number():
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    np.testing.assert_allclose(block_scores.root_divergence(a, b), np.log(2) ** 0.5,
                               rtol=1e-6)
    assert block_scores.root_divergence(a, a) == 0


@pytest.mark.parametrize("fields, message", [
    ({"gamma": 0.0}, "gamma=0.0"), ({"capacity": 1}, "capacity=1"),
    ({"tau": -0.1}, "tau=-0.1"), ({"min_budget": 0}, "min_budget=0"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**fields)
