"""Path patching, contributions and scores of heads on a network that is not trained."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.softmax import Softmax
from experiments import calibrate, circuits, steer
from experiments.cli import config
from experiments.data import inside
from experiments.data.inside import Inside
from experiments.measure import heads, patching
from experiments.measure.patching import Receivers
from experiments.data.lookup import FIND, QUESTION, SENTENCES, WORDS, Copies, Lookup
from experiments.data.lookup import facts
from models.lm import LM
from models.view import Rows, Site, look

MODEL = LM(vocab=inside.VOCAB, width=16, heads=2, attention=(Softmax(),) * 2,
           use_bias=True)
PAIR = inside.ioi(np.random.default_rng(0), 3)
ARRAYS = tuple(map(jnp.asarray, PAIR[:3]))


@functools.cache
def parameters():
    params = jax.jit(MODEL.init)(jax.random.key(0), ARRAYS[0])
    return jax.tree.map(
        lambda a: a + 0.2 * jax.random.normal(jax.random.key(1), a.shape), params)


def test_contributions_sum_to_the_stream():
    parts = jax.jit(lambda p: patching.contributions(MODEL, p, ARRAYS[0]))(parameters())
    whole = sum(a.sum(2) if name.endswith("heads") else a for name, a in parts.items())
    final = look(MODEL, parameters(), ARRAYS[0], read=["final"])[1]["final"]
    np.testing.assert_allclose(whole, final, atol=1e-5)


def test_direct_logits_are_the_slope_of_what_a_head_adds():
    params, (clean, _, answers) = parameters(), ARRAYS
    found = np.asarray(patching.direct_logits(MODEL, params, clean, answers))
    parts = patching.contributions(MODEL, params, clean)
    _, seen = look(MODEL, params, clean, read=["final"])

    def difference(x):
        edit = {"final": Site(jnp.ones((1, 1, 1), bool), x)}
        return patching.logit_difference(look(MODEL, params, clean, edit=edit)[0],
                                         answers)

    own = parts["1/heads"][:, :, 1]
    step = 1e-2
    slope = (difference(seen["final"] + step * own) - difference(
        seen["final"] - step * own)) / (2 * step)
    np.testing.assert_allclose(found[1, 1], slope, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("receivers", [
    Receivers(layer=1), Receivers(((1, 0), (1, 1)), "q"), Receivers(((1, 0),), "v")],
    ids=["stream", "q", "v"])
def test_a_text_that_is_not_corrupted_changes_nothing(receivers):
    clean, _, answers = ARRAYS
    at = jnp.arange(clean.shape[1]) == clean.shape[1] - 1
    logits = patching.patched(MODEL, parameters(), clean, clean, np.ones((2, 2), bool),
                              at, receivers)
    np.testing.assert_allclose(logits, jax.jit(MODEL.apply)(parameters(), clean),
                               atol=1e-5)


def test_all_senders_at_all_positions_are_the_corrupted_run():
    """To the last stream: what does not come from heads, the vectors of the tokens, is
    replaced too, and no head is held."""
    clean, corrupt, _ = ARRAYS
    names = ["embed", "0/z", "1/z"]
    _, other = look(MODEL, parameters(), corrupt, read=names)
    edit = {name: Site(jnp.ones((1,) * a.ndim, bool), a) for name, a in other.items()}
    logits = look(MODEL, parameters(), clean, edit=edit)[0]
    np.testing.assert_allclose(logits, jax.jit(MODEL.apply)(parameters(), corrupt),
                               atol=1e-5)


def test_a_sender_behind_its_receivers_is_not_tried():
    found = patching.scores(MODEL, parameters(), *ARRAYS, Receivers(((1, 0),), "k"))
    assert np.isnan(found["score"][1]).all() and np.isfinite(found["score"][0]).all()
    with pytest.raises(ValueError, match="heads or a layer"):
        Receivers()


def test_the_query_path_is_the_query_replaced_by_hand():
    """Told by one sender, the receiver's query is that of a stream with the sender's
    change."""
    clean, corrupt, answers = ARRAYS
    params, t = parameters(), clean.shape[1]
    receivers = Receivers(((1, 0),), "q")
    found = patching.scores(MODEL, params, *ARRAYS, receivers)["patched"][0, 1]
    _, was = look(MODEL, params, clean, read=["0/z"])
    _, other = look(MODEL, params, corrupt, read=["0/z"])
    z = was["0/z"].at[:, -1, 1].set(other["0/z"][:, -1, 1])
    every = jnp.ones((1, 1, 1, 1), bool)
    _, told = look(MODEL, params, clean, read=["1/q"], edit={"0/z": (every, z)})
    mask = jnp.zeros((1, t, 2, 1), bool).at[:, -1, 0].set(True)
    logits = look(MODEL, params, clean, edit={"1/q": (mask, told["1/q"])})[0]
    np.testing.assert_allclose(found, patching.logit_difference(logits, answers),
                               rtol=1e-4)


def test_kinds_of_heads_from_maps_made_by_hand():
    period = 4
    t = 1 + 2 * period
    p = np.zeros((1, 3, t, t), np.float32)
    for n, distance in enumerate((period - 1, period, 1)):
        for row in range(distance, t):
            p[0, n, row, row - distance] = 1
    found = heads.kinds(jnp.asarray(p), period)
    for n, name in enumerate(("induction", "duplicate", "previous")):
        assert np.asarray(found[name])[0].tolist() == [float(m == n) for m in range(3)]


def test_a_retrieval_score_counts_copies_of_the_needle():
    prompt, needle = np.array([9, 9, 5, 6, 7, 9]), (2, 5)
    top = np.array([2, 4, 3, 0])[:, None, None, None]  # steps, L, H, k
    said = np.array([5, 7, 9, 9])
    score = heads.retrieval_score(top, prompt, said, needle)
    assert score[0, 0] == pytest.approx(2 / 3)  # the third says something else
    again = heads.retrieval_score(np.concatenate([top] * 3), prompt, np.tile(said, 3),
                                  needle)
    assert again[0, 0] == pytest.approx(2.0)
    assert heads.retrieval_score(np.concatenate([top] * 3), prompt, np.tile(said, 3),
                                 needle, clip=True)[0, 0] == 1.0
    outside = top * 0 + 9  # generated tokens, behind the prompt
    assert heads.retrieval_score(outside, prompt, said, needle)[0, 0] == 0


@pytest.mark.parametrize("experiment, word, message", [
    (steer, "--alpha=2", "alpha=2"), (calibrate, "--beta=2", "beta=2"),
    (calibrate, "--factor=0", "factor=0"), (calibrate, "--factor=-1", "factor=-1")])
def test_what_cannot_be_steered_with_is_refused_at_once(experiment, word, message):
    with pytest.raises(ValueError, match=message):
        config.read(experiment.Config, [word])


def test_layers_without_weights_are_left_out_and_named(tmp_path):
    folder = pathlib.Path(__file__).parents[1] / "checkpoints"
    settings = dataclasses.replace(
        circuits.TINY, model=str(folder / "qwen3_5"), folder=str(tmp_path / "run"))
    found = circuits.run(settings)
    assert found["layers without weights left out"] == ", ".join(
        f"{n} (Delta)" for n in range(3))
    assert "Delta of layer 0" in found["uniform masks left out"]
    assert "too few" in found["split-half correlation left out"]
    assert "needles, top 1 masked (zero)" in found
    assert not any("(uniform)" in name for name in found)
    assert "NaN" not in (tmp_path / "run" / "circuits.json").read_text()
    for name, more, message in (
        ("kimi_linear", {}, "no layer has weights"),
        ("qwen3_5", {"top": 3}, "top=3: expected at most half of the 4 heads"),
    ):
        wrong = dataclasses.replace(settings, model=str(folder / name), **more)
        with pytest.raises(ValueError, match=message):
            circuits.run(dataclasses.replace(wrong, folder=str(tmp_path / message[:5])))
    with pytest.raises(ValueError, match="haystack=5: expected 6 or more"):
        dataclasses.replace(circuits.TINY, haystack=5)


def test_a_correlation_needs_four_trials_and_spread():
    trials = np.random.default_rng(0).random((4, 2, 3))
    name = "split-half correlation"
    assert heads.agreement(trials) == {name: heads.split_half(trials)}
    for few in (trials[:3], trials * 0):
        assert [*heads.agreement(few)] == [f"{name} left out"]


def test_ranks_overlap_and_choice():
    trials = np.random.default_rng(0).random((40, 2, 3)) * 0.1 + np.arange(6).reshape(
        2, 3)
    assert heads.split_half(trials) == pytest.approx(1.0)
    assert np.isnan(heads.split_half(np.zeros((4, 2, 3))))
    one = heads.chosen(trials.mean(0), 2)
    assert np.argwhere(one).tolist() == [[1, 1], [1, 2]]
    other = heads.chosen(trials.mean(0), 2, lowest=True)
    assert heads.overlap(one, one) == (1.0, pytest.approx(1 / 3))
    assert heads.overlap(one, other)[0] == 0


def test_top_keys_are_those_of_the_map():
    tokens = ARRAYS[0]
    rows = jnp.array([5, 2])
    found = heads.top_keys(MODEL, parameters(), tokens, rows, k=2)
    assert found.shape == (3, 2, 2, 2, 2)  # [B,m,L,H,k]
    _, seen = look(MODEL, parameters(), tokens, patterns={1: Rows(rows=[5])})
    np.testing.assert_array_equal(found[:, 0, 1, :, 0], seen["1/pattern"][:, :, 0].
                                  argmax(-1))


def test_the_tasks_have_the_answers_that_they_say():
    rng = np.random.default_rng(1)
    pair = inside.colours(rng, 20)
    rows = np.arange(20)
    for text, column in ((pair.clean, 0), (pair.corrupt, 1)):
        asked = text[:, -2]
        at = (text[:, 2:7:2] == asked[:, None]).argmax(1)
        assert (text[rows, 1 + 2 * at] == pair.answers[:, column]).all()
    assert (np.take_along_axis(pair.clean, pair.spots[:, :1], 1)[:, 0]
            == pair.answers[:, 0]).all()
    pair = inside.ioi(rng, 20)
    assert (pair.clean != pair.corrupt).sum(1).tolist() == [1] * 20
    assert (np.take_along_axis(pair.clean, pair.spots, 1) == pair.answers).all()
    batch = Inside(seed=0).batch(0, 64)
    assert (batch["targets"] >= 0).any(1).all()
    prompt, needle, start = inside.needles(rng, 5, 20, 50)
    for n in range(5):
        assert (prompt[n, start[n]:start[n] + 6] == needle[n]).all()
        assert (prompt[n, -2:] == needle[n, :2]).all()
    found = facts(rng, 9)
    for n in range(9):
        own = found.tokens[n, found.sentence[n] * WORDS:][:WORDS]
        assert (own[:3] == found.tokens[n, -3:]).all() and own[3] == found.answer[n]
        text = found.tokens[n, :SENTENCES * WORDS].reshape(-1, WORDS)
        assert len({tuple(s[:3]) for s in text}) == SENTENCES


def test_what_a_network_learns_to_look_up_has_its_answers():
    """Each sentence is asked for once; a copy is what came a period before."""
    for sentences in (4, SENTENCES):
        batch = Lookup(length=sentences * (WORDS + QUESTION)).batch(0, 8)
        for tokens, targets in zip(batch["tokens"], batch["targets"]):
            cut = sentences * WORDS
            told = {tuple(s[:3]): s[3:] for s in tokens[:cut].reshape(-1, WORDS)}
            asked = tokens[cut:].reshape(-1, QUESTION)
            assert {tuple(s[1:]) for s in asked} == set(told)
            for form, *key, answer in zip(*asked.T, targets[cut + 3::QUESTION]):
                assert answer == told[tuple(key)][int(form == FIND)]
            assert (targets >= 0).sum() == sentences
    batch = Copies().batch(0, 8)
    for tokens, targets in zip(batch["tokens"], batch["targets"]):
        known = np.flatnonzero(targets >= 0)
        assert (tokens[known[0]:] == tokens[:36 - known[0]]).all()
        assert (targets[known[:-1]] == tokens[known[1:]]).all() and known[-1] == 35
    with pytest.raises(ValueError, match="length=50: expected a multiple of 18"):
        Lookup(length=50)


def test_a_network_that_was_trained_is_not_trained_again(tmp_path):
    """A run that was stopped goes on from its network's checkpoint."""
    config_ = dataclasses.replace(steer.TINY, folder=str(tmp_path / "steer"))
    metrics = tmp_path / "steer" / "network" / "metrics.jsonl"
    first = steer.run(config_)
    was = metrics.read_text()
    assert steer.run(config_) == first and metrics.read_text() == was
