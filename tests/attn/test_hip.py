"""HiP: what the search finds, by loops; that it finds it; decoding with reuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.hip import HiP
from attn.sparse import chosen_tiles, tree_search
from attn.sparse.block_grid import grid
from attn.sparse.tree_search import Tree, search
from attn.softmax import Softmax
from experiments.measure import cost
from tests.compiled import attend
from tests.laws import close, gradients, inputs, stream

SMALL = HiP(keys=8, block_q=4, block_k=2, window=4, sink=1)


def searched(attention, q, k, seen):
    """The key blocks of one row and head, q [R,D], k [S,D], as the paper has it."""
    block, m = attention.block_k, attention.found
    n = -(-max(seen - attention.window, 0) // block)
    if n <= m:
        return set(range(n))
    ranges = [(n * i // m, n * (i + 1) // m - n * i // m) for i in range(m)]
    width = n / m

    def score(start, size):
        at = start + size // 2 if attention.representative == "center" else start
        keys = k[at * block:min((at + 1) * block, seen)]
        return (q @ keys.T).max() if size else -np.inf

    while width > 1:
        halves = [h for s, z in ranges for h in ((s, z // 2), (s + z // 2, z - z // 2))]
        ranges = sorted(halves, key=lambda h: -score(*h))[:m]
        width /= 2
    return {start for start, size in ranges if size}


def by_hand(attention, q, k, v):
    """The whole of section 1, in float64 loops."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (b, t, h, d), s, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    o = np.zeros((b, t, h, v.shape[3]))
    for row, head, first in np.ndindex(b, h, -(-t // attention.block_q)):
        size = attention.block_q
        at = np.arange(first * size, min((first + 1) * size, t))
        asking = q[row, at, head][1::2] if len(at) > 1 else q[row, at, head]
        keys, vals = k[row, :, head // group], v[row, :, head // group]
        found = searched(attention, asking, keys, at[-1] + 1 + s - t)
        for i in at:
            j = np.arange(s)
            i_pos = i + s - t
            kept = np.isin(j // attention.block_k, list(found))
            kept |= (j > i_pos - attention.window) | (j < attention.sink)
            x = keys @ q[row, i, head] / np.sqrt(d)
            e = np.where(kept & (j <= i_pos), np.exp(x - x.max()), 0)
            o[row, i, head] = e / e.sum() @ vals
    return o


@pytest.mark.parametrize("representative", ["first", "center"])
@pytest.mark.parametrize("t", [51, 30])
def test_it_is_what_the_loops_say(representative, t):
    attention = dataclasses.replace(SMALL, representative=representative)
    q, k, v = inputs(t=51)
    q = q[:, 51 - t:]  # the last ones
    close(attend(attention, q, k, v), by_hand(attention, q, k, v))


def test_packed_sequences_search_by_themselves():
    q, k, v = inputs(t=64)
    segments = jnp.asarray([[1] * 29 + [2] * 35, [0] * 3 + [1] * 32 + [4] * 29])
    o = attend(SMALL, q, k, v, segments=segments)
    for row, part in ((0, slice(0, 29)), (1, slice(35, 64))):
        own = attend(SMALL, *(a[row:row + 1, part] for a in (q, k, v)))
        close(o[row:row + 1, part], own)


def test_more_sequences_than_fit_are_never_silent():
    segment = jnp.arange(1, 65)[None]
    full = grid(segment * 0, segment, 32, packed=True)
    with pytest.raises(ValueError, match="more sequences than fit on 10 blocks of 32"):
        full.poison(jnp.zeros((1, 64)))
    assert np.isnan(jax.jit(lambda a: full._replace(full=a).poison(
        jnp.zeros((1, 64))))(full.full)).all()


def test_gradients_are_those_of_what_was_found(monkeypatch):
    q, k, v = inputs(t=37)

    def one_row_at_a_time(*args):
        return SMALL(*args)

    want = gradients(lambda *a: SMALL(*a), q, k, v)
    monkeypatch.setattr(chosen_tiles, "LOGITS", 2**8)
    monkeypatch.setattr(tree_search, "SCORED", 2**8)
    for a, b in zip(gradients(one_row_at_a_time, q, k, v), want):
        close(a, b, "gradient")


@functools.cache
def mass(kind):
    """The share of the weights that the found keys hold, of those that the best ones
    hold, for keys that walk or are noise; and for blocks at equal distances."""
    t, d, keys, block = 2048, 16, 128, 2
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, t, 1, d)) for _ in range(2))
    if kind == "walk":
        k = np.cumsum(k, 1)
        k = k / k.std() * 2
    k = jnp.asarray(k, jnp.float32)
    q = jnp.asarray(q[:, -16:], jnp.float32)
    one = jnp.full((1, 16), t)
    found = jax.jit(search, static_argnums=(3, 4))(
        q[:, :, None], k, Tree(one * 0, one, one), keys // block, block)
    p = jax.nn.softmax(jnp.einsum("bthd,bshd->ts", q, k) / np.sqrt(d) * 2)
    best = jnp.sort(p, axis=-1)[:, -keys:].sum(-1)

    def held(blocks):
        at = (np.asarray(blocks)[..., None] * block + np.arange(block)).reshape(16, -1)
        return float((np.stack([p[i, list(set(a))].sum() for i, a in enumerate(at)])
                      / best).mean())

    strided = np.arange(0, t // block, t // keys)[None].repeat(16, 0)
    return held(found[0, :, 0]), held(strided)


def test_the_search_finds_the_weight_where_neighbours_are_alike():
    found, strided = mass("walk")
    assert found > 0.8 > strided + 0.2, (found, strided)
    noise, strided = mass("noise")
    # on noise nothing is told by neighbours, and the advantage is small
    assert noise < found - 0.2, (noise, strided)


def test_the_search_is_of_log_t():
    def work(t):
        args = jax.eval_shape(lambda: inputs(t=t, b=1))
        return cost.flops(HiP(keys=64, block_q=16, block_k=4, window=16), *args) / t

    work = [work(512 * 2**n) for n in range(4)]
    steps = np.diff(work)
    assert (steps > 0).all() and steps[-1] < 1.3 * steps[0], work


@pytest.mark.parametrize("refresh", [1, 4, 9])
def test_reuse_sees_what_was_found_and_all_since(refresh):
    """A stream whose search finds all is exact, also between searches, and with a
    window shorter than the time between them."""
    attention = HiP(keys=64, block_q=4, block_k=2, window=3, refresh=refresh)
    q, k, v = inputs(t=33)
    o, state = stream(attention, q, k, v, 40, 1)
    close(o, attend(Softmax(), q, k, v))
    assert state.age.tolist() == [33 % refresh or refresh] * 2


def test_reuse_changes_what_is_found_only_between_searches():
    q, k, v = inputs(t=48)
    often, seldom = (
        stream(dataclasses.replace(SMALL, refresh=n), q, k, v, 48, 1)[0]
        for n in (1, 4))
    same = [np.allclose(a, b, atol=1e-5) for a, b in zip(often[0], seldom[0])]
    assert all(same[::4]) and not all(same)


def test_share():
    assert HiP(keys=384, window=128).share(8192) < 0.125
    assert HiP(keys=9000).share(8192) == 1


@pytest.mark.parametrize("fields, message", [
    ({"keys": 0}, "keys=0"), ({"refresh": 0}, "refresh=0"),
    ({"representative": "last"}, "representative='last'"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        HiP(**fields)


def test_more_queries_than_keys_are_refused():
    q, k, v = inputs(t=9)
    with pytest.raises(ValueError, match="9 queries and 5 keys"):
        SMALL(q, k[:, :5], v[:, :5])
