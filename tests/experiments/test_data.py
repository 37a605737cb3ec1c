"""Data: batches are functions of the step, and each task has its answer in it."""

import dataclasses
import sys

import numpy as np
import pytest

from experiments.data import (
    Copy, Cycle, Grown, HuggingFace, Needles, Recall, Text, mqar,
)
from experiments.data import corpus as corpus_module

TASKS = [
    Recall(vocab=256, length=64, pairs=8), Copy(vocab=16, length=20),
    Needles(length=64, needles=3, questions=2),
    Needles(length=64, needles=2, depth=0.5),
]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(12):
        lines = range(n * 3, n * 3 + 9)
        text = "".join(f"line {i} of file {n} \u00e9\n" for i in lines)
        (folder / f"{n:02}.txt").write_text(text, encoding="utf-8")
    (folder / "empty.txt").write_text("")
    return Text(path=str(folder), length=24)


def check_batches(dataset, vocab):
    one, again = dataset.batch(7, 5), dataset.batch(7, 5)
    for name, array in one.items():
        assert array.dtype == np.int32 and array.shape == (5, dataset.length)
        assert (array == again[name]).all()
    others = (dataset.batch(8, 5), dataclasses.replace(dataset, seed=1).batch(7, 5),
              dataclasses.replace(dataset, split="valid").batch(7, 5))
    assert all((other["tokens"] != one["tokens"]).any() for other in others)
    assert 0 <= one["tokens"].min() and one["tokens"].max() < vocab
    targets = one["targets"]
    assert targets.max() < vocab and (targets >= -1).all() and (targets >= 0).any()
    return one


@pytest.mark.parametrize("dataset", TASKS, ids=lambda s: type(s).__name__)
def test_tasks_are_functions_of_the_step(dataset):
    check_batches(dataset, dataset.vocab)


def test_recall_asks_every_key_for_its_value():
    batch = Recall(vocab=256, length=64, pairs=8).batch(0, 20)
    for tokens, targets in zip(batch["tokens"], batch["targets"]):
        pairs = dict(tokens[:16].reshape(8, 2).tolist())
        assert len(pairs) == 8 and max(pairs) < 128 <= min(pairs.values())
        asked = targets >= 0
        assert sorted(tokens[asked]) == sorted(pairs)
        assert [pairs[t] for t in tokens[asked]] == targets[asked].tolist()


def test_recall_queries_follow_the_power_law():
    ask = lambda power: np.nonzero(Recall(
        vocab=256, length=128, pairs=4, power=power
    ).batch(0, 400)["targets"] >= 0)[1].mean()
    assert ask(0.01) < ask(0.5) < ask(1.0)
    inputs, labels = mqar(256, 5, 64, 8, seed=3)
    assert (inputs == mqar(256, 5, 64, 8, seed=3)[0]).all()
    assert ((labels != -100).sum(1) == 8).all()


def test_copying():
    batch = Copy(vocab=16, length=20).batch(0, 3)
    tokens, targets = batch["tokens"], batch["targets"]
    assert (tokens[:, 10] == 0).all() and (tokens[:, :10] > 0).all()
    assert (targets[:, 10:] == tokens[:, :10]).all() and (targets[:, :10] == -1).all()


@pytest.mark.parametrize("depth", [None, 0.0, 1.0])
def test_needles_are_in_the_haystack(depth):
    dataset = Needles(length=96, needles=3, questions=1, depth=depth)
    batch = dataset.batch(0, 30)
    for tokens, targets in zip(batch["tokens"], batch["targets"]):
        asked = np.nonzero(targets >= 0)[0]
        key = tokens[asked[0]]
        marks = np.nonzero(tokens == dataset.words)[0]
        found = [i for i in marks if tokens[i + 1] == key]
        assert len(found) == 1 and len(marks) == 3
        place = found[0] + 2
        assert tokens[place:place + 2].tolist() == targets[asked].tolist()
        if depth is not None:
            assert (found[0] < 8) if depth == 0 else (found[0] > 96 - 4 - 12)


def test_needles_in_text(corpus):
    dataset = Needles(length=96, hay=dataclasses.replace(corpus, length=8), needles=2)
    tokens = dataset.batch(0, 4)["tokens"]
    assert dataset.vocab == 256 + 2 + 64 and (tokens < 256).mean() > 0.8


def test_text_windows(corpus):
    batch = check_batches(corpus, 256)
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
    line = corpus.decode(batch["tokens"][0])
    assert "line" in line or "file" in line
    assert corpus.bytes_per_token == 1.0
    assert corpus.decode(corpus.encode("caf\u00e9")) == "caf\u00e9"


def test_train_and_valid_share_nothing(corpus):
    text = {split: corpus.decode(dataclasses.replace(corpus, split=split).content.ids)
            for split in ("train", "valid")}
    number = lambda split: {w for line in text[split].splitlines()
                            if " of file " in line
                            for w in [line.split(" of file ")[1].split()[0]]}
    assert not number("train") & number("valid")
    assert len(number("train") | number("valid")) == 12 and number("valid")


def test_packed_rows(corpus):
    packed = dataclasses.replace(corpus, pack=True, length=400)
    batch = packed.batch(0, 3)
    segments, tokens, targets = (batch[n] for n in ("segments", "tokens", "targets"))
    assert (np.diff(segments, axis=1) >= 0).all() and segments.max() > 1
    inside = np.diff(segments, axis=1) == 0
    assert (targets[:, :-1][inside] == tokens[:, 1:][inside]).all()
    assert (targets[:, :-1][~inside] == -1).all()


def test_byte_pairs(corpus):
    pairs = dataclasses.replace(corpus, tokenizer="bpe", vocab=300)
    check_batches(pairs, 300)
    text = "line 3 of file caf\u00e9 \u4e16"
    assert pairs.decode(pairs.encode(text)) == text
    assert len(pairs.encode("line 3 of file")) < 14 / 2
    assert pairs.bytes_per_token > 2
    assert (pairs.batch(0, 2)["tokens"] == pairs.batch(0, 2)["tokens"]).all()


def test_a_single_file_and_the_standard_library(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("abcdefghij" * 50)
    dataset = Text(path=str(file), length=16)
    assert len(dataset.content.ids) == 450
    assert len(dataclasses.replace(dataset, split="valid").content.ids) == 50
    assert len(Text().content.ids) > 1_000_000


def test_sources_take_turns():
    tasks = tuple(Recall(vocab=256, length=64, pairs=n) for n in (2, 4))
    cycle = Cycle(tasks)
    counts = [(cycle.batch(n, 3)["targets"] >= 0).sum() for n in range(4)]
    assert counts == [6, 12, 6, 12] and cycle.length == 64
    with pytest.raises(ValueError, match="one length"):
        Cycle((tasks[0], Recall(vocab=256, length=32, pairs=2)))


def test_rows_grow_and_batches_keep_their_tokens():
    short, long = (Recall(vocab=256, length=n, pairs=2) for n in (16, 64))
    grown = Grown(((short, 3),), long)
    for step, dataset, at, rows in ((2, short, 2, 8), (3, long, 0, 2), (5, long, 2, 2)):
        got = grown.batch(step, 2)
        assert got["tokens"].size == 128
        np.testing.assert_array_equal(got["tokens"], dataset.batch(at, rows)["tokens"])
    assert grown.length == 64
    with pytest.raises(ValueError, match="length=48: expected a divisor of the last"):
        Grown(((Recall(vocab=256, length=48, pairs=2), 3),), long)


@pytest.mark.parametrize("make, message", [
    (lambda p: Text(path=str(p / "absent")).content, "no such file or folder"),
    (lambda p: Text(path=str(p)).content, "expected a file with text"),
    (lambda p: Text(path=str(p), pattern="*.md").content, r"fits '\*.md'"),
    (lambda p: Text(length=0), "length=0"), (lambda p: Text(vocab=300), "vocab=300"),
    (lambda p: Text(split="test"), "split='test'"),
    (lambda p: Text(tokenizer="bpe"), "more than the 256"),
    (lambda p: Recall(vocab=64, length=64), "vocab=64"),
    (lambda p: Recall(vocab=256, length=16, pairs=8), "length=16"),
    (lambda p: Copy(length=7), "even"), (lambda p: Needles(depth=2.0), "depth=2.0"),
    (lambda p: Needles(needles=99), "needles=99"),
    (lambda p: Copy().batch(-1, 2), r"batch\(-1, 2\)"),
])
def test_wrong_sources(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_a_text_too_short_for_its_rows_and_a_binary_file(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="length=1024"):
        Text(path=str(tmp_path / "a.txt")).batch(0, 1)
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        Text(path=str(tmp_path)).content


def test_hugging_face_without_the_package_or_the_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'attn\[hf\]'"):
        HuggingFace(name="wikitext").content


class Datasets:
    """Stands for the package datasets: the calls that are made of it."""

    class exceptions:
        DatasetsError = type("DatasetsError", (Exception,), {})

    @staticmethod
    def load_dataset(name, subset, split, streaming):
        if name != "known":
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")
        assert split == "train" and streaming
        return iter([{"text": f"row {n} of {subset}", "n": n} for n in range(99)])


def test_hugging_face_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    dataset = HuggingFace(name="known", subset="small", rows=50, length=16)
    assert "of small" in dataset.decode(dataset.batch(0, 1)["tokens"][0]) + " of small"
    assert len(dataset.documents()) == 50
    with pytest.raises(ValueError, match="'absent' cannot be loaded: Dataset 'absent'"):
        HuggingFace(name="absent").content
    with pytest.raises(ValueError, match="column='n'.*text"):
        HuggingFace(name="known", column="n").content


def test_a_digest_is_of_the_text_and_not_of_its_place(tmp_path):
    for name in ("one", "two/three"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for n in range(4):
            (folder / f"{n}.txt").write_text(f"text {n} " * 9)
    at = [Text(path=str(tmp_path / name), length=4) for name in ("one", "two/three")]
    first = at[0].digest()
    assert first == at[1].digest() and first.startswith("sha256:")
    assert at[0].anywhere() == at[1].anywhere() != at[0]
    other = Text(path=str(tmp_path / "one"), length=9, seed=3, split="valid")
    assert other.digest() == first
    assert Text(path=str(tmp_path / "one"), held_out=0.5).digest() != first
    (tmp_path / "two/three/2.txt").write_text("text 2 " * 8 + "text 3 ")
    corpus_module._splits.cache_clear()
    corpus_module._digest.cache_clear()
    assert at[1].digest() != first


def test_links_are_followed_once_and_runs_left_out(tmp_path):
    (tmp_path / "text" / "run").mkdir(parents=True)
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "far" / "below" / "b.txt").write_text("b")
    (tmp_path / "text" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "text")
    for name in ("attn_run.json", "metrics.jsonl"):
        (tmp_path / "text" / "run" / name).write_text("{}")
    found = Text(path=str(tmp_path / "text")).documents()
    assert found == {"a.txt": "a", "linked/below/b.txt": "b"}


@pytest.mark.parametrize("path", ["~nobody-here/x", "a\0b", "x" * 300])
def test_paths_that_cannot_be(path):
    with pytest.raises(ValueError, match="Text: "):
        Text(path=path).documents()


def test_files_whose_names_are_no_text(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}\udcff").write_text(f"{n}" * 9)
    assert len(Text(path=str(tmp_path), length=2).batch(0, 2)["tokens"]) == 2
