"""MoBA: the paper's sets by loops, the authors' mask, and what a stream reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.moba import MoBA
from attn.softmax import Softmax
from attn.sparse import by_block
from experiments.measure import cost
from tests.compiled import attend, step
from tests.laws import close, gradients, inputs

SMALL = MoBA(block=5, top_k=3)


def read_by(attention, q, k):
    """Which keys each token reads, bool [B,H,T,T]: the sets of the paper, in loops."""
    q, k = (np.asarray(a, np.float64) for a in (q, k))
    (b, t, h, _), block = q.shape, attention.block
    group, seen = h // k.shape[2], np.zeros((b, h, t, t), bool)
    for row, head, i in np.ndindex(b, h, t):
        own, keys = i // block, k[row, :, head // group]
        scores = [q[row, i, head] @ keys[n * block:(n + 1) * block].mean(0)
                  for n in range(own)]
        chosen = np.argsort(scores)[::-1][:attention.top_k - 1]
        for n in (*chosen, own):
            seen[row, head, i, n * block:min((n + 1) * block, i + 1)] = True
    return seen


def authors_mask(attention, q, k):
    """The same as the authors' code makes it, of one head a key: a gate of all tokens
    and blocks, minus infinity for what is not wholly past, infinity for the own block,
    and the top_k of a row."""
    q, k = (np.asarray(a, np.float64) for a in (q, k))
    t, block = q.shape[1], attention.block
    n = -(-t // block)
    means = np.stack(
        [k[:, m * block:(m + 1) * block].mean(1) for m in range(n)], 1)
    gate = np.einsum("bshd,bnhd->bhsn", q, means)
    own = np.arange(t)[:, None] // block - np.arange(n)[None]
    gate = np.where(own == 0, np.inf, np.where(own < 0, -np.inf, gate))
    order = np.argsort(-gate, axis=-1, kind="stable")[..., :attention.top_k]
    on = np.zeros(gate.shape, bool)
    np.put_along_axis(on, order, True, -1)
    return on.repeat(block, -1)[..., :t] & np.tri(t, dtype=bool)


@functools.partial(jax.jit, static_argnums=4)
def dense(q, k, v, seen, scale=None):
    """Softmax over the keys that are seen [B,H,T,S], in one matrix."""
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
    return jnp.einsum("bhts,bshv->bthv", p, v)


@pytest.mark.parametrize("attention, t", [
    (SMALL, 33), (MoBA(block=5, top_k=1), 33),
    (MoBA(block=1, top_k=6, scale=0.5), 17),
])
def test_it_is_what_the_loops_say_with_all_gradients(attention, t):
    q, k, v = inputs(t=t)
    seen = read_by(attention, q, k)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (q, k, v)]
        want = dense(*wide, seen, attention.scale)
        w = jnp.asarray(np.asarray(
            jax.random.normal(jax.random.key(9), want.shape, jnp.float32)))
        slopes = jax.jit(jax.grad(
            lambda *a: (w * dense(*a, seen, attention.scale)).sum(), (0, 1, 2)))(*wide)
    close(attend(attention, q, k, v), want)
    for a, b in zip(gradients(attention, q, k, v), slopes, strict=True):
        close(a, b, "gradient")


@pytest.mark.parametrize("top_k", [1, 3, 9])
def test_the_authors_mask_is_the_same(top_k):
    q, k, v = inputs(t=31)
    k, v = (jnp.repeat(a, 2, 2) for a in (k, v))
    attention = MoBA(block=4, top_k=top_k)
    seen = authors_mask(attention, q, k)
    assert (seen == read_by(attention, q, k)).all()
    one = jnp.broadcast_to(jnp.eye(31)[None, :, None], (2, 31, 4, 31))
    weights = np.asarray(attend(attention, q, k, one))  # [B,T,H,S]
    assert (weights.transpose(0, 2, 1, 3)[seen] > 0).all()
    assert (weights.transpose(0, 2, 1, 3)[~seen] == 0).all()


@pytest.mark.parametrize("piece", [7, 1])
def test_a_stream_reads_what_the_whole_does(piece):
    """Pieces that begin inside of a block, and single tokens."""
    q, k, v = inputs(t=28)
    want, state, found = attend(SMALL, q, k, v), SMALL.init_state(28, q, k, v), []
    for at in range(0, 28, piece):
        state, o = step(SMALL, state, *(a[:, at:at + piece] for a in (q, k, v)))
        found.append(o)
    close(jnp.concatenate(found, 1), want)


def test_a_sequence_that_begins_in_a_piece():
    q, k, v = inputs(t=30)
    segments = jnp.where(jnp.arange(30) < 17, 1, 2)[None].repeat(2, 0)
    want = attend(SMALL, q, k, v, segments=segments)
    state, found = SMALL.init_state(30, q, k, v), []
    for part in (slice(0, 8), slice(8, 29), slice(29, 30)):
        state, o = step(SMALL, state, *(a[:, part] for a in (q, k, v)),
                        segments=segments[:, part])
        found.append(o)
    close(jnp.concatenate(found, 1), want)
    close(state.sums[:, 0], k[:, 17:22].sum(1))


@pytest.mark.parametrize("blocks, size", [(1, 4), (5, 4), (70, 1)])
def test_pairs_of_a_tile_are_of_its_block(blocks, size):
    chosen = np.random.default_rng(0).integers(-1, blocks, 43).astype(np.int32)
    chosen[chosen == 2] = -1  # a block that nobody chose
    tiles = by_block.tiled(jnp.asarray(chosen), blocks=blocks, size=size)
    slot, pair, block = (np.asarray(a) for a in tiles)
    for number, of in enumerate(chosen):
        if of < 0:
            assert slot[number] == len(pair)
        else:
            assert pair[slot[number]] == number and block[slot[number] // size] == of
    assert (pair < 43).sum() == (chosen >= 0).sum()


def test_the_share_that_it_says_is_read():
    q, k, _ = inputs(t=33)
    assert abs(read_by(SMALL, q, k).mean() * 2 * 33 / 34 - SMALL.share(33)) < 1e-6


def test_a_long_call_is_cheaper_than_exact_attention():
    shapes = [jax.ShapeDtypeStruct((1, 16384, h, 64), jnp.float32) for h in (4, 2, 2)]
    have, whole = (cost.flops(a, *shapes) for a in (MoBA(), Softmax()))
    # of 16,384 keys, half of them before a token, 1,536 and what fills tiles
    assert have < whole / 3


@pytest.mark.parametrize("fields, message", [
    ({"top_k": 0}, "top_k=0"), ({"block": 0}, "block=0"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        MoBA(**fields)
