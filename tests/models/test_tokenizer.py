"""Tokenizer: text there and back, conversations, and folders that do not fit."""

import json

import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers

from models.checkpoint.tokenizer import Tokenizer, defaults, local, longest
from models.checkpoint.loading import model_of
from models.checkpoint.config import read_config
from models.sampling import Sampling
from tests.models.test_checkpoint import NAMED

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|bot|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ 'bot' if m.role == 'assistant' else 'user' }}|>"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def add_tokenizer(folder, template=TEMPLATE, size=199):
    """A tokenizer of printable bytes into a folder."""
    # a space and a new line first, then ASCII
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (
        c not in "\u0120\u010a", c))[: size - len(SPECIAL)]
    vocab = {token: n for n, token in enumerate([*SPECIAL, *letters])}
    encoder = Encoder(models.BPE(vocab=vocab, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(SPECIAL)
    encoder.save(str(folder / "tokenizer.json"))
    config = {"chat_template": template, "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_text_there_and_back(tmp_path):
    text = Tokenizer(add_tokenizer(tmp_path), 199)
    ids = text.encode("The cat sat.")
    assert len(ids) == 12 and text.decode(ids) == "The cat sat."
    assert text.decode([3, *ids, 2]) == "The cat sat."


def test_a_conversation_is_its_template(tmp_path):
    text = Tokenizer(add_tokenizer(tmp_path), 199)
    said = [{"role": "user", "content": "Hi"}]
    assert text.rendered(said) == "<|user|>Hi</s><|bot|>"
    assert text.chat(said) == [3, *text.encode("Hi"), 2, 4]
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content | tojson }}{{ eos_token }}{% break %}"
        "{% endfor %}")
    assert Tokenizer(tmp_path, 199).rendered(said) == '"Hi"</s>'


@pytest.mark.parametrize("template, words", [
    ("{{ messages.__class__ }}", "reaches out of its sandbox"),
    ("{{ ''.__class__.__mro__ }}", "reaches out of its sandbox"),
    ("{{ raise_exception.__globals__ }}", "reaches out of its sandbox"),
    ("{{ messages.append(1) }}", "reaches out of its sandbox"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% for %}", "chat_template"), ("{{ 1 / 0 }}", "division by zero"),
    ("{{ nothing.there }}", "'nothing' is undefined"), (None, "has no chat_template"),
])
def test_templates_that_do_not_work(template, words, tmp_path):
    text = Tokenizer(add_tokenizer(tmp_path, template), 199)
    with pytest.raises(ValueError, match=words) as caught:
        text.rendered([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)


def test_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        Tokenizer(tmp_path, 199)
    add_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has the id 198, and the embedding 100 rows"):
        Tokenizer(tmp_path, 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        Tokenizer(tmp_path, 199)


def test_how_a_folder_wants_to_be_sampled(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert defaults(tmp_path) == (Sampling(), [7], [])
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0,
            "min_p": 0.1, "eos_token_id": [2, 4], "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert defaults(tmp_path) == (
        Sampling(0.6, None, 0.9, 0.1), [2, 4], ["repetition_penalty=1.1"])
    for name, most in (("llama", 256), ("gpt2", 128), ("kimi_linear", 256)):
        assert longest(model_of(read_config(NAMED[name]))) == most


def test_a_name_that_is_nowhere(monkeypatch):
    assert local(str(NAMED["llama"])) == NAMED["llama"]
    for name in ("nothing", "./a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            local(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ConnectionError, match="a/b is no .* downloaded .no network.$"):
        local("a/b")
