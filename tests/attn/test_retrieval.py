"""RetrievalAttention: what is near and what is looked up, the graph, its merge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.cache import graph_index
from attn.cache.host_keys import HostKeys
from attn.positions import ALiBi
from attn.retrieval import Retrieval
from attn.softmax import Softmax
from tests.compiled import attend, step
from tests.laws import close, stream

B, T, H, K, D, V = 2, 40, 4, 2, 8, 12
FLAT = Retrieval(sinks=2, recent=6, top_k=5, index="flat")


def inputs(t=T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def by_hand(q, k, v, cut):
    """One token over the first two keys, those from `cut` on and its 5 best others."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    o = np.zeros((B, H, V))
    for b, h in np.ndindex(B, H):
        s = k[b, :, h // 2] @ q[b, 0, h] / np.sqrt(D)
        far = np.arange(2, cut)
        at = [0, 1, *far[np.argsort(-s[far])[:5]], *range(cut, len(s))]
        e = np.exp(s[at] - s[at].max())
        o[b, h] = e @ v[b, at, h // 2] / e.sum()
    return o


@pytest.mark.parametrize("piece", [20, T])
def test_near_keys_and_the_best_far_ones_are_read(piece):
    q, k, v = inputs()
    o, state = stream(FLAT, q, k, v, T + 4, piece)
    close(o[:, :T], attend(Softmax(), q, k, v)[:, :T])
    for n in range(3):
        one = inputs(1, n + 1)
        state, o = step(FLAT, state, *one)
        k, v = (jnp.concatenate([a, b], 1) for a, b in zip((k, v), one[1:]))
        close(o[:, 0], by_hand(one[0], k, v, T - 6))
    assert (state.near.pos[0, :, 0] >= 0).sum() == 8 + 3


def test_the_graph_finds_what_the_exact_search_finds():
    q, k, v = inputs(80)
    graph = Retrieval(sinks=2, recent=6, top_k=5, neighbours=10, degree=6, beam=16)
    args = tuple(a[:, :-1] for a in (q, k, v))
    outs = []
    for policy in (graph, FLAT):
        state, _ = step(policy, policy.init_state(80, *args), *args)
        outs.append(step(policy, state, *(a[:, -1:] for a in (q, k, v)))[1])
    gap = np.linalg.norm(outs[0] - outs[1]) / np.linalg.norm(outs[1])
    assert gap < 0.3, gap  # a walk misses few of the best


def test_a_graph_for_queries_looks_at_less_than_one_for_keys():
    """Queries that lie elsewhere than keys: the paper's reason for the index."""
    rng = np.random.default_rng(0)
    a, c = rng.normal(size=(16, 16)), rng.normal(size=(16, 16))
    z = rng.normal(size=(300, 16))
    keys = (z @ a + 1).astype(np.float32)
    asks = lambda n: ((z[rng.integers(0, 300, n)] + 0.3 * rng.normal(
        size=(n, 16))) @ c - 1).astype(np.float32)
    train, test = asks(300), asks(30)
    found = {}
    for name, queries in (("queries", train), ("keys", keys)):
        made = graph_index.build(keys, queries, neighbours=20, degree=10, beam=30)
        recall, seen = [], []
        for q in test:
            best = set(np.argsort(-(keys @ q))[:10].tolist())
            own, many = graph_index.search(made, keys, q, 10, 20)
            recall.append(len(best & set(own)) / 10)
            seen.append(many / 300)
        found[name] = np.mean(recall), np.mean(seen)
    assert found["queries"][0] > 0.9, found
    assert found["queries"][0] >= found["keys"][0] - 0.02, found


def test_every_key_can_be_reached():
    keys = np.random.default_rng(1).normal(size=(60, 4)).astype(np.float32)
    made = graph_index.build(keys, keys[:20], neighbours=5, degree=4, beam=60)
    seen, ahead = {made.entry}, [made.entry]
    while ahead:
        for x in made.links[ahead.pop()]:
            if x >= 0 and int(x) not in seen:
                seen.add(int(x))
                ahead.append(int(x))
    assert len(seen) > 50 and (made.links < 60).all()
    alone = graph_index.build(keys, keys[:20], neighbours=5, degree=4, connect=False)
    assert (alone.links >= 0).sum() < (made.links >= 0).sum()


def test_ragged_rows_and_new_sequences():
    q, k, v = inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 35, [1] * 9 + [2] * 31])
    state, o = step(FLAT, FLAT.init_state(T + 4, q, k, v), q, k, v, segments=segments)
    one = inputs(1, 1)
    _, o = step(FLAT, state, *one)
    for b, cut in ((0, 5), (1, 9)):
        args = tuple(a[b:b + 1, cut:] for a in (q, k, v))
        alone, _ = step(FLAT, FLAT.init_state(T + 4, *args), *args)
        assert (state.far.pos[b] == alone.far.pos[0]).all()
        close(o[b], step(FLAT, alone, *(a[b:b + 1] for a in one))[1][0])
    _, o = step(FLAT, state, *one, segments=jnp.asarray([[7], [0]]))
    close(o[0, 0], jnp.repeat(one[2][0, 0], 2, 0))
    assert (o[1] == 0).all()


@pytest.mark.parametrize("index", ["flat", "graph"])
def test_keys_that_the_host_keeps_are_read_as_those_of_the_state(index):
    """A prompt in two pieces, tokens, a sequence that ends, in one program and out of
    it; far keys are in the host's memory alone, and a state may be gone on with twice.
    """
    policy = dataclasses.replace(
        FLAT, index=index, neighbours=10, degree=6, beam=16)
    kept = dataclasses.replace(policy, host=HostKeys())
    q, k, v = inputs()
    (o, state), (kept_o, own) = (
        stream(a, q, k, v, T + 4, 20) for a in (policy, kept))
    close(kept_o, o)
    assert own.far.k.size == own.far.v.size == own.links.size == 0
    assert (own.far.pos == state.far.pos).all()
    one = inputs(1, 1)
    for _ in range(2):
        close(step(kept, own, *one)[1], step(policy, state, *one)[1])

    def three(attention, state):
        def next_one(state, _):
            return attention.step(state, *one)
        return jax.lax.scan(next_one, state, None, length=3)

    ends = [jax.jit(three, static_argnums=0)(a, s) for a, s in (
        (kept, own), (policy, state))]
    close(ends[0][1], ends[1][1])
    news = jnp.asarray([[7], [0]])
    close(*(step(a, s, *one, segments=news)[1] for a, s in (
        (kept, own), (policy, state))))
    # both pieces of both rows: keys and values, and what finds them
    assert kept.host.nbytes >= 4 * (T + 4) * K * (D + V) * 4
    kept.host.clear()
    with pytest.raises(Exception, match="was cleared"):
        jax.block_until_ready(step(kept, own, *one))


def test_the_newest_rows_stay():
    host = HostKeys(rows=2)
    numbers = [host.put(np.ones(n)) for n in (1, 2, 3)]
    assert host.nbytes == 5 * 8 and host.get(numbers[-1])[0].size == 3
    with pytest.raises(ValueError, match="rows=2 newer"):
        host.get(numbers[0])
    with pytest.raises(ValueError, match="rows=0"):
        HostKeys(rows=0)


def test_what_is_near_is_read_between_the_two_halves_of_a_search():
    """In the program of a token with keys of the host, near keys' logits need the
    ticket, and the answer is asked for with what they gave."""
    kept = dataclasses.replace(FLAT, host=HostKeys())
    state = jax.eval_shape(lambda: kept.init_state(T + 4, *inputs()))
    jaxpr = jax.make_jaxpr(kept.step)(state, *inputs(1, 1)).jaxpr
    begin, end = [e for e in jaxpr.eqns if e.primitive.name == "io_callback"]
    near = [e for e in jaxpr.eqns if "dot_general" in str(e)]
    assert near
    assert all(e in follows(jaxpr, begin) and end in follows(jaxpr, e) for e in near)


def follows(jaxpr, eqn):
    """What needs the equation's outputs."""
    made, found = set(eqn.outvars), []
    for e in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in made for v in e.invars):
            made |= set(e.outvars)
            found.append(e)
    return found


@pytest.mark.parametrize("fields, message", [
    ({"index": "tree"}, "index"), ({"top_k": 0}, "top_k"),
    ({"score": ALiBi(4)}, "score"), ({"softcap": 3.0}, "softcap"),
    ({"host": HostKeys(), "axis": "seq"}, "host keys: expected one of them"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FLAT, **fields)


def test_near_slots_that_are_full_are_never_silent():
    q, k, v = inputs(8)
    small = dataclasses.replace(FLAT, sinks=1, recent=2)
    state = small.init_state(8, q, k, v)
    first = [a[:, :1] for a in (q, k, v)]
    for _ in range(3):
        state, o = step(small, state, *first)
        assert np.isfinite(o).all()
    assert np.isnan(step(small, state, *first)[1]).all()
    with pytest.raises(ValueError, match="memory of 3"):
        small.step(state, *first)


def test_the_search_and_what_is_near_do_not_wait_for_each_other():
    """In the program of a token neither follows from the other, so that a device may
    attend to what is near between the start of the search and its end."""
    q, k, v = inputs()
    state = jax.eval_shape(lambda: FLAT.init_state(T + 4, q, k, v))
    jaxpr = jax.make_jaxpr(FLAT.step)(state, *inputs(1, 1)).jaxpr
    (search,) = [e for e in jaxpr.eqns if e.primitive.name == "pure_callback"]
    near = [e for e in jaxpr.eqns if "dot_general" in str(e)]
    assert near
    after = follows(jaxpr, search)
    assert not [e for e in near if e in after]
    assert not [e for e in near if search in follows(jaxpr, e)]
