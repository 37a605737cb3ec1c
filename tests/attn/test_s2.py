"""S2-Attention: shards that differ, a cache of one shard a head, layers between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Full
from attn.s2 import S2, hybrid
from attn.softmax import Softmax
from attn.sparse import chosen_blocks
from attn.sparse.shards import columns, coverage, forgets
from experiments.measure import cost
from pallas_kernels.logits import LogitSpec
from tests.compiled import attend, step
from tests.laws import close, run, stream
from tests.oracles.softmax import attention, oracle

B, T, H, K, D, V = 2, 43, 4, 2, 8, 12
FEW = S2(block=2, local=2, stride=4)


def inputs(t=T):
    keys = jax.random.split(jax.random.key(2), 4)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V), (B, t, H, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def seen_by_loops(s2, heads, kv_heads, t):
    """Section 1 of the mechanism, pair by pair."""
    seen, step = np.zeros((heads, t, t), bool), max(1, int(s2.stride / heads))
    for h, i, j in np.ndindex(seen.shape):
        m, n, head = i // s2.block, j // s2.block, h // (heads // kv_heads)
        mine = (n + head * step + s2.offset) % s2.stride == 0
        seen[h, i, j] = j <= i and (
            m - n < s2.local or mine or head >= kv_heads - s2.dense)
    return seen


@pytest.mark.parametrize("s2", [
    FEW, S2(block=3, local=1, stride=9, offset=2), S2(block=2, stride=3, local=2,
                                                      dense=1),
], ids=str)
def test_window_and_shards_apart_are_the_pattern(s2):
    q, k, v, do = inputs()
    seen = seen_by_loops(s2, H, K, T)
    pattern = s2.pattern(H, K)
    assert (pattern(*np.ogrid[:H, :T, :T]) == seen).all()
    o, _, grads = oracle(q, k, v, do, mask=pattern)
    have, have_grads = run(s2, q, k, v, do=do)
    close(have, o)
    for name, grad in zip("qkv", have_grads, strict=True):
        close(grad, grads[name], "gradient")


@pytest.mark.parametrize("s2, exact", [
    (S2(block=2, local=22), Softmax()), (S2(block=2, local=1, stride=1), Softmax()),
    (S2(block=2, local=1, dense=K), Softmax()),
    (S2(block=2, local=1, stride=1, causal=False), Softmax(mask=Full())),
    (S2(block=3, local=15, causal=False), Softmax(mask=Full())),
], ids=str)
def test_it_is_exact_attention_in_the_limit(s2, exact):
    q, k, v, _ = inputs()
    close(attend(s2, q, k, v), attend(exact, q, k, v))


def test_without_an_order_a_head_sees_the_same_on_both_sides():
    s2 = S2(block=2, local=2, ahead=1, stride=3, causal=False)
    q, k, v, _ = inputs()
    n = np.arange(T) // 2
    gap = n[:, None] - n[None]
    away = np.maximum(gap - 1, 0) + np.maximum(-gap, 0)
    close(attend(s2, q, k, v), attention(q, k, v, away % 3 == 0))
    with pytest.raises(NotImplementedError, match="causal=False"):
        s2.init_state(T, q, k, v)


@pytest.mark.parametrize("pieces", [(T,), (13, 9, 1, 1, 12, 7), (3, 40)])
@pytest.mark.parametrize("s2", [FEW, S2(block=2, local=1, stride=3, dense=1)], ids=str)
def test_a_stream_reads_pieces_of_any_length(s2, pieces):
    q, k, v, _ = inputs()
    state, outs, at = s2.init_state(T, q, k, v), [], 0
    for n in pieces:
        part = (a[:, at:at + n] for a in (q, k, v))
        state, o = step(s2, state, *part)
        outs.append(o)
        at += n
    close(jnp.concatenate(outs, 1), attend(s2, q, k, v))


def test_a_key_head_remembers_its_window_and_its_shard():
    q, k, v, _ = inputs(t=4)
    state = jax.eval_shape(lambda: S2(block=64, local=4).init_state(4096, q, k, v))
    # (local + 4096 / (stride block)) block = 256 + 512 of 4,096 tokens
    assert state.k.shape == (B, 768, K, D) and state.whole is None
    dense = S2(block=64, local=4, dense=1)
    state = jax.eval_shape(lambda: dense.init_state(4096, q, k, v))
    assert state.k.shape == (B, 768, K - 1, D)
    assert state.whole.k.shape == (B, 4096, 1, D)
    # what is held at last is what the last query sees, and no other token
    q, k, v, _ = inputs()
    _, state = stream(FEW, q, k, v, T, 1)
    seen = FEW.pattern(H, K)(np.arange(0, H, H // K)[:, None], T, np.arange(T)[None])
    for head in range(K):
        held = np.asarray(state.sharded.pos)[0, :, head]
        assert set(np.nonzero(seen[head])[0]) <= set(held)


def test_the_share_of_what_is_read_is_what_is_paid():
    s2, t = S2(block=64, local=4, stride=8), 4096
    blocks = s2.blocks(8, 8, t)
    m = t // 64
    share = blocks.sum() / 8 / (m * (m + 1) / 2)
    assert 0.2 < share < 0.25  # of the causal tiles: about 2 L / M + 1 / s
    paid = []
    for t in (4096, 16384):
        shapes = [jax.ShapeDtypeStruct((1, t, 8, 64), jnp.float32)] * 3
        paid.append(cost.flops(s2, *shapes) / cost.flops(Softmax(), *shapes))
    # tiles of 256 x 512 that the edge of the window or a shard cuts are paid whole:
    # less of them in a longer text, of which a shard is 1 / 8
    assert share < paid[0] < 0.6 and 1 / 8 < paid[1] < 0.3, paid


def test_heads_of_different_shards_cover_the_past():
    assert coverage(S2(block=2, local=1, stride=4).blocks(4, 4, 64)) == 1
    assert coverage(S2(block=2, local=1, stride=8).blocks(4, 4, 64)) < 1
    with pytest.warns(UserWarning, match="together see .* of the past"):
        same = S2(block=2, local=1, stride=4, homogeneous=True)
        assert coverage(same.blocks(4, 4, 64)) < 0.35


def test_any_pattern_is_read_by_its_columns():
    pattern = np.tril(np.random.default_rng(0).random((H, 6, 6)) < 0.4)
    pattern |= np.eye(6, dtype=bool)
    assert not forgets(pattern) and forgets(FEW.blocks(H, H, 48))
    q, k, v, _ = inputs(t=48)
    chosen = jnp.broadcast_to(columns(pattern)[None], (B, H, 6, columns(pattern).
                                                       shape[-1]))
    o, _ = chosen_blocks.attend(q, k, v, chosen, LogitSpec(Causal()), block=8)
    seen = np.kron(pattern, np.ones((8, 8), bool)) & np.tril(np.ones((48, 48), bool))
    close(o, attention(q, k, v, seen))


def test_dense_layers_stand_among_the_sharded_ones():
    layers = hybrid(6, sharded=FEW)
    assert [type(a).__name__ for a in layers] == ["Softmax", *["S2"] * 3, "Softmax",
                                                  "S2"]
    assert hybrid(4, every=2, sharded=FEW) == (Softmax(), FEW) * 2
    with pytest.raises(ValueError, match="every=0: expected 1 or more"):
        hybrid(4, every=0)


def test_wrong_fields_say_what_was_expected():
    with pytest.raises(ValueError, match="dense=1: expected dense=0"):
        S2(homogeneous=True, dense=1)
    with pytest.raises(ValueError, match="ahead=2: expected causal=False"):
        dataclasses.replace(FEW, ahead=2)
