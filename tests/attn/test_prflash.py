"""PrFlash: draws by distance, budgets and means; RoPE x ALiBi by harmonic sums."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.positions import HarmonicALiBi, RoPE, harmonic
from attn.prflash import BlocksBack, PrFlash
from attn.softmax import Softmax
from tests.compiled import attend
from tests.laws import close, gradients, inputs

VECTORS = pathlib.Path(__file__).parents[1] / "golden" / "prflash.npz"


def vectors(name):
    with np.load(VECTORS) as file:
        found = {key.partition("/")[2]: file[key] for key in file.files
                 if key.startswith(f"{name}/")}
    return found | {"config": json.loads(str(found["config"]))}


def test_given_draws_read_the_same_blocks():
    case = vectors("prflash")
    table = tuple(case["keep_probability_by_block_distance"].tolist())
    attention = PrFlash(block=case["config"]["block"], family="table", table=table)
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    draws = jnp.asarray(case["uniform_draws"])
    close(attend(attention, q, k, v, draws=draws), case["out"])
    # values of one position each make the output the weights
    t = q.shape[1]
    eye = jnp.broadcast_to(jnp.eye(t)[None, :, None], (1, t, k.shape[2], t))
    read = np.asarray(attend(attention, q, k, eye, draws=draws))[0] > 0  # [T,H,S]
    size, n = attention.block, len(case["block_mask"])
    blocks = read.reshape(n, size, -1, n, size).any((1, 4))
    assert (blocks == case["block_mask"][:, None]).all()


def test_rope_and_alibi_by_harmonic_numbers():
    case = vectors("rope_alibi")
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    (_, t, h, d), rope = q.shape, RoPE(case["config"]["rope_theta"])
    bias = HarmonicALiBi(h, case["config"]["gamma"])
    n = jnp.arange(t)
    np.testing.assert_allclose(harmonic(n.astype(jnp.float32)),
                               case["harmonic_numbers"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias.slopes(jnp.arange(h)), case["slopes"], rtol=1e-6)
    q, k = (rope.rotate(a, n[None]) for a in (q, k))
    close(attend(Softmax(**bias.of(d)), q, k, v), case["out"])
    alone = HarmonicALiBi(h, gamma=1.0)
    close(attend(Softmax(**alone.of(d)), q, k, v), attend(Softmax(), q, k, v))


def test_harmonic_numbers_and_a_linear_bias():
    n = np.array([0, 1, 2, 3, 10, 1000, 10**6])
    want = [sum(1 / r for r in range(1, m + 1)) for m in n]
    np.testing.assert_allclose(
        harmonic(jnp.asarray(n, jnp.float32)), want, rtol=3e-7, atol=1e-6)
    linear = HarmonicALiBi(4, 0.25, bias="linear")
    assert linear(1, 7, 4) == pytest.approx(-0.75 * 2**-4 * 3)


KINDS = {
    "harmonic": PrFlash(block=4), "geometric": PrFlash(block=4, family="geometric"),
    "budget": PrFlash(block=4, budget=0.5, by_head=True),
    "fixed": PrFlash(block=4, blocks=3, draw="fixed", by_head=True),
    "room": PrFlash(block=4, capacity=2),
}


@functools.cache
def read(kind, pieces=1):
    """Which blocks 200 keys read: [200,H,n,n] of n = 10."""
    attention = KINDS[kind]
    q, k, _ = inputs(t=40, b=1)
    eye = jnp.broadcast_to(jnp.eye(40)[None, :, None], (1, 40, k.shape[2], 40))
    each = jax.jit(jax.vmap(lambda key: attention(q, k, eye, key=key)[0] > 0))
    found = np.asarray(each(jax.random.split(jax.random.key(0), 200)))  # [200,T,H,S]
    return found.reshape(200, 10, 4, 4, 10, 4).any((2, 5)).swapaxes(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_as_often_as_is_said(kind):
    found = read(kind)
    n = np.arange(10)
    far = n[:, None] - n[None]
    assert not found[..., far < 0].any() and found[..., far == 0].all()
    attention = KINDS[kind]
    if kind == "fixed":
        assert (found.sum(-1) == np.minimum(n + 1, 3)).all()
        # without replacement in proportion to p: near ones more often
        often = [found[..., far == t].mean() for t in range(10)]
        assert often[1] > often[4] > often[9]
    elif kind == "room":
        assert found.sum(-1).max() == 2
        return
    else:
        p = attention.probabilities(10)
        for t in range(10):
            assert abs(found[..., far == t].mean() - p[t]) < 0.1
    assert abs(found.sum((2, 3)).mean() / 55 - attention.share(40)) < 0.02
    by_head = (found != found[:, :1]).any()
    assert by_head == attention.by_head


def test_a_budget_is_met_in_the_mean():
    assert PrFlash(budget=0.4).share(64 * 50) == pytest.approx(0.4, abs=1e-9)
    p = PrFlash(budget=0.01).probabilities(10)  # the diagonal alone is more
    assert p.tolist() == [1] + [0] * 9


def test_rescaled_sums_are_right_in_the_mean():
    """Numerator and denominator of a row over all draws, each by 1 / p."""
    q, k, v = inputs(t=24, b=1)
    fair = PrFlash(block=4, rescale=True, power=0.5)
    p = fair.probabilities(6)

    def sums(key):
        u = jax.random.uniform(key, (6, 6))
        o, ones = (fair(q, k, a, draws=u) for a in (v, jnp.ones_like(v)))
        return o, ones

    o, ones = jax.jit(sums)(jax.random.key(1))
    np.testing.assert_allclose(ones, 1, rtol=1e-5)
    # the logits of a block are those of all plus -log p
    u = jnp.zeros((6, 6))
    far = np.arange(24)[:, None] // 4 - np.arange(24)[None] // 4
    bias = np.where(far >= 0, -np.log(p[np.maximum(far, 0)]), 0)
    want = Softmax()(q, k, v, bias=jnp.asarray(bias, jnp.float32)[None, None])
    close(attend(fair, q, k, v, draws=u), want)
    draws = jax.random.uniform(jax.random.key(2), (4000, 6, 6))
    e = np.exp(np.random.default_rng(0).normal(size=(6, 6)))
    kept = np.asarray(draws) < p[np.maximum(np.arange(6)[:, None] - np.arange(6), 0)]
    tri = np.tri(6) > 0
    mean = np.where(kept & tri, e / np.where(tri, p[np.maximum(
        np.arange(6)[:, None] - np.arange(6), 0)], 1), 0).mean(0)
    np.testing.assert_allclose(mean.sum(1), np.where(tri, e, 0).sum(1), rtol=0.05)


def test_a_draw_has_the_gradients_of_what_it_reads():
    q, k, v = inputs(t=21)
    key = jax.random.key(3)
    attention = PrFlash(block=4, power=0.5)
    eye = jnp.broadcast_to(jnp.eye(21)[None, :, None], (2, 21, 2, 21))
    seen = jnp.moveaxis(attend(attention, q, k, eye, key=key) > 0, 2, 1)
    drawn = lambda q, k, v: attention(q, k, v, key=key)
    masked = lambda q, k, v: Softmax()(q, k, v, mask=seen)
    close(jax.jit(drawn)(q, k, v), jax.jit(masked)(q, k, v))
    for a, b in zip(gradients(drawn, q, k, v), gradients(masked, q, k, v)):
        close(a, b, "gradient")


def test_a_draw_over_packed_sequences_and_a_mesh():
    q, k, v = inputs(t=32)
    key, segments = jax.random.key(4), jnp.asarray([[1] * 13 + [2] * 19, [3] * 32])
    attention = PrFlash(block=4, draw="fixed", blocks=2)
    o = attend(attention, q, k, v, key=key, segments=segments)
    close(o[1:], attend(attention, q[1:], k[1:], v[1:], key=key))
    mesh = jax.make_mesh((1, 4, 2), ("data", "seq", "model"))
    with jax.set_mesh(mesh):
        split = PrFlash(block=4, draw="fixed", blocks=2, axis="seq")
        close(jax.jit(lambda *a: split(*a, key=key, segments=segments))(q, k, v), o)
    assert not np.allclose(o, attend(attention, q, k, v, segments=segments))


def test_blocks_back_says_of_tiles_what_it_says_of_pairs():
    at = np.arange(24)
    for distances in ((0, 1, 2), (0, 2, 5)):
        mask = BlocksBack(3, distances)
        seen = mask(None, at[:, None], at[None])
        far = at[:, None] // 3 - at[None] // 3
        assert (seen == np.isin(far, distances)).all()
        for i, j in np.ndindex(6, 6):
            some, every = mask.bounds((4 * i, 4 * i + 3), (4 * j, 4 * j + 3))
            tile = seen[4 * i:4 * i + 4, 4 * j:4 * j + 4]
            assert some or not tile.any()
            assert not every or tile.all()
        assert mask.reach().left == max(distances) * 3 + 2


def test_a_table_reads_its_most_probable_distances():
    table = PrFlash(block=4, blocks=3, family="table", table=(1.0, 0.1, 0.5, 0.0, 0.4))
    assert table.distances == (0, 2, 4)
    wide = PrFlash(block=4, blocks=9, family="table", table=(1.0, 0.1, 0.0, 0.4))
    assert wide.distances == (0, 1, 3)


@pytest.mark.parametrize("fields, message", [
    ({"family": "power"}, "family='power'"), ({"family": "table"}, "table="),
    ({"ratio": 1.5}, "ratio=1.5"), ({"budget": 0.5, "family": "geometric"}, "budget"),
    ({"rescale": True, "draw": "fixed"}, "rescale=True"), ({"blocks": 0}, "blocks=0"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PrFlash(**fields)


def test_what_a_draw_does_not_do_is_refused():
    q, k, v = inputs()
    key = jax.random.key(0)
    with pytest.raises(NotImplementedError, match="softcap"):
        PrFlash(softcap=2.0)(q, k, v, key=key)
    with pytest.raises(NotImplementedError, match="no kernel"):
        PrFlash(rescale=True, implementation="pallas")(q, k, v, key=key)
    with pytest.raises(ValueError, match="draws has shape"):
        PrFlash(block=4)(q, k, v, draws=jnp.zeros((3, 3)))
