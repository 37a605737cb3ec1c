"""Commands that show what a paper claims: what they compare is what they say."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from attn.softmax import Softmax
from experiments import distil, extend, regions, routed
from experiments.measure import seeds
from experiments.training import imitation
from experiments.training.plan import plan_of
from experiments.training.scanned import next_token, train
from models.lora import kernels_of
from tests import compiled


def seen(mask, t=32):
    """[T,T] booleans."""
    i, j = np.mgrid[:t, :t]
    return np.broadcast_to(mask(0, i, j), (t, t))


def test_bases_read_near_tokens_and_the_ends_of_regions():
    own = regions.bases(8)
    for i in range(32):
        near = {j for j in range(i + 1) if j // 8 == i // 8}
        spans = {(i >> bit << bit) - 1 for bit in range(6) if i >> bit & 1}
        for name, expected in (
            ("fixed", near | {j for j in range(i) if j % 8 == 7}),
            ("axial", near | {j for j in range(i) if j % 8 == i % 8}),
            ("logsparse", spans | {i}),
        ):
            assert {*np.flatnonzero(seen(own[name])[i])} == expected, (name, i)
    assert all(mask.causal for mask in own.values())


def test_pixels_are_predicted_from_those_before():
    rows = regions.digits("valid")
    tokens, targets = rows["tokens"], rows["targets"]
    assert tokens.shape == targets.shape == (360, 64)
    assert (tokens[:, 1:] == targets[:, :-1]).all() and (tokens[:, 0] == 17).all()
    assert targets.min() == 0 and targets.max() == 16
    whole = dataclasses.replace(regions.TINY, block=64)
    model = whole.model(regions.Combiner(block=64))
    params = compiled.init(model, jax.random.key(0), tokens[:1])
    exact = whole.model(Softmax())
    np.testing.assert_allclose(*(compiled.apply(m, params, tokens[:2]) for m in (
        model, exact)), atol=1e-5)


def test_facts_stand_further_back_than_local_heads_reach():
    c = dataclasses.replace(routed.Config(), layers=2, length=160)
    data = c.data()
    batch = data.batch(0, 20)
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.min() == 0 and tokens.max() < data.answers <= targets.max()
    assert targets.max() < data.vocab and (targets >= 0).sum() == 20 * 2 * c.types
    for row, at in np.argwhere(targets >= 0):
        kind = tokens[row, at] - c.noise
        told = (tokens[row] - data.facts) // c.values == kind
        assert told.sum() == 1 and told.argmax() < data.first
        value = (tokens[row, told.argmax()] - data.facts) % c.values
        assert targets[row, at] == data.answers + value
    model = c.model(c.attentions()["local"])
    params = compiled.init(model, jax.random.key(0), tokens[:1])
    other = np.where(np.arange(c.length) < data.first, 0, tokens)
    one, two = (compiled.apply(model, params, a[:4])[:, c.length // 2:]
                for a in (tokens, other))
    np.testing.assert_array_equal(one, two)


def test_centroids_follow_where_they_are_said_to():
    c = routed.TINY
    model, rows = c.model(c.attentions()["routed"]), c.data().batch(0, c.rows)
    first = compiled.init(model, jax.random.split(jax.random.key(0))[0],
                          rows["tokens"][:1])
    moved = train(model, routed.moved, ("tokens",), rows, plan_of(c), ("centroids",))
    still = train(model, next_token, ("tokens",), rows, plan_of(c))
    chex.assert_trees_all_equal(still.params["centroids"], first["centroids"])
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), moved.params["centroids"],
                        first["centroids"])
    assert max(jax.tree.leaves(gaps)) > 1e-4


def test_the_weight_in_clusters_by_loops():
    rng = np.random.default_rng(0)
    q, mean = rng.normal(size=(1, 12, 1, 4)), rng.normal(size=(1, 3, 4))
    k = q / np.linalg.norm(q, axis=-1, keepdims=True)
    clusters = [{*np.argsort(-k[0, :, 0] @ own)[:5].tolist()} for own in mean[0]]
    shares = []
    for t in (4, 11):
        weight = np.exp(k[0, :t, 0] @ q[0, t, 0] / 2)
        own = [any({t, j} <= of for of in clusters) for j in range(t)]
        shares.append((weight * own).sum() / weight.sum())
    rows = np.isin(np.arange(12), (4, 11))[None]
    found = routed.covered(*(a.astype(np.float32) for a in (q, mean)), 5, rows)
    np.testing.assert_allclose(found, np.mean(shares), rtol=1e-5)


def test_a_student_begins_with_the_teacher_who_stays():
    c = distil.TINY
    exact, rows = c.model(Softmax()), c.text.batch(0, 4)
    teacher = compiled.init(exact, jax.random.key(1), rows["tokens"])
    model = c.model(c.students()["SEA"])
    start = imitation.begun(model, teacher, rows["tokens"], 0)
    assert {*start} == {"params", "fixed", "teacher"}
    after = train(model, imitation.imitated, ("tokens",), rows, c.plan(2, 2, 1e-3),
                  start=start).params
    for name in ("fixed", "teacher"):
        chex.assert_trees_all_equal(after[name], start[name])
    taught = exact.apply({"params": start["params"]}, rows["tokens"])
    np.testing.assert_allclose(
        taught, exact.apply(teacher, rows["tokens"]), atol=1e-6)
    found = distil.estimate(model, imitation.own(after), teacher, rows["tokens"])
    assert abs(found["keys"] - c.keep) < 0.5 and -1 <= found["correlation"] <= 1


def test_only_adapters_embeddings_and_norms_are_fine_tuned():
    c = dataclasses.replace(extend.TINY, seeds=1, more=2)
    base = extend.pretrained(c)
    found = extend.extended(c, base, "sf")["params"]
    targets = {"q", "k", "v", "out"}
    old, new = kernels_of(base), kernels_of(found)
    for path in old:
        same = np.array_equal(old[path], new[path])
        assert same == (path.split("/")[-1] not in targets), path
    for name in ("embed", "norm"):
        assert not np.array_equal(*(jax.tree.leaves(a[name])[0] for a in (base, found)))


def test_the_spread_of_seeds_in_words():
    found = seeds.merged([{"a": 0.5, "b": 1.0}, {"a": 0.25, "b": 1.0}])
    assert seeds.spread(found, "a", "{:.2f}") == "0.38 (0.25 to 0.50)"
    assert seeds.spread(found, "b", "{:.1f}") == "1.0"


@pytest.mark.parametrize("wrong, message", [
    (lambda: regions.Config(plans=("strided",)), "'strided': expected of"),
    (lambda: routed.Config(length=60), "length=60: expected 64 or more"),
    (lambda: routed.Config(block=64), "first=-63: expected types=16 to half"),
])
def test_wrong_settings_say_what_was_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
