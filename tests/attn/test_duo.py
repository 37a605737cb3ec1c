"""DuoAttention: gates find the heads that matter, chunks, which heads are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attn import duo
from attn.duo import Duo
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close

B, T, H, K, D = 2, 24, 4, 2, 8
DUO = Duo(retrieval=(1,), sinks=2, recent=5)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (B, t, n, D))
                 for key, n in zip(keys, (H, K, K)))


def test_a_chunk_sees_what_is_held_and_itself():
    q, k, v = inputs()
    state = DUO.init_state(T, *(a[:, :9] for a in (q, k, v)))
    held, outs, at = [], [], 0
    for n in (9, 6, 1, 8):
        part = slice(at, at + n)
        state, o = step(DUO, state, *(a[:, part] for a in (q, k, v)))
        both = held + list(range(at, at + n))
        for t in range(n):
            seen = [j for j in both if j <= at + t]
            close(o[:, t:t + 1, :2], attend(
                Softmax(), q[:, at + t:at + t + 1, :2], k[:, seen, :1], v[:, seen, :1]))
        held = [j for j in both if j < 2] + [j for j in both if j >= 2][-5:]
        at += n
        outs.append(o)
    close(jnp.concatenate(outs, 1)[:, :, 2:], attend(
        Softmax(), q[:, :, 2:], k[:, :, 1:], v[:, :, 1:]))
    assert sorted(state.few.pos[0, :, 0].tolist()) == held


def test_gates_have_a_gradient_where_they_begin():
    grad = jax.grad(lambda a: (duo.opened(a) * jnp.arange(1.0, 6.0)).sum())(
        jnp.asarray([1.0, 0.0, 0.5, 1.5, -0.5]))
    assert grad.tolist() == [1, 2, 3, 0, 0]


def test_trained_gates_keep_the_head_that_looks_far():
    """One key head looks at a far token, the other at its neighbours: training opens
    the gate of the first and closes the other."""
    q, k, v = inputs()
    mark = 5 * jnp.eye(D)[0]
    q = q.at[:, :, 2:].set(mark)
    k = (0.1 * k).at[:, 8, 1].set(mark)
    full, labels = jax.jit(Softmax())(q, k, v), jnp.arange(T)[None].repeat(B, 0) > 15
    q = q.at[:, :, :2].set(0.0)  # of the first head, all keys count alike
    k = k.at[:, :, 0].set(0.0)
    v = v.at[:, :, 0].set(1.0)
    full = jax.jit(Softmax())(q, k, v)

    @jax.jit
    def train(alpha, state):
        def loss(alpha):
            o = duo.mixed(alpha, full, q, k, v, sinks=2, recent=5)
            flat = (a.reshape(B, T, -1) for a in (full, o))
            return duo.distillation(*flat, labels) + 0.05 * duo.regularisation(alpha)

        updates, state = optimiser.update(jax.grad(loss)(alpha), state)
        return jnp.clip(optax.apply_updates(alpha, updates), 0, 1), state

    optimiser = optax.adam(0.05)
    alpha = jnp.ones(K)
    state = optimiser.init(alpha)
    for _ in range(60):
        alpha, state = train(alpha, state)
    assert alpha[1] > 0.8 and alpha[0] < 0.2, alpha
    assert duo.selected(alpha[None], 0.5).tolist() == [[False, True]]


def test_the_share_that_is_asked_for_is_chosen():
    alphas = np.ones((4, 8))
    for sparsity, many in ((0, 32), (0.25, 24), (0.5, 16), (1, 0)):
        assert duo.selected(alphas, sparsity).sum() == many
    rates = [duo.learning_rate(s, 100) for s in range(100)]
    assert rates[0] == 0.1 * 0.02 and max(rates) == rates[50] == 0.02
    assert rates[-1] == 0.1 * 0.02 and min(rates) >= 0.1 * 0.02


def test_mixed_of_open_and_closed_gates():
    q, k, v = inputs()
    full = attend(Softmax(), q, k, v)
    sizes = {"sinks": 2, "recent": 5}
    close(duo.mixed(jnp.ones(K), full, q, k, v, **sizes), full)
    close(duo.mixed(jnp.zeros(K), full, q, k, v, **sizes),
          attend(Softmax(mask=duo.streaming_mask(2, 5)), q, k, v))
    with pytest.raises(ValueError, match="full_source='both'"):
        duo.mixed(jnp.ones(K), full, q, k, v, full_source="both")
