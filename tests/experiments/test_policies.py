"""Claims about caches: what is measured, by cases whose answer is known."""

import dataclasses

import numpy as np
import pytest

from attn.softmax import Softmax
from attn.streaming import Streaming
from experiments import policies
from experiments.evaluate import HELD_OUT, reader_of
from experiments.measure import asked, cache_claims, index_claims
from experiments.sources import SHIPPED, loaded


@pytest.fixture(scope="module")
def reader():
    return reader_of(loaded(SHIPPED), ("needle",), HELD_OUT, 64, 0)[0]


def rows_of(*shape):
    p = np.random.default_rng(0).random(shape)
    at = np.arange(shape[2])[:, None] + shape[3] - shape[2]
    p = np.where(np.arange(shape[3]) <= at, p, 0)
    return p / p.sum(-1, keepdims=True)


def test_all_weight_is_recovered_where_all_keys_fit():
    p = rows_of(1, 2, 4, 12)
    assert cache_claims.recovered(p, 8, 12, 4) == pytest.approx(1)
    assert cache_claims.recent_weight(p, 8, 12) == pytest.approx(1)


def test_recycled_keys_are_those_of_the_full_step_and_the_new_one():
    p = np.zeros((1, 1, 2, 6))
    p[0, 0, 0, :5] = 0.1, 0.4, 0.3, 0.1, 0.1  # the full step keeps 1 and 2
    p[0, 0, 1] = 0.1, 0.2, 0.25, 0.1, 0.1, 0.25
    assert cache_claims.recovered(p, 4, 2, 2) == pytest.approx(0.2 + 0.25 + 0.25)
    assert cache_claims.recent_weight(p[:, :, 1:], 5, 5) == pytest.approx(0.9)


def test_one_of_many_facts_is_asked_for(reader):
    reader = dataclasses.replace(reader, length=128)
    row = asked.one_of(reader, 3, 0)
    runs = np.flatnonzero(np.diff(row.asked.astype(int)) == 1)
    assert len(row.ids) == 128 and len(runs) == 1
    said = reader.text.decode(row.ids[row.asked].tolist())
    assert reader.text.decode(row.ids.tolist()).count(said) == 2


def test_a_model_is_no_distance_from_itself(reader):
    exact = cache_claims.everywhere(reader, Softmax())
    assert abs(cache_claims.divergence(reader, exact, 1, 1)) < 1e-5
    few = cache_claims.everywhere(reader, Streaming(sinks=1, window=1, rebase=False))
    assert cache_claims.divergence(reader, few, 1, 1) > 0.01


def test_blocks_go_to_layers_that_have_many():
    found = dict(index_claims.pooled_recall(0, 2))
    assert found["a pool shared by entropy"] > found["a pool shared alike"]


def test_a_graph_for_queries_looks_at_fewer_keys(monkeypatch):
    for name, value in (("KEYS", 300), ("QUERIES", 10), ("TRAINED", 300),
                        ("BEAMS", (32, 300))):
        monkeypatch.setattr(index_claims, name, value)
    curves = index_claims.graph_scans(0)
    assert set(curves) == {"clusters of keys", "graph of keys", "graph for queries",
                           "graph of keys, asked by keys"}
    assert curves["clusters of keys"][-1][1] == 1.0
    assert all(0 < share and 0 <= recall <= 1
               for curve in curves.values() for share, recall in curve)


def test_what_is_asked_of_it_wrongly():
    with pytest.raises(ValueError, match="parts=.*nothing.*expected some of"):
        policies.Config(parts=("nothing",))
    with pytest.raises(ValueError, match="facts=1000: expected at most"):
        policies.Config(facts=1000)
    with pytest.raises(ValueError, match="llama has no tokenizer.json: expected a"):
        policies.run(policies.Config(model="tests/checkpoints/llama", quiet=True))


def test_aligned_rows_share_a_prompt_and_lose_only_hay(reader):
    reader = dataclasses.replace(reader, length=128)
    rows = [asked.needles(reader, 3, n) for n in range(6)]
    found = cache_claims.several(reader, 6, 3)
    first = {int(row.asked.argmax()) for row in rows}
    assert len(first) > 1 and {len(row.ids) for row in found} == {128}
    assert {int(row.asked.argmax()) for row in found} == {min(first)}
    for one, same in zip(rows, found, strict=True):
        # the same facts and answers
        assert one.ids[one.asked].tolist() == same.ids[same.asked].tolist()
    with pytest.raises(ValueError, match="expected .* or more for what is hidden"):
        asked.needle(dataclasses.replace(reader, prompt=8), 128, 0.5, 0)
