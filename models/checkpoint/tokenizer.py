"""Tokenizer: text to ids and back, conversations, and how a folder wants to be sampled.

`tokenizer.json` is read by the `tokenizers` library, a chat template by jinja2 in its
sandbox (extra `checkpoints` has both): a template is a program of whoever published the
folder, and gets at nothing but the messages.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any, NamedTuple, Sequence

from models.checkpoint.files import read_json
from models.sampling import Sampling

Message = dict[str, str]  # {"role": "user", "content": "..."}


class Tokenizer:
    """The tokenizer of a folder; vocab: of the model, so that no id is beyond it."""

    def __init__(self, folder: Any, vocab: int):
        self.folder = pathlib.Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: expected the tokenizer of the "
                                    "model, in the form of the tokenizers library")
        try:
            import tokenizers
        except ImportError:
            raise ImportError("text is encoded by the tokenizers library: pip install "
                              "'attn[checkpoints]'") from None
        try:
            self._encoder = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # it has no other class
            raise ValueError(f"{path} is no tokenizer: {error}") from None
        most = max(self._encoder.get_vocab(with_added_tokens=True).values(), default=-1)
        if most >= vocab:
            raise ValueError(f"{path} has the id {most}, and the embedding {vocab} "
                             "rows: expected the tokenizer of this model")
        found = self.folder / "tokenizer_config.json"
        self.config = read_json(found) if found.exists() else {}
        # a text to go on with begins as the tokenizer says, a conversation as its
        # template does
        self.template = self._template()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text; special: with the tokens that a text begins with."""
        return self._encoder.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._encoder.decode([int(n) for n in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the answer begins. ValueError for a
        folder without a template, and for one that fails or reaches out of its sandbox.
        """
        return self.encode(self.rendered(messages), special=False)

    def rendered(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, by the template."""
        if self.template is None:
            raise ValueError(f"{self.folder} has no chat_template: expected a model "
                             "that was trained to converse, or a prompt")
        try:
            import jinja2
            from jinja2 import ext, sandbox
        except ImportError:
            raise ImportError("chat templates are read by jinja2: pip install "
                              "'attn[checkpoints]'") from None
        world = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
        # else what is forbidden would be printed as nothing
        setattr(world, "unsafe_undefined", _forbidden)
        world.filters["tojson"] = _to_json
        world.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        tokens = {name: self._special(name) for name in (
            "bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return world.from_string(self.template).render(
                messages=[dict(m) for m in messages], add_generation_prompt=True,
                tools=None, documents=None, **tokens)
        except jinja2.exceptions.SecurityError as error:
            raise ValueError(f"chat_template of {self.folder} reaches out of its "
                             f"sandbox: {error}") from None
        except (jinja2.exceptions.TemplateError, TypeError, ArithmeticError,
                LookupError) as error:
            why = str(error) or type(error).__name__
            raise ValueError(f"chat_template of {self.folder}: {why}") from None

    def _template(self) -> str | None:
        own = self.folder / "chat_template.jinja"
        if own.exists():
            return own.read_text(encoding="utf-8")
        found = self.config.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in found}
            found = named.get("default")
        return found

    def _special(self, name: str) -> str | None:
        token = self.config.get(name)
        return token.get("content") if isinstance(token, dict) else token


def _forbidden(thing: Any, name: str) -> None:
    import jinja2

    raise jinja2.exceptions.SecurityError(
        f"{name!r} of a {type(thing).__name__} is not to be had")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class Defaults(NamedTuple):
    """How a folder wants to be sampled, its stop tokens, and what it asks for that is
    not there ("repetition_penalty=1.1")."""

    how: Sampling
    stop: list[int]
    missing: list[str]


# what changes what is drawn, and the value that changes nothing
OTHERS = {
    "repetition_penalty": 1.0, "typical_p": 1.0, "num_beams": 1,
    "no_repeat_ngram_size": 0, "penalty_alpha": None, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "bad_words_ids": None, "suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": None,
}


def defaults(folder: Any) -> Defaults:
    """What `generation_config.json` says; greedily and the stop tokens of `config.json`
    where it says nothing."""
    folder = pathlib.Path(folder)
    path = folder / "generation_config.json"
    said = read_json(path) if path.exists() else {}
    config = read_json(folder / "config.json")
    inner = config.get("text_config") or {}
    asked = [source.get("eos_token_id") for source in (said, config, inner)]
    ends: Any = next((found for found in asked if found is not None), [])
    stop = [int(n) for n in (ends if isinstance(ends, list) else [ends])]
    missing = [f"{key}={said[key]!r}" for key, inert in OTHERS.items()
               if said.get(key, inert) not in (inert, None)]
    if not said.get("do_sample", False):
        return Defaults(Sampling(), stop, missing)
    how = Sampling(said.get("temperature", 1.0), said.get("top_k", 50) or None,
                   said.get("top_p"), said.get("min_p"))
    return Defaults(how.checked(), stop, missing)


def longest(model: Any) -> int | None:
    """The longest text that the model's config speaks of, None if it does not."""
    data = dict(model.source or {})
    data |= data.get("text_config") or {}
    for key in ("max_position_embeddings", "n_positions", "model_max_length"):
        if isinstance(data.get(key), int):
            return data[key]
    return model.learned


def local(name: str) -> pathlib.Path:
    """The folder of a model: itself, or what a hub has by that name, downloaded with a
    progress bar by `huggingface_hub` (extra `hf`). FileNotFoundError, ImportError or
    ConnectionError in one sentence."""
    folder = pathlib.Path(name).expanduser()
    if folder.exists():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} is no folder, nor a name such as "
                                "Qwen/Qwen3-0.6B")
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(f"{name} is no folder, and models are downloaded by "
                          "huggingface_hub: pip install 'attn[hf]'") from None
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of many libraries below it
        why = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            f"{name} is no folder here, and cannot be downloaded ({why})") from None
