"""PointerNet: padding, additive scores, and beams that find the best valid answer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.exact.additive import additive, additive_scores
from experiments.measure import cost
from models.pointernet import PointerNet, search
from tests import compiled
from tests.laws import close

NET = PointerNet(6)
POINTS = jax.random.uniform(jax.random.key(0), (2, 4, 2))
ALL = jnp.ones((2, 4), bool)


def params(model=NET, spread=8.0):
    drawn = compiled.init(model, jax.random.key(1), POINTS)
    # away from zero, so that answers differ
    return jax.tree.map(lambda a: spread * a, drawn)


def log_probability(own, row, answer):
    """Of one answer, by the teacher-forced network."""
    targets = jnp.asarray([answer] * 2)
    logits = compiled.apply(NET, own, POINTS, targets)[row]
    logp = jax.nn.log_softmax(logits)
    return float(logp[np.arange(len(answer)), answer].sum())


def valid(rule, n=4):
    """All answers that a rule allows, up to their end."""
    for m in range(3 if rule == "hull" else n, n + 1):
        for order in itertools.permutations(range(1, n + 1), m):
            yield [*order, order[0], 0]


@pytest.mark.parametrize("rule", ["hull", "tour"])
def test_a_wide_beam_finds_the_most_probable_answer(rule):
    own = params()
    found = np.asarray(search(NET, own, POINTS, ALL, steps=6, rule=rule, width=60))
    for row in range(2):
        best = max(valid(rule), key=lambda a: log_probability(own, row, a))
        assert found[row, :len(best)].tolist() == best
        assert not found[row, len(best):].any()


@pytest.mark.parametrize("width", [1, 3])
def test_answers_are_valid_however_narrow_the_beam(width):
    there = jnp.asarray([[True] * 4, [True] * 3 + [False]])
    for rule in ("hull", "tour"):
        found = search(NET, params(spread=30.0), POINTS, there, steps=6, rule=rule,
                       width=width).tolist()
        for answer, n in zip(found, (4, 3)):
            cut = answer.index(0)
            assert answer[:cut + 1] in list(valid(rule, n))
            assert not any(answer[cut:])


def test_a_greedy_answer_follows_the_network():
    own = params()
    found = np.asarray(search(NET, own, POINTS, ALL, steps=5))
    logits = np.asarray(compiled.apply(NET, own, POINTS, jnp.asarray(found)))
    for row, answer in enumerate(found):
        ends = answer.tolist().index(0) if 0 in answer else 4
        best = logits[row].argmax(-1)
        assert (best[:ends + 1] == answer[:ends + 1]).all()


def test_padding_is_not_there():
    own, targets = params(), jnp.asarray([[1, 3, 2, 1, 0]] * 2)
    more = jnp.concatenate([POINTS, 7 + POINTS[:, :2]], 1)
    there = jnp.arange(6)[None].repeat(2, 0) < 4
    have = compiled.apply(NET, own, more, targets, there)
    close(have[..., :5], compiled.apply(NET, own, POINTS, targets))
    assert (np.asarray(have[..., 5:]) < -1e29).all()

    def loss(more):
        logits = NET.apply(own, more, targets, there)
        return jax.nn.log_softmax(logits)[..., :5].sum()

    assert (np.asarray(jax.jit(jax.grad(loss))(more))[:, 4:] == 0).all()


def test_a_dictionary_ends_where_it_ends():
    model = PointerNet(6, dictionary=5)
    own, targets = params(model), jnp.asarray([[1, 3, 2, 1, 0]] * 2)
    logits = compiled.apply(model, own, POINTS, targets)
    assert logits.shape == (2, 5, 6) and (np.asarray(logits[..., 5]) < -1e29).all()
    found = search(model, own, POINTS, ALL, steps=6, rule="hull", width=2)
    assert all(answer[:answer.index(0) + 1] in list(valid("hull"))
               for answer in found.tolist())
    with pytest.raises(ValueError, match="6 points: expected at most dictionary=5"):
        model.apply(own, jnp.ones((1, 6, 2)))


def test_additive_scores_in_float64_and_without_an_array_of_all():
    keys = jax.random.split(jax.random.key(3), 4)
    q, k, v, w = (jax.random.normal(key, shape) for key, shape in zip(
        keys, ((2, 5, 6), (2, 7, 6), (6,), (2, 7, 3))))
    wide = [np.asarray(a, np.float64) for a in (q, k, v, w)]
    want = np.tanh(wide[0][:, :, None] + wide[1][:, None]) @ wide[2]
    close(jax.jit(additive_scores)(q, k, v), want)
    p = np.exp(want) / np.exp(want).sum(-1, keepdims=True)
    close(jax.jit(additive)(q, k, v, w), p @ wide[3])
    grads = jax.jit(jax.grad(lambda *a: (additive(*a) ** 2).sum(), (0, 1, 2, 3)))(
        q, k, v, w)
    with jax.enable_x64(True):
        plain = jax.grad(lambda q, k, v, w: ((jax.nn.softmax(jnp.tanh(
            q[:, :, None] + k[:, None]) @ v) @ w) ** 2).sum(), (0, 1, 2, 3))
        close_all = jax.device_get(jax.jit(plain)(*map(jnp.asarray, wide)))
    for a, b in zip(grads, close_all, strict=True):
        close(a, b, "gradient")
    t, h = 256, 64
    shapes = [jax.ShapeDtypeStruct((1, t, h), jnp.float32)] * 2
    one = jax.ShapeDtypeStruct((h,), jnp.float32)
    spent = cost.memory(jax.jit(jax.grad(
        lambda *a: (additive_scores(*a) ** 2).sum(), (0, 1, 2))), *shapes, one)
    assert spent < t * t * h  # a quarter of one array of float32


@pytest.mark.parametrize("call, message", [
    (lambda: search(NET, params(), POINTS, ALL, steps=6, rule="all"), "rule='all'"),
    (lambda: search(NET, params(), POINTS, ALL, steps=5, rule="tour"), "expected 6"),
    (lambda: search(NET, params(), POINTS, ALL, steps=2, rule="hull"), "expected 5"),
    (lambda: search(NET, params(), POINTS, ALL, steps=0), "steps=0: expected 1"),
    (lambda: PointerNet(0).init(jax.random.key(0), POINTS), "hidden=0"),
    (lambda: NET.init(jax.random.key(0), POINTS[..., :1]), r"expected \[B,n,2\]"),
])
def test_wrong_calls_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
