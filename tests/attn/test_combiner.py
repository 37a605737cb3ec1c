"""Combiner: every plan by explicit sets of positions, its costs, its streams."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.combiner import Combiner, RowMajor
from attn.masks import Full
from attn.softmax import Softmax
from attn.sparse import spans
from experiments.measure import cost
from tests.compiled import attend, step
from tests.laws import close, run

B, T, H, K, D, V = 2, 23, 4, 2, 8, 6
PLANS = ("fixed", "logsparse", "axial_mixture", "axial_vertical", "axial_horizontal")
SEGMENTS = np.array([
    [1] * 3 + [0] * 2 + [1] * 5 + [2] * 9 + [0] + [3] * 3,
    [0] * 2 + [4] * 6 + [2] * 13 + [0] * 2,
])


def inputs(t=T):
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def sets(plan, i, n, block, causal=True):
    """What token i of n reads: positions one by one, and regions."""
    if plan == "fixed":
        own = i // block
        cut = [list(range(s, min(s + block, n))) for s in range(0, n, block)]
        direct = [j for j in cut[own] if j <= i or not causal]
        return direct, [c for m, c in enumerate(cut) if m < own or not causal and
                        m != own]
    if plan == "logsparse":
        found, top = [], 0
        for level in reversed(range(n.bit_length())):
            if i >> level & 1:
                found.append(list(range(top, top + 2**level)))
                top += 2**level
        return [i], found
    r, c = divmod(i, block)
    direct = [*range(r * block, i + 1), *(t * block + c for t in range(r))]
    found = []
    if plan != "axial_horizontal":
        found += [[t * block + u for t in range(r)]
                  for u in range(block) if u != c and r]
    if plan != "axial_vertical":
        for t in range(r):
            found += [list(range(t * block, t * block + c)),
                      list(range(t * block + c + 1, (t + 1) * block))]
    return direct, [f for f in found if f]


def softmax(s):
    e = np.exp(s - np.max(s))
    return e / e.sum()


def by_sets(plan, block, q, k, v, segments, causal=True):
    """Section 1 of the mechanism, token by token, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, H // K, 2) for a in (k, v))
    o = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(len(q)):
        for s in set(segments[b]) - {0}:
            at = np.nonzero(segments[b] == s)[0]
            for h, i in np.ndindex(H, len(at)):
                direct, far = sets(plan, i, len(at), block, causal)
                qs, ks, vs = (a[b, at, h] for a in (q, k, v))
                keys = [ks[j] for j in direct] + [ks[r].max(0) for r in far]
                values = [vs[j] for j in direct] + [
                    softmax(ks[r] @ qs[r].max(0) / D**0.5) @ vs[r] for r in far]
                p = softmax(np.array(keys) @ qs[i] / D**0.5)
                o[b, at[i], h] = p @ np.array(values)
    return o


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("combiner", [
    *(Combiner(plan, 5) for plan in PLANS), Combiner(block=5, causal=False),
], ids=lambda a: f"{a.plan}-{a.causal}")
def test_plans_are_their_sets(combiner, packed):
    q, k, v = inputs()
    segments = SEGMENTS if packed else np.ones((B, T), int)
    if packed and "axial" in combiner.plan:
        with pytest.raises(NotImplementedError, match="segments with plan"):
            combiner(q, k, v, segments=jnp.asarray(segments))
        return
    o, grads = run(combiner, q, k, v, jnp.asarray(segments) if packed else None)
    want = by_sets(combiner.plan, 5, q, k, v, segments, combiner.causal)
    close(o, want)
    assert all(np.isfinite(a).all() and np.abs(a).max() > 0 for a in grads)


@pytest.mark.parametrize("plan", PLANS[2:])
def test_a_grid_obeys_the_laws_that_it_can(plan):
    grid = Combiner(plan, 5)
    q, k, v = inputs()
    for i in (0, 7, 12):
        seen = jnp.arange(T)[None, :, None, None] <= i
        do = jnp.broadcast_to(seen, (B, T, H, V)).astype(jnp.float32)
        for grad in run(grid, q, k, v, do=do)[1]:
            assert (np.asarray(grad)[:, i + 1:] == 0).all()
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "model"))
    short = [a[:, :22] for a in (q, k, v)]
    with jax.set_mesh(mesh):
        split = dataclasses.replace(grid, axis="seq")
        close(jax.jit(split)(*short), attend(grid, *short))
    for length in (1, 7):
        few = [100 * a[:, :length] for a in (q, k, v)]
        o, grads = run(grid, *few)
        assert all(np.isfinite(a).all() for a in (o, *grads))
    low = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    exact = attend(grid, *(a.astype(jnp.float32) for a in low))
    assert np.linalg.norm(attend(grid, *low).astype(jnp.float32) - exact) < (
        0.01 * np.linalg.norm(exact))


@pytest.mark.parametrize("combiner", [
    Combiner(block=T), Combiner(block=1),
    *(Combiner(plan, n) for plan in PLANS[2:] for n in (1, T)),
], ids=lambda a: f"{a.plan}-{a.block}")
def test_it_is_exact_attention_in_the_limit(combiner):
    q, k, v = inputs()
    close(attend(combiner, q, k, v), attend(Softmax(), q, k, v))


def test_without_an_order_the_limit_sees_everything():
    q, k, v = inputs()
    for block in (1, T):
        combiner = Combiner(block=block, causal=False)
        close(attend(combiner, q, k, v), attend(Softmax(mask=Full()), q, k, v))


def test_a_tuple_of_plans_is_their_average():
    q, k, v = inputs()
    both = attend(Combiner(("fixed", "logsparse"), 5), q, k, v)
    each = [attend(Combiner(plan, 5), q, k, v) for plan in ("fixed", "logsparse")]
    close(both, (each[0] + each[1]) / 2)


def test_no_token_is_ever_left_out():
    """The claim: rows are distributions over all of the past, by values of 1 and by a
    value at one token alone."""
    q, k, v = inputs()
    ones = jnp.ones_like(v)
    for plan in PLANS:
        combiner = Combiner(plan, 5)
        close(attend(combiner, q, k, ones), np.ones((B, T, H, V)))
        first = jnp.zeros_like(v).at[:, 0].set(1.0)
        assert (np.asarray(attend(combiner, q, k, first)) > 0).all()


@pytest.mark.parametrize("plan, power", [
    ("fixed", 1.5), ("axial_mixture", 1.5), ("logsparse", 1.0),
])
def test_time_grows_as_claimed(plan, power):
    """With blocks of sqrt(T)."""
    work = []
    for t in (4096, 16384, 65536):
        shapes = [jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)] * 3
        work.append(cost.flops(Combiner(plan, int(t ** 0.5)), *shapes))
    found = cost.slope(work) / 2  # lengths grow by 4
    print(f"{plan}: T^{found:.2f}")
    assert abs(found - power) < 0.15, found


@pytest.mark.parametrize("combiner", [Combiner(block=5), Combiner("logsparse")],
                         ids=lambda a: a.plan)
@pytest.mark.parametrize("pieces", [(T,), (4, 1, 1, 9, 1, 7)])
def test_a_stream_reads_pieces_of_any_length(combiner, pieces):
    q, k, v = inputs()
    state, outs, at = combiner.init_state(T, q, k, v), [], 0
    for n in pieces:
        part = slice(at, at + n)
        state, o = step(combiner, state, *(a[:, part] for a in (q, k, v)),
                        segments=jnp.asarray(SEGMENTS[:, part]))
        outs.append(o)
        at += n
    have = jnp.concatenate(outs, 1)
    close(have, attend(combiner, q, k, v, segments=jnp.asarray(SEGMENTS)))


def test_a_stream_of_blocks_keeps_a_region_each():
    q, k, v = inputs()
    state = jax.eval_shape(lambda: Combiner(block=64).init_state(4096, q, k, v))
    assert state.k.shape == (B, 64, K, D) and state.v.shape == (B, 64, H, V)
    state = jax.eval_shape(lambda: Combiner("logsparse").init_state(4096, q, k, v))
    assert state.counter.q.shape == (B, 13, H, D)
    assert state.counter.k.shape == (B, 13, K, D)


def test_packed_sequences_stand_apart_at_powers_of_two():
    rng, places = np.random.default_rng(0), jax.jit(spans.apart)
    for _ in range(20):
        lengths, t = rng.integers(1, 9, 5), 42
        index = np.repeat(np.cumsum([1, *lengths[:-1]]), lengths)
        pos = np.concatenate([np.arange(n) for n in lengths])
        behind = 0, t - len(pos)
        place, size = places(*(jnp.asarray(np.pad(a, behind)[None], jnp.int32)
                               for a in (pos, index)))
        place, at = np.asarray(place)[0], 0
        assert size == 4 * t and (place[len(pos):] == size).all()
        assert len(set(place[:len(pos)])) == len(pos) and place[:len(pos)].max() < size
        for n in lengths:
            first = place[at]
            assert (place[at:at + n] == first + np.arange(n)).all()
            assert first % 2 ** int(n - 1).bit_length() == 0
            at += n


@pytest.mark.parametrize("summary", ["proj", "none", "wsum"])
def test_rows_above_are_read_by_column(summary):
    q, k, v = inputs()
    v = jnp.concatenate([v, v[..., :2]], -1)
    x = jax.random.normal(jax.random.key(5), (B, T, 12))
    attention = RowMajor(5, summary)
    params = jax.jit(attention.init)(jax.random.key(3), q, k, v, x=x)
    f = jax.jit(functools.partial(attention.apply, params))

    def first(k, v, x):
        return f(q, k, v, x=x)[:, :13].sum()

    for grad in jax.grad(first, (0, 1, 2))(k, v, x):  # no token sees the future
        assert (np.asarray(grad)[:, 13:] == 0).all()
    whole = RowMajor(T, summary)
    params = jax.jit(whole.init)(jax.random.key(3), q, k, v, x=x)
    close(whole.apply(params, q, k, v, x=x), attend(Softmax(), q, k, v))
    with pytest.raises(NotImplementedError, match="rows of a grid"):
        whole.apply(params, q, k, v, x=x, segments=jnp.asarray(SEGMENTS))
    if summary == "proj":
        with pytest.raises(ValueError, match="x is None"):
            whole.apply(params, q, k, v)


@pytest.mark.parametrize("make, error, message", [
    (lambda: Combiner("other"), ValueError, "plan='other': expected one of"),
    (lambda: Combiner(()), ValueError, r"plan=\(\): expected"),
    (lambda: Combiner("logsparse", causal=False), ValueError, "expected plan='fixed'"),
    (lambda: Combiner("axial_mixture").init_state(9, *inputs()), NotImplementedError,
     "no stream"),
    (lambda: Combiner(scale=-1.0), ValueError, "scale=-1.0: expected above 0"),
    (lambda: RowMajor(summary="sum"), ValueError, "summary='sum'.*expected"),
])
def test_wrong_fields_say_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()
