"""Evaluate: what is counted is what a loop by hand counts, for a model with a text."""

import dataclasses
import gzip
import json
import math

import jax
import numpy as np
import pytest

from attn.softmax import Softmax
from experiments import evaluate
from experiments.data import Text
from experiments.data.retrieval import FACT, NOUNS, Facts, Names, Pairs, Repeated
from experiments.measure import asked
from experiments.sources import loaded
from models.checkpoint import save
from models.lm import LM
from tests import compiled
from tests.models.test_tokenizer import add_tokenizer

TEXT = Text(tokenizer="bpe", vocab=300, path="models", pattern="*.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights whose tokens are letters."""
    made = tmp_path_factory.mktemp("evaluate") / "letters"
    model = LM(vocab=199, width=16, heads=2, attention=(Softmax(),))
    tokens = np.zeros((1, 4), np.int32)
    save(made, model, compiled.init(model, jax.random.key(0), tokens))
    return add_tokenizer(made)


@pytest.fixture(scope="module")
def reader(folder):
    """It, with hay."""
    found = loaded(str(folder))
    hay = np.asarray(asked.plain(found.text, "import this\n" * 9))
    return asked.Reader(found.model, found.params, found.text, hay, [1], 96, 0)


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_a_needle_lies_at_its_depth(reader, depth):
    row = asked.needle(reader, 96, depth, 0)
    words = reader.text.decode(row.ids[1:])
    head, rest = FACT[0].partition("{}")[0], words[words.rindex(FACT[0][:5]):]
    assert len(row.ids) == 96 == len(row.asked)
    assert words.startswith(head) if depth == 0 else words.endswith(2 * rest)
    assert rest.endswith(reader.text.decode(row.ids[row.asked]) + "\n")


def test_a_score_is_the_share_of_answers_all_of_whose_tokens_are_the_likeliest(reader):
    rows = [asked.repeats(reader, 50, n) for n in range(3)]
    logits = jax.jit(reader.model.apply)
    answers, tokens = [], []
    for row in rows:
        good = np.asarray(logits(reader.params, row.ids[None])[0].argmax(-1))
        hit = (good[:-1] == row.ids[1:])[row.asked[1:]]
        answers.append(hit.all())
        tokens.append(hit.mean())
    found = asked.score(reader, rows, 2)
    assert found == (np.mean(answers), pytest.approx(np.mean(tokens)))


@pytest.mark.parametrize("stride", [3, 5, 8])
def test_windows_judge_every_token_once_with_what_was_before(stride):
    ids = np.arange(1, 22)
    seen = []
    for tokens, targets in evaluate.windows(ids, 8, stride, True):
        for n, target in enumerate(np.asarray(targets[0])):
            if target >= 0:
                assert tokens[0, n] == target - 1
                seen.append(target)
                assert n >= min(target - 2, 8 - stride)
    assert seen == list(range(2, 22))


def test_bits_per_byte_beside_gzip(reader):
    text = "import this"
    found = evaluate.perplexity(reader, [text], 99, None)
    ids = np.asarray([1] + reader.encode(text))
    logits = jax.nn.log_softmax(reader.model.apply(reader.params, ids[None, :-1]))[0]
    nats = -np.take_along_axis(np.asarray(logits), ids[1:, None], 1).sum()
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 11, rel=1e-5)
    packed = len(gzip.compress(text.encode(), 9))
    assert found["gzip_bits_per_byte"] == pytest.approx(8 * packed / 11)


def test_a_text_is_read_up_to_so_many_tokens_and_no_further(reader):
    text = "import this, then that\n" * 9
    found = evaluate.perplexity(reader, [text, text], 20, None)
    assert found["tokens"] == 20
    read = reader.text.decode(reader.encode(text)[:20])
    whole = evaluate.perplexity(reader, [read], 99, None)
    assert found == pytest.approx(whole, rel=1e-5)
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="expected one of two tokens or more"):
            evaluate.perplexity(reader, nothing, 20, None)


def test_the_command_writes_numbers_and_a_picture(folder, tmp_path):
    settings = dataclasses.replace(
        evaluate.TINY, model=str(folder), parts=("text", "needle", "recall"),
        text=TEXT, tokens=20, length=180, lengths=1, depths=2, facts=2,
        folder=str(tmp_path / "run"))
    found = evaluate.run(settings)
    assert found["text_tokens"] == 20
    assert {"text_nats", "needle", "recall", "state_bytes"} <= found.keys()
    assert (tmp_path / "run" / "needle.png").stat().st_size > 1000
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert len(told["needle"]["cells"]) == 2


@pytest.mark.parametrize("kind", [Repeated, Facts, Pairs, Names])
def test_answers_of_the_rows_stand_before_them(kind):
    """What a row asks for can be known: each answer was said before in the row, or,
    of names, is one of two that were."""
    more = {"facts": 2} if kind is Facts else {}
    rows = kind(text=TEXT, length=192, **more)
    batch = rows.batch(3, 2)
    assert batch["tokens"].shape == (2, 192) and (batch["tokens"][:, 0] == 300).all()
    assert batch["tokens"].max() < rows.vocab
    for tokens, targets in zip(batch["tokens"], batch["targets"]):
        known = targets >= 0
        assert known.any()
        np.testing.assert_array_equal(tokens[1:][known[:-1]], targets[:-1][known[:-1]])
        before = [target in tokens[: n + 1] for n, target in enumerate(targets)
                  if target >= 0]
        assert np.mean(before) > (0.99 if kind is Repeated else 0.6)


@pytest.mark.parametrize("wrong, message", [
    ({"parts": ("texts",)}, "expected some of"),
    ({"facts": 1000}, "expected at most"),
    ({"hops": len(NOUNS)}, "hops=.*expected at most"),
])
def test_mistakes(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(evaluate.TINY, **wrong)


def test_a_folder_without_a_tokenizer_is_asked_for_what_repeats(tmp_path):
    settings = dataclasses.replace(
        evaluate.TINY, parts=evaluate.PARTS, folder=str(tmp_path / "run"))
    with pytest.raises(ValueError) as error:
        evaluate.run(settings)
    assert str(error.value).endswith(
        "llama has no tokenizer.json: expected --parts='(\"repeats\",)'")


@pytest.mark.parametrize("length", [1, 2, 7])
def test_rows_too_short(length, reader, tmp_path):
    settings = dataclasses.replace(
        evaluate.TINY, length=length, folder=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=f"length={length}: expected 8 or more"):
        evaluate.run(settings)
    with pytest.raises(ValueError, match="length=4: expected 5 or more for what rep"):
        asked.repeats(dataclasses.replace(reader, length=4), 9, 0)


def test_a_row_too_short_for_its_fact(reader):
    with pytest.raises(ValueError, match="or more for what is hidden and asked"):
        asked.needle(reader, 40, 0.5, 0)
