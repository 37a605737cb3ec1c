"""Shipped figures: what a run of one seed shows beside its own, and how long it says
that it will take."""

import json

import pytest

from experiments import compare
from experiments.cli import compile_cache, config
from experiments.measure import report, shipped

SETTINGS = {"steps": 2, "layers": (1, 2)}
FOUND = {"seeds": [0, 1, 2], "rows": [
    {"attention": "Softmax()", "recall_seeds": [0.5, 0.75, 1.0], "seconds": 2.0},
    {"attention": "Based()", "recall_seeds": [0.1, 0.3, 0.2], "seconds": 4.0},
]}


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "path_of", lambda name: tmp_path / f"{name}.json")
    monkeypatch.setattr(shipped, "pace", lambda: 0.5)
    shipped.save(tmp_path / "some.json", SETTINGS, FOUND)
    return shipped.load("some", SETTINGS)


def test_a_record_is_of_its_settings(record):
    assert record["rows"] == FOUND["rows"]
    assert shipped.load("some", SETTINGS | {"steps": 3}) is None
    assert shipped.load("other", SETTINGS) is None
    shipped.path_of("some").write_text("{")
    assert shipped.load("some", SETTINGS) is None


def test_the_spread_stands_beside_the_live_seed(record):
    live = {"attention": "Based()", "recall": 0.25, "recall_seeds": [0.25]}
    both = shipped.beside(live, record, ("recall", "bits"))
    assert both == live | {"recall_shipped": [0.1, 0.3, 0.2]}
    assert report.cell(both, "recall", "{:.0%}") == "25%\n20%: 10% to 30%"
    assert shipped.beside(live, None, ("recall",)) == live
    unknown = {"attention": "Flow()"}
    assert shipped.beside(unknown, record, ("recall",)) == unknown


def test_the_time_goes_with_the_pace(record, monkeypatch):
    assert shipped.expected(record, ["Softmax()", "Based()"]) == 6.0
    monkeypatch.setattr(shipped, "pace", lambda: 1.0)  # half as fast here
    assert shipped.expected(record, ["Based()"], seeds=3) == 24.0
    assert shipped.expected(record, ["Flow()"]) is None
    assert shipped.expected(None, ["Based()"]) is None
    assert shipped.duration(40.2) == "40 s"
    assert shipped.duration(125) == "2:05 minutes"


def test_a_record_needs_three_seeds(tmp_path):
    with pytest.raises(ValueError, match="expected seeds=3 or more, got 2"):
        compare.run(compare.Config(record=str(tmp_path / "r.json"), seeds=2))


def test_what_ships_is_of_the_defaults():
    record = json.loads(shipped.path_of("compare").read_text())
    default = compare.Config()
    assert record["settings"] == json.loads(json.dumps(compare.shared(default)))
    labels = [config.format_value(one) for one in default.attentions]
    assert [row["attention"] for row in record["rows"]] == labels
    assert len(record["seeds"]) >= shipped.LEAST


def test_the_oldest_programs_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "root", lambda: tmp_path)
    for n in range(3):
        (tmp_path / f"{n}-cache").write_bytes(b"1234")
    assert compile_cache.prune(limit=4) == 2
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(compile_cache, "root", lambda: tmp_path / "none")
    assert compile_cache.prune() == 0
