"""CAB: scores and index by definition, data that are their own answers, a sweep that
goes on where it was."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

from attn.abc import ABC
from attn.lara import LARA
from attn.local import Local
from attn.masks import Causal, Window
from attn.routing import Routing
from attn.softmax import Softmax
from attn.topk import TopK
from experiments import cab, leaderboard
from experiments.data.clouds import BODIES, Clouds
from experiments.data.series import Series
from experiments.data.shapes import Shapes
from experiments.data.speech import LASTS, Speech
from experiments.data.summaries import Summaries
from experiments.measure.cab import grid, index, page, scores, sweep
from experiments.measure.cab.efficiency import efficiency_length
from experiments.measure.cab.suite import FULL, NAMES, SMALL
from experiments.training.cells import cell, slug
from experiments.training.plan import TrainConfig
from experiments.training.scanned import train
from models.places import Places

RNG = np.random.default_rng(0)
GOLDEN = np.load("tests/golden/cab.npz")


def test_warping_by_all_ways():
    def cheapest(cost, i, j):
        """(sum, steps) of the best way to (i, j), by recursion."""
        before = [cheapest(cost, i - a, j - b) for a, b in ((1, 1), (1, 0), (0, 1))
                  if i >= a and j >= b] or [(0.0, 0)]
        total, steps = min(before, key=lambda way: way[0])
        return total + cost[i, j], steps + 1

    a, b = RNG.normal(size=(2, 5, 3)), RNG.normal(size=(2, 4, 3))
    for x, y, found in zip(a, b, scores.aligned(a, b)):
        cost = np.linalg.norm(x[:, None] - y[None], axis=-1)
        total, steps = cheapest(cost, 4, 3)
        assert found == pytest.approx(total / steps, rel=1e-12)
    slow = np.repeat(a, 2, 1)
    np.testing.assert_allclose(scores.aligned(slow, a), 0, atol=1e-12)
    assert scores.spectral(np.repeat(a, 6, 2), np.repeat(a, 6, 2))["mcd"] < 1e-6


def test_rouge_by_hand():
    have, want = np.array([[1, 2, 3, 4]]), np.array([[2, 1, 3, 4]])
    found = scores.rouge(have, want)
    assert found["r1"] == 100 and found["r2"] == pytest.approx(100 / 3)
    assert found["rl"] == 75
    assert scores.rouge(have, have) == {"r1": 100, "r2": 100, "rl": 100}


def test_similarity_of_images_by_loops():
    a, b = RNG.uniform(size=(2, 1, 9, 10))
    found, want = scores.images(a, b), []
    for i in range(3):
        for j in range(4):
            x, y = (c[0, i:i + 7, j:j + 7].ravel() for c in (a, b))
            cov = np.cov(x, y)
            means = x.mean() ** 2 + y.mean() ** 2 + 1e-4
            want.append((2 * x.mean() * y.mean() + 1e-4) * (2 * cov[0, 1] + 9e-4)
                        / (means * (cov[0, 0] + cov[1, 1] + 9e-4)))
    assert found["ssim"] == pytest.approx(np.mean(want), rel=1e-9)
    assert found["psnr"] == pytest.approx(-10 * np.log10(((a - b) ** 2).mean()))


def test_clouds_and_forecasts_by_definition():
    a, b = RNG.normal(size=(1, 6, 3)), RNG.normal(size=(1, 5, 3))
    far = np.linalg.norm(a[0, :, None] - b[0, None], axis=-1)
    found = scores.clouds(a, b, near=1.0)
    assert found["cd1"] == pytest.approx(500 * (far.min(0).mean() + far.min(1).mean()))
    assert found["cd2"] == pytest.approx(
        1000 * ((far**2).min(0).mean() + (far**2).min(1).mean()))
    p, r = (far.min(1) < 1).mean(), (far.min(0) < 1).mean()
    assert found["f"] == pytest.approx(2 * p * r / (p + r))
    assert scores.clouds(a, a)["f"] == 1
    zeros = np.zeros((1, 2, 2))
    assert scores.forecast(zeros + np.array([0, 2]), zeros) == {"mse": 3, "mae": 1.5}


def test_the_index_is_the_authors_with_their_constants():
    for n, pattern in enumerate(("NS", "CS", "NC", "CC")):
        mu, sigma = index.PAPER[pattern]
        for own, name in ((mu, "mu"), (sigma, "sigma")):
            np.testing.assert_allclose(
                own, GOLDEN[f"compositional_index/p{n}_{name}"], rtol=1e-9)
        values = GOLDEN[f"compositional_index/p{n}_scores"]
        pairs = [p for own in index.measures(pattern).values() for p in own]
        sign = [index.BY_NAME[net].measures[one] for net, one in pairs]
        np.testing.assert_array_equal(
            sign, GOLDEN[f"compositional_index/p{n}_sign"])
        cells = {}
        for (net, one), value in zip(pairs, values, strict=True):
            cells.setdefault((net, pattern, "a"), {})[one] = float(value)
        found = index.index(cells, pattern, ["a"], "paper")["a"]
        assert found.pop("index") == pytest.approx(
            float(GOLDEN[f"compositional_index/p{n}_ci"]))
        np.testing.assert_allclose(
            list(found.values()), GOLDEN[f"compositional_index/p{n}_task"])


def test_the_index_of_what_is_compared():
    cells = {("lm", "CS", name): {"perplexity": x} for name, x in (("a", 4), ("b", 8))}
    # of two, or one alone, the own mean says nothing
    assert index.index(cells, "CS", ["a", "b"]) == {}
    cells["lm", "CS", "c"] = {"perplexity": 6}
    for name, x in zip("abc", (1.0, 2.0, 6.0)):
        cells["summary", "CS", name] = {"r1": x, "r2": x, "rl": x}
    names, far = ["a", "b", "c", "d"], np.sqrt(1.5)
    full = index.index(cells, "CS", names)
    assert full["a"] == {"Sum": pytest.approx(-2 / np.sqrt(14 / 3)),
                         "LM": pytest.approx(far),
                         "index": pytest.approx(far / 2 - 1 / np.sqrt(14 / 3))}
    assert full["b"]["LM"] == pytest.approx(-far) and "d" not in full
    # d was asked one task alone: only what it shares with all others is compared
    cells["lm", "CS", "d"] = {"perplexity": 6}
    found = index.index(cells, "CS", names)
    assert "Sum" in found["a"]
    assert all(one["index"] == one["LM"] for one in found.values())
    # and where e has the other one alone, all share none
    cells["summary", "CS", "e"] = {"r1": 1.0, "r2": 1.0, "rl": 1.0}
    none = index.index(cells, "CS", [*names, "e"])
    assert len(none) == 5 and not index.ranked(none)
    assert index.rank_correlations({"NS": none, "CS": none}) == {}
    both = {"NS": {n: {"index": x} for n, x in zip("abc", (1, 2, 3))},
            "CC": {n: {"index": x} for n, x in zip("cab", (1, 2, 3))}}
    assert index.rank_correlations(both) == {"NS CC": pytest.approx(-0.5)}


def test_what_each_seed_says_stands_beside_the_medians():
    config_ = dataclasses.replace(
        cab.TINY, attentions=(Softmax(), Local(), ABC()), tasks=("lm",),
        patterns=("CS",), seeds=2, lengths=())
    read = {0: (4.0, 3.0, 8.0), 1: (4.0, 6.0, 5.0)}  # perplexities by seed
    found = [(sweep.Run(SMALL[5], "CS", one, seed), {"perplexity": x})
             for seed, each in read.items()
             for one, x in zip(config_.attentions, each)]
    assert found[0][0].task.name == "lm"
    result = sweep.compared(config_, found, {})
    alone = result["index_seeds"]["CS"]
    assert list(alone) == ["Softmax()", "Local()", "ABC()"]
    for n, seed in enumerate(read):
        x = np.array(read[seed])
        np.testing.assert_allclose(
            [one[n] for one in alone.values()], (x.mean() - x) / x.std())
    for name, own in result["own"]["CS"].items():
        assert own["index"] == own["LM"] == pytest.approx(np.mean(alone[name]))
    assert [row["perplexity"] for row in result["rows"]] == [4, 4.5, 6.5]
    titles, rows = page.cells_of(result)
    assert titles[1] == "CS" and rows[1][1] == "-0.15\n-1.22 to +0.93"
    assert "0 of 2 are above exact attention (+0.84), 0 with every seed" in (
        page.claims(result))
    one = sweep.compared(config_, found[:3], {})
    assert "index_seeds" not in one and one["own"]["CS"]["Local()"]["index"] == (
        pytest.approx(alone["Local()"][0]))
    # a seed that lacks a network has no say in its index
    assert sweep.middle([{"a": {"LM": 1.0, "index": None}}, {}]) == {
        "a": {"LM": 1.0, "index": None}}


def test_the_length_at_which_a_line_meets_a_parabola():
    at = (256, 512, 1024, 2048)
    exact = [2e-3 * t * t + t + 7 for t in at]
    other = [5 * t + 100 for t in at]
    # 0.002 T^2 - 4 T - 93 = 0
    want = (4 + np.sqrt(16 + 4 * 2e-3 * 93)) / 4e-3
    assert efficiency_length(at, exact, other) == pytest.approx(want)
    other[0] += 900
    assert efficiency_length(at, exact, other, True) == pytest.approx(want)
    # no line describes a parabola, its own or one above it
    assert efficiency_length(at, exact, exact) is None
    assert efficiency_length(at, [t + 2000 for t in at], exact) is None
    assert efficiency_length(at, exact, [t / 2 for t in at]) == "always"
    # where the matrix shows none, what was measured is all that is said
    straight = [float(t) for t in at]
    assert efficiency_length(at, straight, [t + 1.0 for t in at]) == "never"
    assert efficiency_length(at, straight, [t - 1.0 for t in at]) == "always"
    assert efficiency_length(at, straight, [512.0] * 4) is None


@pytest.mark.parametrize("data", [
    Speech(length=40, count=7), Summaries(), Shapes(length=16), Series(), Clouds(),
], ids=lambda data: type(data).__name__)
def test_rows_are_those_of_their_step(data):
    one, again, other = data.batch(3, 4), data.batch(3, 4), data.batch(4, 4)
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
        assert np.isfinite(one[name]).all() and len(one[name]) == 4
    assert any((one[name] != other[name]).any() for name in one)


def test_data_are_what_they_say():
    speech = Speech(length=40, count=7).batch(0, 5)
    assert (speech["lasts"].sum(1) == 40).all() and speech["lasts"].min() >= 1
    assert speech["frames"].shape == (5, 40, 20)
    assert (speech["phones"][:, -1] == 0).all()
    more = speech["lasts"][:, :3] - LASTS[speech["phones"][:, :3]]
    np.testing.assert_array_equal(more, speech["phones"][:, 1:4] % 2 == 0)
    summary = Summaries().batch(0, 5)
    for source, names in zip(summary["source"], summary["summary"]):
        np.testing.assert_array_equal(source[source >= 32], names)
    np.testing.assert_array_equal(summary["before"][:, 1:], summary["summary"][:, :-1])
    shapes = Shapes(length=16).batch(0, 3)
    given, sharp = (shapes[name].mean((1, 2)) for name in ("given", "sharp"))
    np.testing.assert_allclose(given, sharp, atol=1e-6)
    series = Series().batch(0, 6)
    np.testing.assert_allclose(series["past"].mean(1), 0, atol=1e-5)
    clouds = Clouds(length=30, missing=10).batch(0, 8)
    assert clouds["missing"].shape == (8, 10, 3) and len(BODIES) == 5
    both = np.concatenate([clouds["points"], clouds["missing"]], 1)
    np.testing.assert_allclose(np.linalg.norm(both, axis=-1).max(1), 1, rtol=1e-5)


def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    config_ = dataclasses.replace(cab.TINY, folder=str(tmp_path / "run"))
    made = []

    def judged(task, *rest):
        made.append(task.name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"r1": 1.0, "r2": 2.0, "rl": float(len(made))}

    monkeypatch.setattr(sweep, "train", lambda model, *_: type(
        "Trained", (), {"params": None, "losses": np.ones(4)}))

    def costs(one, lengths, *_):
        if isinstance(one, Local):
            raise ValueError("it cannot read 64 tokens")
        return {"ms": [float(t * t) for t in lengths], "mb": [1.0 * t for t in lengths]}

    monkeypatch.setattr(sweep, "costs", costs)
    monkeypatch.setattr(type(SMALL[2]), "judged", judged)
    with pytest.raises(KeyboardInterrupt):
        cab.run(config_)
    record = tmp_path / "cab.json"
    early = cab.run(dataclasses.replace(config_, minutes=0.0, record=str(record)))
    assert len(made) == 2 and early["trainings"] == 2  # exact, twice
    assert early["networks"] == 1 and early["seconds of training"] > 0
    said = json.loads(record.read_text())["left_out"]
    assert "Of 3 networks 1 were trained" in said
    assert "Costs of 2 of 2 layers were not measured" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "minutes=" not in page and "record=" not in page
    found = cab.run(dataclasses.replace(config_, record=str(record)))
    # exact attention is one network in both patterns, and stays; a cost fails
    assert len(made) == 4 and found["trainings"] == 4 and found["failed"] == 1
    assert len(json.loads(record.read_text())["rows"]) == 4
    with pytest.raises(ValueError, match="expected 4 rows or more, got 0"):
        cab.run(dataclasses.replace(
            config_, minutes=0.0, record=str(record), folder=str(tmp_path / "new")))
    again = cab.run(config_)
    assert len(made) == 4 and again == found
    result = json.loads((tmp_path / "run" / "cab.json").read_text())
    assert "speech" in result["left_out"] and len(result["rows"]) == 4
    assert (tmp_path / "run" / "cab.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Local(window=2)" in page and "noncausal self" in page


def test_what_fails_is_said_and_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(sweep, "train", lambda *_: (_ for _ in ()).throw(
        ValueError("it cannot")))
    one = sweep.Run(SMALL[2], "NS", Softmax(), 0)
    assert one.make()["failed"] == "it cannot" and one.name == "summary exact 0"
    assert sweep.Run(SMALL[2], "NS", LARA(), 1).name == "summary NS LARA() 1"


def test_attentions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="LARA has none of the patterns"):
        dataclasses.replace(cab.TINY, attentions=(LARA(),), tasks=("lm",))
    with pytest.raises(ValueError, match="Softmax has none"):
        dataclasses.replace(cab.TINY, tasks=("series",), attentions=(
            Softmax(mask=Causal() & Window(2)),), patterns=("NC",))
    with pytest.raises(ValueError, match="tasks: 'tts': expected of"):
        dataclasses.replace(cab.TINY, tasks=("tts",))
    with pytest.raises(ValueError, match="fit a parabola"):
        dataclasses.replace(cab.TINY, lengths=(16, 32))
    with pytest.raises(ValueError, match="width=8: expected a multiple of heads=3"):
        dataclasses.replace(cab.TINY, heads=3)
    assert NAMES == tuple(task.name for task in SMALL) and len(FULL) == 8
    with pytest.raises(ValueError, match="which are not written yet"):
        SMALL[2].check(Routing(clusters=2))
    SMALL[2].check(Routing(clusters=2, members="prefix"))


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_a_task_is_traced(task):
    """Its loss and its judge fit its data: shapes alone, nothing is compiled."""
    model = task.network(Places())
    rows = task.drawn("train", 0)
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in rows.items()}
    inputs = [shapes[name] for name in task.inputs]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    value = jax.eval_shape(lambda p, rows: task.loss(model, p, rows, jax.random.key(0)),
                           params, shapes)
    assert value.shape == () and task.measures


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_a_task_judges(task, monkeypatch):
    """All its measures, of what the network gives by its shapes: ones, as nothing is
    compiled."""
    model, home = task.network(Places()), sys.modules[type(task).__module__]
    rows = task.drawn("valid", 0)
    params = jax.eval_shape(
        model.init, jax.random.key(0), *(rows[name] for name in task.inputs))

    def ones(f):
        return lambda *args: jax.tree.map(
            lambda a: np.ones(a.shape, a.dtype), jax.eval_shape(f, *args))

    fakes = {
        "called": lambda model: ones(model.apply),
        "lossed": lambda loss, model: ones(functools.partial(loss, model)),
        "_sampled": lambda model, *args: ones(
            functools.partial(sampled, model))(*args),
        "_written": lambda model, params, rows, many: ones(
            lambda params, rows: written(model, params, rows, many))(params, rows),
        "_spoken": lambda model, params, rows, many: ones(
            lambda params, rows: spoken(model, params, rows, many))(params, rows),
    }
    sampled, written, spoken = (
        getattr(home, name, None) for name in ("_sampled", "_written", "_spoken"))
    for name, fake in fakes.items():
        if hasattr(home, name):
            monkeypatch.setattr(home, name, fake)
    found = task.judged(model, params, rows, jax.random.key(1))
    assert set(task.measures) <= set(found)
    assert all(isinstance(one, float) for one in found.values())


def test_a_whole_training_learns(tmp_path):
    import flax.linen as nn

    model = nn.Dense(1)
    x = RNG.normal(size=(64, 3)).astype(np.float32)
    rows = {"x": x, "y": x @ np.array([[1.0], [2.0], [3.0]], np.float32)}
    plan = TrainConfig(steps=60, batch=16, learning_rate=0.3, warmup=2, weight_decay=0)
    one = train(model, _squares, ("x",), rows, plan)
    assert one.losses[-1] < 1e-2 < one.losses[0] and len(one.losses) == 60
    other = train(model, _squares, ("x",), rows, dataclasses.replace(plan, seed=1))
    assert other.losses[0] != one.losses[0]


def test_a_training_leaves_alone_what_is_fixed():
    import flax.linen as nn

    class Fixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            twos = self.variable("fixed", "twos", lambda: np.full((1,), 2, np.float32))
            return nn.Dense(1)(x) * twos.value[None]

    x = RNG.normal(size=(8, 3)).astype(np.float32)
    plan = TrainConfig(steps=2, batch=4, learning_rate=0.3, weight_decay=0)
    rows = {"x": x, "y": x[:, :1]}
    params = train(Fixed(), _squares, ("x",), rows, plan).params
    assert set(params) == {"params", "fixed"} and params["fixed"]["twos"] == 2
    # without a gradient the kernel decays, and the bias does not
    start = {"params": {"Dense_0": {"kernel": np.ones((3, 1), np.float32),
                                    "bias": np.ones(1, np.float32)}},
             "fixed": {"twos": np.zeros(1, np.float32)}}
    decays = dataclasses.replace(plan, weight_decay=0.1)
    after = train(Fixed(), _squares, ("x",), rows, decays, start=start).params
    dense = after["params"]["Dense_0"]
    assert (dense["kernel"] < 0.99).all() and dense["bias"] == 1


def _squares(model, params, batch, key):
    return ((model.apply(params, batch["x"]) - batch["y"]) ** 2).mean()


def test_cells_are_kept_and_named_apart(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"n": len(made)}

    assert cell(tmp_path, "a b", make) == ({"n": 1}, False)
    assert cell(tmp_path, "a b", make) == ({"n": 1}, True)
    assert slug("ABC(n=1)") != slug("ABC[n=1]") and slug("lm") == "lm"
    (tmp_path / "cells" / f"{slug('a b')}.json").write_text("{")
    assert cell(tmp_path, "a b", make) == ({"n": 2}, False)


def test_every_policy_of_the_leaderboard_reads_with_exact_attentions_network():
    config_ = leaderboard.Config()
    free = [one for one in config_.attentions if leaderboard.source(one) != one]
    assert [type(one).__name__ for one in free] == [
        "SnapKV", "PyramidKV", "AdaKV", "H2O", "TOVA", "Streaming", "Quest", "TopK",
        "Recycled", "HiP", "KIVI", "SAQ"]
    assert {leaderboard.source(one) for one in free} == {Softmax()}
    sparse = TopK(top_k=6, block=1, sink=0, local=2, prefill="sparse")
    assert leaderboard.source(sparse) == sparse
    shapes = []
    for one in (Softmax(), *free[:2], *free[-3:]):
        model = config_.recall(one, 0).model()
        tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        shapes.append(jax.tree.map(lambda a: a.shape, params))
    assert all(one == shapes[0] for one in shapes)


@pytest.mark.parametrize("given, words", [
    ({"pairs": 100}, "length=48: expected 100 or more"),
    ({"heads": 3}, "expected a multiple of heads=3"),
    ({"long": 40}, "long=40: expected length=48 or more"),
])
def test_a_board_that_does_not_fit_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        leaderboard.Config(**given)


def test_a_board_of_one_seed_may_get_more(tmp_path, monkeypatch, capsys):
    config_ = dataclasses.replace(
        leaderboard.TINY, attentions=leaderboard.TINY.attentions[:1],
        folder=str(tmp_path / "board"))
    first = leaderboard.run(config_)["Softmax() recall"]
    trained = []
    was = leaderboard.recall.trained
    monkeypatch.setattr(
        leaderboard.recall, "trained", lambda task: trained.append(task) or was(task))
    leaderboard.run(dataclasses.replace(config_, seeds=2))
    assert [one.seed for one in trained] == [1]
    assert "seeds=1 becomes 2: what is there is kept" in capsys.readouterr().err
    made = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert made["rows"][0]["recall_seeds"][0] == first and made["seeds"] == [0, 1]
    # what is not to be begun leaves a row out
    leaderboard.run(dataclasses.replace(config_, seeds=3, minutes=0.0))
    assert json.loads(
        (tmp_path / "board" / "leaderboard.json").read_text())["rows"] == []


def test_all_keeps_what_is_set():
    every = cab.whole(cab.Config(all=True))
    assert (every.tasks, every.seeds, every.minutes) == (NAMES, 3, None)
    some = cab.whole(cab.Config(all=True, tasks=("lm", "mlm"), seeds=2, minutes=5.0))
    assert (some.tasks, some.seeds, some.minutes) == (("lm", "mlm"), 2, 5.0)
    assert cab.whole(cab.TINY) == cab.TINY


def test_each_pattern_is_asked_once_before_any_is_asked_twice():
    pairs = [(task.name, pattern) for task, pattern in grid.asked(cab.Config())]
    assert [p for _, p in pairs] == ["NS", "CS", "NC", "CC", "NS", "CS", "NS"]
    assert pairs[:4] == [("speech", "NS"), ("lm", "CS"), ("series", "NC"),
                         ("summary", "CC")]
    turned = cab.Config(tasks=("mlm", "summary", "mlm"), patterns=("NS", "CC"))
    assert [(task.name, p) for task, p in grid.asked(turned)] == [
        ("mlm", "NS"), ("summary", "CC"), ("summary", "NS")]
