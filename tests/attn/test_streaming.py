"""StreamingLLM: sinks and a window, positions by slot, any length of text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.masks import Causal, Sink, Window
from attn.positions import ALiBi, RoPE
from attn.softmax import Softmax
from attn.streaming import Streaming
from tests.compiled import apply, attend, init, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 30, 4, 2, 8, 12
ROPE = RoPE(100.0)


def inputs(t=T):
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def by_hand(q, k, v, sinks, window, rope):
    """Token by token: what is held is laid out anew, and turned to its place."""
    outs = []
    for t in range(q.shape[1]):
        at = [j for j in range(t + 1) if j < sinks or t - j < window]
        n = jnp.arange(len(at))[None]
        one = rope.rotate(q[:, t:t + 1], n[:, -1:])
        outs.append(attend(Softmax(), one, rope.rotate(k[:, at], n), v[:, at]))
    return jnp.concatenate(outs, 1)


def test_positions_count_by_slot():
    q, k, v = inputs(t=16)
    policy = Streaming(sinks=2, window=5, rope=ROPE)
    o, state = stream(policy, q, k, v, 99, 1)
    close(o, by_hand(q, k, v, 2, 5, ROPE))
    assert sorted(state.pos[0, :, 0].tolist()) == [0, 1, 11, 12, 13, 14, 15]
    assert (state.k[0, 0] == k[0, 0]).all()  # stored as they were before the rotation


def test_without_the_shift_it_is_a_mask():
    q, k, v = inputs()
    mask = Causal() & (Window(5) | Sink(2))
    policy = Streaming(sinks=2, window=6, rebase=False, rope=ROPE)
    turned = tuple(ROPE.rotate(a, jnp.arange(T)[None]) for a in (q, k))
    want = attend(Softmax(mask), *turned, v)
    close(stream(policy, q, k, v, 99, 1)[0], want)
    # the score of a position is that of its slot, too
    alibi = Streaming(sinks=2, window=6, score=ALiBi(H))
    o, _ = stream(alibi, q, k, v, 99, 1)
    assert np.abs(o - attend(Softmax(mask, score=ALiBi(H)), q, k, v)).max() > 1e-2
    close(o[:, :8], attend(Softmax(score=ALiBi(H)), q, k, v)[:, :8])


def test_a_prompt_is_exact_and_then_cut():
    q, k, v = inputs()
    policy = Streaming(sinks=2, window=6, rope=ROPE)
    at = jnp.arange(T - 3)[None]
    prompt = tuple(a[:, :T - 3] for a in (q, k, v))
    state, o = step(policy, policy.init_state(T, *prompt), *prompt)
    exact = attend(Softmax(), *(ROPE.rotate(a, at) for a in prompt[:2]), prompt[2])
    close(o, exact)
    close(attend(policy, *prompt), exact)
    assert sorted(state.pos[0, :, 0].tolist()) == [0, 1, *range(21, 27)]
    more = tuple(a[:, T - 3:] for a in (q, k, v))
    # three more tokens at once stand behind what is held, by slot
    _, o = step(policy, state, *more)
    for n in range(3):
        held = [0, 1, *range(21, 28 + n)]
        spot = jnp.arange(len(held))[None]
        one = ROPE.rotate(q[:, 27 + n:28 + n], spot[:, -1:])
        close(o[:, n:n + 1], attend(
            Softmax(), one, ROPE.rotate(k[:, held], spot), v[:, held]))


def test_a_layer_hands_its_rotation_over():
    x = jax.random.normal(jax.random.key(0), (B, 12, 16))
    plain, streaming = (MultiHead(a, heads=H, kv_heads=K) for a in (
        Softmax(), Streaming(sinks=1, window=20)))
    params = init(plain, jax.random.key(1), x)
    close(apply(streaming, params, x), apply(plain, params, x))
    segments = jnp.asarray([[0] * 2 + [1] * 10, [1] * 6 + [2] * 6])
    close(apply(streaming, params, x, segments=segments),
          apply(plain, params, x, segments=segments))
    state, o = apply(streaming, params, x, streaming.init_state(30, x))
    close(o, apply(plain, params, x))


def test_sinks_matter_and_the_memory_does_not_grow():
    """Where queries put their weight on the first token, a window without it is far
    from what the model was trained for, and sinks bring it back."""
    q, k, v = inputs(t=64)
    k, v = k.at[:, 0].set(0).at[:, 0, :, 0].set(6.0), v.at[:, 0].set(0)
    q = q.at[..., 0].add(6.0)
    want = attend(Softmax(), q, k, v)[:, -1]
    gap = []
    for sinks in (0, 1):
        policy = Streaming(sinks=sinks, window=16 - sinks)
        o, state = stream(policy, q, k, v, 1000, 1)
        gap.append(float(jnp.linalg.norm(o[:, -1] - want)))
        assert state.k.shape[1] == 16
    assert gap[1] < 0.3 * gap[0], gap


@pytest.mark.parametrize("fields", [{"sinks": -1}, {"window": 0}])
def test_wrong_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Streaming(**fields)
