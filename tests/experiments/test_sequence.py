"""The data of hull, music and algorithms, held against their definitions; scores."""

import dataclasses
import itertools
import sys

import numpy as np
import pytest
from scipy import spatial

from experiments import algorithms
from experiments import music as command
from experiments.cli import config
from experiments.data import lists, music, points
from experiments.data.lists import Lists
from experiments.data.music import REST, Chorales, Note
from experiments.data.points import Points
from experiments.measure import pointing

RNG = np.random.default_rng(0)


def test_shortest_tours_by_all_of_them():
    many = RNG.uniform(size=(3, 6, 2))
    found, tours = points.held_karp(many)
    for p, length, tour in zip(many, found, tours):
        each = [np.array([[1, *rest]]) for rest in itertools.permutations(range(2, 7))]
        best = min(each, key=lambda t: points.length(p[None], t)[0])
        assert length == pytest.approx(points.length(p[None], best)[0], rel=1e-12)
        assert tour[0] == 1 and tour[1] < tour[-1] and sorted(tour) == [*range(1, 7)]
    for p, length in zip(many, found):
        near = points.two_opt(p)
        assert sorted(near) == [*range(1, 7)] and near[0] == 1
        assert length <= points.length(p[None], near[None])[0] + 1e-12 < 1.2 * length


def test_tours_go_counter_clockwise_unless_by_index():
    """A direction by index left the network on the plateau of tours at random."""
    for n in (5, points.EXACT + 1):
        left, low = (Points(task="tsp", least=n, length=n, direction=d).batch(0, 8)
                     for d in ("plane", "index"))
        assert (left["points"] == low["points"]).all()
        turned = 0
        for p, a, b in zip(left["points"], left["targets"], low["targets"]):
            a, b = a[:n], b[:n]
            x, y = p[a - 1].astype(float).T
            assert x @ np.roll(y, -1) > y @ np.roll(x, -1) and a[0] == b[0] == 1
            assert b[1] < b[-1] and a.tolist() in (b.tolist(), [1, *b[:0:-1].tolist()])
            turned += a[1] != b[1]
        assert 0 < turned < 8


def test_triangles_are_in_order_and_hulls_are_simple():
    p = RNG.uniform(size=(9, 2))
    found = points.delaunay(p)
    assert (np.diff(found, axis=1) > 0).all() and found.min() >= 1
    corners = points.hull(p)
    assert corners[0] == corners.min() and points.simple(p[corners - 1])
    assert points.area(p[corners - 1]) == pytest.approx(spatial.ConvexHull(p).volume)
    total = sum(points.area(p[one - 1]) for one in found)
    assert total == pytest.approx(points.area(p[corners - 1]))
    # three corners, and the most triangles: the answer and its end fill its steps
    p[:3] = [0, 0], [9, 0], [0, 9]
    assert points.delaunay(p).size + 1 == points.steps_of("delaunay", len(p))
    square = np.array([[0, 0], [1, 1], [1, 0], [0, 1]], float)
    assert not points.simple(square) and points.simple(square[[0, 2, 1, 3]])
    assert not points.simple(square[:2])


@pytest.mark.parametrize("task", points.TASKS)
def test_lists_of_points_are_their_own_answers(task):
    data = Points(task=task, least=4, length=7)
    batch = data.batch(0, 5)
    counts = batch["there"].sum(1)
    assert set(counts) <= {4, 5, 6, 7} and (batch["points"][~batch["there"]] == 0).all()
    for row, n in zip(batch["targets"], counts):
        ends = row.tolist().index(0)
        assert (row[:ends] > 0).all() and (row[:ends] <= n).all()
        assert (row[ends + 1:] == -1).all()
    scores = pointing.SCORES[task](
        {**batch, "points": batch["points"]} if task != "tsp" else
        Points(task=task, least=5, length=5).batch(0, 4),
        np.maximum(batch["targets"], 0) if task != "tsp" else
        Points(task=task, least=5, length=5).batch(0, 4)["targets"])
    if task == "tsp":
        assert scores["length"] == scores["optimal"] < scores["random"]
    else:
        assert scores["accuracy"] == 1 and scores.get("failed", 0) == 0
        assert scores.get("area", 1) == pytest.approx(1)


def test_algorithms_by_hand():
    x = np.array([[2.0, -3.0, 4.0, -1.0, 3.0]])
    for name, want in {
        "sum": [2, -1, 3, 2, 5], "min": [2, -3, -3, -3, -3],
        "median": [2, -0.5, 2, 0.5, 2], "sort": [-3, -1, 2, 3, 4],
        "run": [2, 2, 4, 4, 6],
    }.items():
        np.testing.assert_array_equal(lists.TASKS[name](x)[0], want, name)


def test_larger_lists_are_not_among_the_known():
    known, large = Lists().batch(0, 500), Lists(scale=3.0).batch(0, 500)
    assert np.abs(known["x"]).max() <= 2 < np.abs(large["x"]).max() <= 6
    assert (known["x"][:, -1] == 0).all() and (known["y"][:, -1] == 0).all()
    fixed = Lists(many=3)
    rows = np.concatenate([fixed.batch(n, 20)["x"] for n in range(3)])
    assert len(np.unique(rows[..., 0], axis=0)) == 3
    assert (fixed.batch(4, 9)["x"] == Lists(many=3).batch(4, 9)["x"]).all()
    config_ = algorithms.TINY
    assert {config_.model(name).onehot for name in algorithms.NETWORKS} == {0, 4}


def test_algorithms_needs_tasks_and_networks_and_has_a_ratio():
    for name in ("tasks", "networks"):
        with pytest.raises(ValueError, match=f"{name}=.*: expected one or more"):
            dataclasses.replace(algorithms.TINY, **{name: ()})
    config_ = dataclasses.replace(algorithms.TINY, scales=(2, 3))
    found = {f"min_{name}_{scale}": 1.0 for scale in (2, 3)
             for name in ("standard", "positional", "ratio")}
    table = algorithms.table(config_, "min", found)
    assert [*table.columns[0].cells] == ["standard", "positional", "ratio"]


def test_notes_are_their_events():
    notes = [Note(0, 250, 60, 1), Note(0, 10, 64, 81), Note(260, 5, 60, 81)]
    tokens = music.performance(notes)
    assert music.notes_of(tokens) == sorted(notes)
    assert max(tokens) < 388 and tokens.count(256 + 99) == 2


def test_chorales_are_aaba_in_range():
    data = Chorales(length=512, phrase=4)
    batch = data.batch(0, 3)
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
    assert (batch["tokens"][:, 0] == REST).all()
    a = data.voiced(np.random.default_rng(0), 3)
    for voice, (low, high) in enumerate(music.RANGES):
        assert low <= a[:, voice].min() and a[:, voice].max() <= high
    assert (np.diff(a[:, :3], axis=1) <= 0).all()  # soprano, alto, tenor
    # somewhere a phrase follows itself
    grid = music.grid_of(batch["targets"][0])
    assert any((grid[n:n + 4] == grid[n + 4:n + 8]).all() for n in range(16))


def test_a_midi_file_says_its_notes():
    grid = np.array([[72, 65, 60, 48], [72, 65, REST, 50]])
    data = music.midi(grid)
    assert data[:14] == b"MThd\0\0\0\6\0\1\0\4\1\xe0" and data.count(b"MTrk") == 4
    soprano, alto, tenor, bass = data.split(b"MTrk")[1:]
    # one long note: on at once, off after 240 ticks
    assert soprano[4:] == b"\0\x90\x48\x50\x81\x70\x80\x48\x50\0\xff\x2f\0"
    assert tenor[4:] == b"\0\x92\x3c\x50\x78\x82\x3c\x50\0\xff\x2f\0"
    assert bass.count(b"\x93") == 2 and alto.count(b"\x91") == 1


def test_bach_is_asked_for_by_name():
    given = config.read(command.Config, ["--data=Bach()", "--length=64"])
    assert given.data == music.Bach() and given.task() == music.Bach(length=64)
    assert config.command(given).endswith("--data='Bach()' --length=64")
    try:
        import music21  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"attn\[music\]"):
            music.Bach().batch(0, 1)
        return
    batch = music.Bach(length=64).batch(0, 2)
    assert batch["tokens"].shape == (2, 64) and batch["tokens"].max() <= REST


def test_bach_without_music21_is_one_sentence_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "music21", None)  # import: ImportError
    monkeypatch.chdir(tmp_path)
    music.bach.cache_clear()
    config_ = dataclasses.replace(command.TINY, data=music.Bach())
    with pytest.raises(ValueError, match=r"not installed: .*attn\[music\]"):
        command.run(config_)
    assert not list(tmp_path.iterdir())
