"""RazorAttention: the compensation token, how it grows, and which heads retrieve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.positions import ALiBi
from attn.razor import Razor, head_scores, retrieval_heads, scopes
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 26, 4, 2, 8, 12
RAZOR = Razor(retrieval=(1,), sinks=2, buffer=5, share=0.0)


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def by_hand(q, k, v, t):
    """The output [B,2,V] of token t of the first key head, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    outs = np.zeros((B, 2, V))
    at = [j for j in range(t + 1) if j < 2 or t - j < 5]
    gone = [j for j in range(t + 1) if j not in at]
    for b in range(B):
        for h in range(2):
            s = k[b, at, 0] @ q[b, t, h] / np.sqrt(D)
            vals = v[b, at, 0]
            if gone:
                mean = k[b, gone, 0].mean(0) @ q[b, t, h] / np.sqrt(D)
                s = np.append(s, mean + np.log(len(gone)))
                vals = np.concatenate([vals, v[b, gone, 0].mean(0)[None]])
            p = np.exp(s - s.max())
            outs[b, h] = p @ vals / p.sum()
    return outs


@pytest.mark.parametrize("prompt", [1, 4, 12, 20])
def test_what_leaves_is_folded_into_one_token(prompt):
    q, k, v = inputs()
    state, o = step(RAZOR, RAZOR.init_state(T, *(a[:, :prompt] for a in (q, k, v))),
                    *(a[:, :prompt] for a in (q, k, v)))
    close(o, attend(Softmax(), *(a[:, :prompt] for a in (q, k, v))))
    for t in range(prompt, T):
        state, o = step(RAZOR, state, *(a[:, t:t + 1] for a in (q, k, v)))
        if t % 5 == 0 or t == T - 1:
            close(o[:, 0, :2], by_hand(q, k, v, t))
            close(o[:, 0, 2:], attend(Softmax(), q[:, t:t + 1], k[:, :t + 1],
                                      v[:, :t + 1])[:, 0, 2:])
    assert state.few.rest.many.tolist() == [T - 7] * B
    close(state.few.rest.k[:, 0], k[:, 2:T - 5, 0].mean(1))


def test_pieces_fold_what_single_tokens_fold():
    q, k, v = inputs()
    states = [stream(RAZOR, q, k, v, T, piece)[1] for piece in (1, 4, 13)]
    for state in states[1:]:
        for have, want in zip(state.few.rest, states[0].few.rest):
            close(have, want)


def test_ragged_rows_and_new_sequences():
    q, k, v = inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 21, [1] * 9 + [2] * 17])
    state, _ = step(RAZOR, RAZOR.init_state(T, q, k, v), q, k, v, segments=segments)
    for b, cut in ((0, 5), (1, 9)):
        args = tuple(a[b:b + 1, cut:] for a in (q, k, v))
        alone, _ = step(RAZOR, RAZOR.init_state(T, *args), *args)
        for have, want in zip(state.few.rest, alone.few.rest):
            close(have[b], want[0])
    one = inputs(1, 1)
    state, o = step(RAZOR, state, *one, segments=jnp.asarray([[8], [2]]))
    close(o[0, 0], jnp.repeat(one[2][0, 0], 2, 0))
    assert state.few.rest.many.tolist() == [0, 11]


def test_the_buffer_follows_the_prompt():
    q, k, v = inputs()
    razor = Razor(retrieval=(1,), sinks=2, buffer=5, share=0.5)
    state = razor.init_state(40, q, k, v)
    assert state.few.k.shape[1] == 2 + 13 and state.whole.k.shape[1] == 40
    state, _ = step(razor, state, q, k, v)
    assert state.few.rest.many.tolist() == [11, 11]


def test_compensation_is_nearer_to_full_attention_than_dropping():
    """Where the mean of far values matters: the claim of the paper's equation."""
    q, k, v = inputs(64)
    q, v = 0.3 * q, v + 2.0 * jnp.linspace(1, -1, 64)[None, :, None, None]
    want = attend(Softmax(), q, k, v)[:, -1, :2]
    gap = []
    for compensate in (True, False):
        razor = Razor(retrieval=(1,), sinks=2, buffer=8, share=0.0,
                      compensate=compensate)
        args = tuple(a[:, :-1] for a in (q, k, v))
        state, _ = step(razor, razor.init_state(64, *args), *args)
        _, o = step(razor, state, *(a[:, -1:] for a in (q, k, v)))
        gap.append(float(jnp.linalg.norm(o[:, 0, :2] - want)))
    assert gap[0] < 0.4 * gap[1], gap


def test_heads_that_copy_are_found():
    block, n = 8, 33
    i, j = np.ogrid[:n, :n]
    far = (i - 1) - (j - 1)
    echo = ((far == block) & (j >= 1)).astype(np.float32)
    induction = ((far == block - 1) & (j >= 2)).astype(np.float32)
    uniform = np.tri(n, dtype=np.float32) / np.arange(1, n + 1)[:, None]
    p = jnp.asarray(np.stack([echo, induction, uniform]))[None]
    found = [np.asarray(a)[0] for a in head_scores(p, block)]
    assert found[0][1] == 1 and found[1][0] == 1
    assert found[0][0] == found[1][1] == 0 and found[0][2] < 0.2
    kept = retrieval_heads(*(a[None] for a in found), 0.34, 0.34)
    assert kept.tolist() == [[True, True, False]]


def test_weights_beyond_the_scope_are_small():
    rng = np.random.default_rng(0)
    wq, wk = (rng.normal(size=(2, 6, 4)) * 0.3 for _ in range(2))
    gamma, beta = rng.normal(size=6), np.zeros(6)
    slopes = np.array([0.5, 0.05])
    reach = scopes(wq, wk, gamma, beta, slopes, eps=1e-4)
    assert reach[1] > reach[0]
    x = rng.normal(size=(400, 6))
    x = gamma * x / np.sqrt((x ** 2).mean(1, keepdims=True)) / np.sqrt(6)
    for h in range(2):
        s = (x @ wq[h]) @ (x @ wk[h]).T
        far = np.arange(400)[:, None] - np.arange(400)
        e = np.where(far >= 0, np.exp(s - slopes[h] * far), 0)
        p = e / e.sum(1, keepdims=True)
        assert p[far > reach[h]].max(initial=0) <= 1e-4


def test_wrong_fields():
    with pytest.raises(ValueError, match="compensate=False"):
        Razor(score=ALiBi(4))
    with pytest.raises(ValueError, match="buffer"):
        Razor(buffer=0)
