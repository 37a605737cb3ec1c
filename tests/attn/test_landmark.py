"""Landmark Attention: grouped softmax by loops, retrieval, where landmarks go."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract import dispatch
from attn.contract.segments import locate
from attn.landmark import Landmark
from attn.positions import RoPE
from attn.softmax import Softmax
from attn.sparse import grouped_softmax as grouped
from attn.sparse.interleaved import interleave
from models.lm import LM
from experiments.measure import cost
from tests.compiled import step
from tests.laws import close, gradients, stream

B, T, H, K, D, V = 2, 23, 4, 2, 8, 12
FIVE = Landmark(block=4)
SEGMENTS = np.array([
    [1] * 3 + [0] * 2 + [1] * 5 + [2] * 9 + [0] + [3] * 3,
    [0] * 2 + [4] * 6 + [2] * 13 + [0] * 2,
])


def inputs(t=T):
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def by_loops(q, k, v, mark, segment):
    """Section 1 of the paper's mechanism, one query after the other, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, H // K, 2) for a in (k, v))
    o = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i, h in np.ndindex(q.shape[:3]):
        js = [j for j in range(i + 1) if segment[b, j] == segment[b, i] > 0]
        if not js:
            continue
        group = dict(zip(js, np.cumsum([0] + [int(mark[b, j]) for j in js])))
        s = {j: q[b, i, h] @ k[b, j, h] / np.sqrt(D) for j in js}
        outer = [j for j in js if (group[j] == group[i]) != mark[b, j]]
        for j, p in share(s, outer).items():
            if not mark[b, j]:
                o[b, i, h] += p * v[b, j, h]
                continue
            text = [n for n in js if group[n] == group[j] and not mark[b, n]]
            for n, inner in share(s, text).items():
                o[b, i, h] += p * inner * v[b, n, h]
    return o


def share(s, among):
    """The softmax of logits s over the tokens `among`."""
    e = {j: np.exp(s[j] - max(s[n] for n in among)) for j in among}
    return {j: x / sum(e.values()) for j, x in e.items()}


def marks(segment, pos):
    return (pos % FIVE.size == FIVE.block) & (segment > 0)


@pytest.mark.parametrize("tile", [grouped.TILE, 4])
@pytest.mark.parametrize("form", ["regular", "packed", "irregular"])
def test_grouped_softmax_by_loops(form, tile, monkeypatch):
    monkeypatch.setattr(grouped, "TILE", tile)
    q, k, v = inputs()
    segments = jnp.asarray(SEGMENTS) if form == "packed" else None
    now = locate(segments, B, T)
    segment, mark = np.asarray(now.segment), np.asarray(marks(now.segment, now.pos))
    options = {}
    if form == "irregular":
        mark = np.random.default_rng(2).random((B, T)) < 0.3
        options = {"landmark": jnp.asarray(mark)}
    o = FIVE(q, k, v, segments=segments, **options)
    close(o, by_loops(q, k, v, mark, segment))


def test_tiles_do_not_change_gradients(monkeypatch):
    args = inputs(37)
    want = gradients(FIVE, *args)
    monkeypatch.setattr(grouped, "TILE", 5)
    for a, b in zip(gradients(lambda *a: FIVE(*a), *args), want):
        close(a, b, "gradient")


def test_weights_sum_to_one_and_landmark_values_never_count():
    q, k, v = inputs()
    close(FIVE(q, k, jnp.ones_like(v)), np.ones((B, T, H, V)))
    at = jnp.arange(T)[None, :, None, None] % FIVE.size == FIVE.block
    close(FIVE(q, k, jnp.where(at, 1e6, v)), FIVE(q, k, v))
    moved = FIVE(q, jnp.where(at, 3 * k, k), v)
    assert np.abs(moved - FIVE(q, k, v)).max() > 0.01


@pytest.mark.parametrize("selection", ["per_token_and_head", "max_over_heads",
                                       "max_over_tokens"])
def test_retrieving_all_blocks_is_attending_to_all(selection):
    q, k, v = inputs()
    top = dataclasses.replace(FIVE, top_k=9, selection=selection, rope=RoPE())
    exact = dataclasses.replace(FIVE, rope=RoPE())
    for piece in (1, 6, T):
        close(stream(top, q, k, v, T, piece)[0], exact(q, k, v))


def needle(blocks, depth):
    """q, k, v [1,T,1,D] whose last query looks for what stands in one block: its
    landmark and one token of it carry the key."""
    t = blocks * FIVE.size + 1
    rng = np.random.default_rng(3)
    k, v = (rng.normal(size=(1, t, 1, D)) * 0.1 for _ in range(2))
    key, at = np.eye(D)[0] * 9, depth * FIVE.size
    k[0, at + 1, 0] = k[0, at + FIVE.block, 0] = key
    v[0, at + 1, 0] = 5
    q = np.broadcast_to(key, k.shape)
    return tuple(jnp.asarray(a, jnp.float32) for a in (q, k, v))


@pytest.mark.parametrize("depth", [0, 3, 9])
def test_one_block_of_many_is_found(depth):
    q, k, v = needle(12, depth)
    top = dataclasses.replace(FIVE, top_k=1)
    o, _ = stream(top, q, k, v, q.shape[1], 1)
    np.testing.assert_allclose(o[0, -1], FIVE(q, k, v)[0, -1], atol=0.02)
    assert (np.asarray(o[0, -1]) > 4.9).all()


def test_a_block_that_left_the_cache_is_not_found():
    q, k, v = needle(12, 0)
    top = dataclasses.replace(FIVE, top_k=1, cache_blocks=4)
    o, state = stream(top, q, k, v, q.shape[1], 1)
    assert state.k.shape[1] == (4 + 1) * FIVE.size
    assert (np.asarray(o[0, -1]) < 1).all()


def test_a_token_costs_its_own_block_top_k_blocks_and_the_landmarks():
    def work(size, **fields):
        attention = Landmark(block=31, **fields)
        shape = lambda t, h: jax.ShapeDtypeStruct((1, t, h, 64), jnp.float32)
        qkv = shape(size, 4), shape(size, 2), shape(size, 2)
        state = jax.eval_shape(lambda: attention.init_state(size, *qkv))
        return cost.flops(attention.step, state, shape(1, 4), shape(1, 2), shape(1, 2))

    growth = (work(16384, top_k=2) - work(8192, top_k=2)) / 8192
    dense = (work(16384) - work(8192)) / 8192
    assert growth < dense / 20  # a landmark stands for 32 tokens
    ring = work(16384, top_k=2, cache_blocks=8)
    assert ring == work(8192, top_k=2, cache_blocks=8)


@pytest.mark.parametrize("sizes", [(9,), (4, 1, 3, 1, 1, 8), (1,) * 10])
def test_interleaving_a_text_in_pieces(sizes):
    text = jnp.arange(100, 100 + sum(sizes))[None]
    whole, segments, index = interleave(text, block=3, landmark=7)
    want = np.asarray(whole)[np.asarray(segments) > 0]
    assert (np.asarray(whole)[0, np.asarray(index)[0]] == np.asarray(text)[0]).all()
    assert (want == 7).sum() == sum(sizes) // 3
    end, last, found, at = jnp.zeros(1, jnp.int32), jnp.full(1, -1), [], 0
    for size in sizes:
        tokens, ids, _ = interleave(
            text[:, at:at + size], None, end, last, block=3, landmark=7
        )
        now = locate(ids, 1, tokens.shape[1], end, last)
        end, last, at = now.next_pos, now.last_segment, at + size
        found += np.asarray(tokens)[np.asarray(ids) > 0].tolist()
    assert found == want.tolist()


@pytest.mark.parametrize("platform", ("tpu", "gpu"))
def test_blocks_are_retrieved_by_the_kernel(platform, monkeypatch):
    """A piece and a token behind a prompt, with gradients of what is asked."""
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    q, k, v = inputs()
    found = []
    for implementation in ("xla", "pallas"):
        top = Landmark(block=4, top_k=2, rope=RoPE(), implementation=implementation)
        state = top.init_state(T, q, k, v)
        state, _ = step(top, state, *(a[:, :13] for a in (q, k, v)))
        rest = [a[:, 13:22] for a in (q, k, v)]
        f = lambda q, state=state, top=top, rest=rest: step(
            top, state, q, *rest[1:])[1]
        state, o = step(top, state, *rest)
        _, last = step(top, state, *(a[:, 22:] for a in (q, k, v)))
        found.append((o, last, jax.grad(lambda q, f=f: (f(q) ** 2).sum())(rest[0])))
    for n, (a, b) in enumerate(zip(*found[::-1], strict=True)):
        close(a, b, "gradient" if n == 2 else "float32")


def test_interleaving_packed_sequences():
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0, 2, 2, 3]])
    tokens, ids, _ = interleave(
        jnp.arange(10, 20)[None], segments, block=2, landmark=7
    )
    want = [10, 11, 7, 12, 13, 7, 14, 15, 7, 16, 17, 18, 7, 19]
    assert tokens[0].tolist()[:14] == want
    assert ids[0].tolist()[:14] == [1] * 6 + [2] * 3 + [0] + [2] * 3 + [3]


def test_a_language_model_is_a_function_of_the_text():
    model = LM(vocab=11, width=16, heads=2, attention=(Landmark(block=3), Softmax()))
    tokens = jax.random.randint(jax.random.key(0), (2, 14), 0, 11)
    params, read = jax.jit(model.init)(jax.random.key(1), tokens), jax.jit(model.apply)
    whole = read(params, tokens)
    assert whole.shape == (2, 14, 11)
    for sizes in ((5, 1, 8), (1,) * 14):
        state, at = model.init_state(14, tokens), 0
        for size in sizes:
            state, logits = read(params, tokens[:, at:at + size], state)
            close(logits, whole[:, at:at + size], "gradient")
            at += size


def test_dropout_and_jumps_need_a_key():
    q, k, v = inputs()
    noisy = dataclasses.replace(FIVE, dropout=0.5, jump=10, rope=RoPE())
    plain = dataclasses.replace(FIVE, rope=RoPE())
    close(noisy(q, k, v), plain(q, k, v))
    one, again, other = (noisy(q, k, v, key=jax.random.key(n)) for n in (0, 0, 1))
    assert (one == again).all() and not (one == other).all()
    close(one[:, :FIVE.size], plain(q, k, v)[:, :FIVE.size])  # no gate, no jump yet
    gates = dataclasses.replace(FIVE, dropout=0.5)
    many = jax.vmap(lambda key: gates(q, k, v, key=key))(
        jax.random.split(jax.random.key(5), 400)
    )
    assert np.abs(many.mean(0) - FIVE(q, k, v)).max() < 0.3


@pytest.mark.parametrize("fields, message", [
    ({"block": 0}, "block=0"), ({"top_k": -1}, "top_k=-1"),
    ({"cache_blocks": 2}, "cache_blocks=2, top_k=None"),
    ({"top_k": 3, "cache_blocks": 2}, "cache_blocks=2, top_k=3"),
    ({"selection": "best"}, "selection='best'"), ({"dropout": 1.0}, "dropout=1.0"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Landmark(**fields)


def test_forward_mode_is_dense():
    q, k, v = (jax.random.normal(jax.random.key(n), (1, 20, 2, 4)) for n in range(3))
    plain = Landmark(block=3, implementation="dense")
    tangents = (v, q, k)
    _, found = jax.jit(lambda *a: jax.jvp(plain, a, tangents))(q, k, v)

    def both(*args):
        o, back = jax.vjp(Landmark(block=3), *args)
        return o, back(found)

    # <do, J t> of forward mode is <J^T do, t> of the backward pass
    o, grads = jax.jit(both)(q, k, v)
    chex.assert_trees_all_close(o, jax.jit(plain)(q, k, v), atol=1e-6)
    right = sum(jnp.vdot(g, t) for g, t in zip(grads, tangents))
    np.testing.assert_allclose(right, jnp.vdot(found, found), rtol=1e-5)
    with pytest.raises(NotImplementedError, match="implementation='dense'"):
        jax.jvp(Landmark(block=3), (q, k, v), tangents)
