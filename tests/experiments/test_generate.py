"""The command that writes text, as a stranger meets it."""

import dataclasses
import io
import json
import shutil

import pytest

from attn.snapkv import SnapKV
from attn.softmax import Softmax
from experiments import generate, lm
from experiments.generate import Config, run
from experiments.sources import loaded
from models.checkpoint.config import read_config
from models.checkpoint.loading import model_of
from models.swap import swapped
from tests.models.test_checkpoint import NAMED
from tests.models.test_tokenizer import add_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer."""
    there = tmp_path_factory.mktemp("model") / "mistral"
    shutil.copytree(NAMED["mistral"], there)
    return str(add_tokenizer(there))


def test_a_prompt_and_samples_of_it(folder, capsys):
    found = run(Config(model=folder, prompt="The", length=5))
    assert capsys.readouterr().out.startswith("The")
    assert found["prompt_tokens"] == 3 and 0 < found["new_tokens"] <= 5
    assert found["state_bytes"] > 0
    run(Config(model=folder, prompt="The", length=5, samples=2, temperature=1.0))
    assert capsys.readouterr().out.count("The") == 2


def test_a_conversation_reads_each_turn_once(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nAnd you?\n"))
    found = run(Config(model=folder, chat=True, length=4, temperature=0.0))
    assert found["turns"] == 2
    # <user> H i </s> <bot>; behind the answer </s> <user> 8 letters </s> <bot>
    assert found["tokens_read"] <= 5 + 1 + 1 + 8 + 2
    assert capsys.readouterr().out.endswith("\n")


def test_a_file_of_prompts(folder, capsys, tmp_path):
    (tmp_path / "prompts").write_text("The\n\nA cat\n")
    found = run(Config(model=folder, batch=tmp_path / "prompts", length=3))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["The", "A cat"]
    assert found["prompts"] == 2 and all("answer" in line for line in lines)


def test_a_run_of_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lm.run(dataclasses.replace(lm.TINY, folder="mine", sample=1))
    capsys.readouterr()
    found = run(Config(model="mine", prompt="def ", length=3))
    assert found["new_tokens"] == 3
    assert capsys.readouterr().out.startswith("def ")


def test_other_attentions_inherit_what_the_model_was_trained_with():
    model = model_of(read_config(NAMED["gemma2"]))
    new = swapped(model, None, SnapKV(capacity=8, window=4))
    assert [type(a) for a in new.attention] == [Softmax, SnapKV] * 2
    assert new.attention[1].softcap == 50.0
    assert new.attention[1].scale == pytest.approx(24**-0.5)
    assert new.attention[0] == model.attention[0]  # it has a window of its own
    hybrid = model_of(read_config(NAMED["qwen3_5"]))
    new = swapped(hybrid, (Softmax(scale=1.0),), None)
    assert new.attention[:3] == hybrid.attention[:3] and new.attention[3].scale == 1.0
    with pytest.raises(ValueError, match="expected 1, or 4"):
        swapped(model, (Softmax(),) * 3, None)


@pytest.mark.parametrize("options, words", [
    ({}, "one of --prompt, --chat and --batch"),
    ({"prompt": "a", "chat": True}, "one of --prompt, --chat and --batch"),
    ({"prompt": "a", "top_k": 0}, "top_k=0"),
    ({"prompt": "a", "attention": (Softmax(),), "policy": SnapKV()}, "one of --att"),
])
def test_wrong_words(options, words):
    with pytest.raises(ValueError, match=words):
        Config(model="m", **options)


def test_wrong_prompts(folder, monkeypatch):
    for text, words in (("x" * 256, "the prompt has 256 tokens"),):
        with pytest.raises(ValueError, match=words):
            run(Config(model=folder, prompt=text))
    with pytest.raises(ValueError, match="no tokenizer.json, expected ids"):
        run(Config(model=str(NAMED["llama"]), prompt="The"))
    with pytest.raises(ValueError, match="token 199"):
        run(Config(model=str(NAMED["llama"]), prompt="199"))
    with pytest.raises(ValueError, match="no tokenizer with a chat_template"):
        run(Config(model=str(NAMED["llama"]), chat=True))
    assert loaded(folder).limit == 256 and generate.TINY.prompt
