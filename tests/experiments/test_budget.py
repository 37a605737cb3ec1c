"""Budget: a share is what a policy keeps, and rows, table and picture say it."""

import dataclasses
import json

import numpy as np
import pytest

from attn.duo import Duo
from attn.softmax import Softmax
from experiments import budget
from experiments.cli import config
from experiments.data import Text
from experiments.evaluate import reader_of
from experiments.measure import cache_budgets, head_choice
from experiments.measure.placing import LeftOut, of_policy
from experiments.sources import loaded
from models.lm import LM, state_bytes
from models.swap import swapped
from tests.experiments.test_evaluate import folder  # noqa: F401

T = 256
MODEL = LM(vocab=16, width=64, heads=2, attention=(Softmax(),) * 2)


def memory(name, share):
    """Of a row of T tokens, beside exact attention's."""
    ((_, attention),) = cache_budgets.settings(name, (share,), T, 2)
    model = swapped(MODEL, attention, None)
    return state_bytes(model, T, T - 1) / state_bytes(MODEL, T, T - 1)


@pytest.mark.parametrize("name", cache_budgets.FREEING)
def test_what_is_not_kept_takes_no_room(name):
    # positions, scores and the tokens that come after the prompt are beside them
    assert 0.24 < memory(name, 1 / 4) < 0.35
    assert memory(name, 1 / 2) > 1.7 * memory(name, 1 / 4)


@pytest.mark.parametrize("name", cache_budgets.READING)
def test_what_reads_less_keeps_everything(name):
    assert 0.99 < memory(name, 1 / 4) < 1.6


def test_codes_have_one_budget():
    found = cache_budgets.settings("KIVI, 2 bits", (1 / 4, 1 / 2), T, 2)
    assert [share for share, _ in found] == [2 / 16]
    with pytest.raises(ValueError, match="policies: 'SnapKv': expected of"):
        cache_budgets.settings("SnapKv", (1.0,), T, 2)


def test_a_share_is_the_one_that_is_set():
    found = cache_budgets.settings("TOVA", (1 / 16, 1 / 2, 0.13), 64, 2)
    assert [share for share, _ in found] == [8 / 64, 32 / 64, 8 / 64]


def test_rows_too_short_and_facts_too_many(tmp_path):
    for length in (1, 4):
        settings = dataclasses.replace(
            budget.TINY, length=length, folder=str(tmp_path / f"{length}"))
        with pytest.raises(ValueError, match=f"length={length}: expected 8 or more"):
            budget.run(settings)
        with pytest.raises(ValueError, match=f"length={length}: expected 8 or more"):
            config.read(budget.Config, [f"--length={length}"], budget.TINY)
    with pytest.raises(ValueError, match="facts=1000: expected at most"):
        dataclasses.replace(budget.TINY, facts=1000)


def test_a_folder_without_a_tokenizer_is_asked_for_what_repeats(tmp_path):
    settings = dataclasses.replace(
        budget.TINY, tasks=("bits",), folder=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="llama has no tokenizer.json: expected --tas"):
        budget.run(settings)


def test_the_command_leaves_rows_and_a_picture(folder, tmp_path):  # noqa: F811
    settings = dataclasses.replace(
        budget.TINY, model=str(folder), tasks=("bits",), length=128,
        policies=("TOVA",), shares=(1 / 4, 1.0), folder=str(tmp_path / "run"),
        text=Text(path="models", pattern="*.py"))
    found = budget.run(settings)
    rows = json.loads((tmp_path / "run" / "budget.json").read_text())["rows"]
    exact, quarter, whole = rows
    # a budget of everything is exact attention
    assert whole["bits"] == pytest.approx(exact["bits"], rel=1e-5)
    assert whole["memory"] > 0.95
    assert quarter["memory"] < 0.4 and quarter["bits"] != exact["bits"]
    assert found["TOVA bits"] == quarter["bits"]
    assert (tmp_path / "run" / "budget.png").stat().st_size > 1000


def test_heads_are_found_on_the_model():
    found = loaded(budget.TINY.model)
    reader, _ = reader_of(found, ("repeats",), Text(), 64, 0)
    scores = head_choice.razor_scores(reader)
    gates = head_choice.duo_gates(reader, 2, 1)
    assert all(a.shape == gates.shape for a in scores) and gates.shape[0] == 3
    assert all(((a >= 0) & (a <= 1)).all() for a in (*scores, gates))
    assert (gates < 1).any()  # they have moved
    share, stack = cache_budgets.headed("Duo", 1 / 2, 1024, (gates,))
    exact = dataclasses.replace(reader, length=1024)
    small = dataclasses.replace(exact, model=swapped(found.model, stack, None))
    peak = budget.peak_bytes(small) / budget.peak_bytes(exact)
    assert 0.4 < share < 0.6 and peak < 0.9


@pytest.mark.parametrize("name, at", [
    ("gemma2", [1, 3]), ("gemma3", [5]), ("gpt_oss", [1, 3]), ("mistral", [])])
def test_heads_are_chosen_where_everything_is_seen(name, at):
    model = loaded(f"tests/checkpoints/{name}").model
    assert head_choice.exact_layers(model) == at
    entries = (Duo(retrieval=(1,), sinks=1, recent=3),) * len(at)
    found = head_choice.placed(model, entries).attention
    assert [n for n, a in enumerate(found) if isinstance(a, Duo)] == at
    for n, (new, old) in enumerate(zip(found, model.attention)):
        assert new == old or (n in at and new.scale == old.scale)
    if at:
        with pytest.raises(ValueError, match="shorter"):
            head_choice.placed(model, entries[1:])


def test_gates_are_trained_beside_sinks():
    found = loaded("tests/checkpoints/gpt_oss")
    reader, _ = reader_of(found, ("repeats",), Text(), 16, 0)
    gates = head_choice.duo_gates(reader, 1, 1)
    assert gates.shape == (2, 2) and (gates < 1).any() and (gates >= 0).all()


def test_heads_of_a_model_of_windows_are_left_out(tmp_path):
    settings = dataclasses.replace(
        budget.TINY, model="tests/checkpoints/mistral", policies=("Razor", "Duo"),
        folder=str(tmp_path / "run"))
    assert set(budget.run(settings)) == {"exact repeats", "exact memory", "folder"}
    found = json.loads((tmp_path / "run" / "budget.json").read_text())
    assert [row["policy"] for row in found["rows"]] == ["exact"]
    assert "no layer of the model" in found["left_out"]["Razor"]


def test_a_budget_of_heads_is_what_is_asked_for():
    score = np.arange(16.0).reshape(4, 4)
    for name, known in (("Razor", (score, score)), ("Duo", (score / 16,))):
        share, stack = cache_budgets.headed(name, 1 / 4, T, known)
        assert share == pytest.approx(1 / 4, abs=0.01)
        assert [a.retrieval for a in stack][:3] == [()] * 3
        assert set(stack[3].retrieval) <= {1, 2, 3} and 3 in stack[3].retrieval


def test_a_policy_without_sinks_is_left_out():
    found = loaded("tests/checkpoints/gpt_oss")
    reader, _ = reader_of(found, ("repeats",), Text(), 16, 0)
    with pytest.raises(LeftOut, match="the model has sinks, and TopK takes none"):
        of_policy("top tokens", reader, (1 / 2,), 1, 1)
    ((share, model),) = of_policy("TOVA", reader, (1 / 2,), 1, 1)
    assert share == 1 / 2 and [type(a).__name__ for a in model.attention] == [
        "Softmax", "TOVA"] * 2
