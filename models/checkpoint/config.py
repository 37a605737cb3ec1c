"""Config: what a folder's `config.json` says, and a reader that takes note of what was
read, so that nothing that matters is passed over."""

from __future__ import annotations

import json
import pathlib
from typing import Any, Iterator, Mapping

from models.checkpoint.files import read_json

# what says nothing of the numbers that come out: training, its noise, other tasks,
# tokens that generation knows
INERT = set("""
architectures attention_dropout attn_pdrop auto_map bos_token_id cache_implementation
chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id finetuning_task
id2label initializer_factor initializer_range keys_to_ignore_at_inference label2id
max_position_embeddings model_max_length model_type n_ctx n_positions output_attentions
output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type
resid_pdrop return_dict router_aux_loss_coef router_jitter_noise scan_layers
summary_activation summary_first_dropout summary_proj_to_labels summary_type
summary_use_proj task_specific_params tokenizer_class torch_dtype torchscript
transformers_version unsloth_fixed unsloth_version use_cache use_return_dict
use_mem_eff_path
""".split())


class Config(Mapping[str, Any]):
    """A `config.json` that does not change: it can be hashed, compared and, by
    `models.checkpoint.save`, written as it was read."""

    def __init__(self, data: Mapping[str, Any]):
        self.text = json.dumps(dict(data), indent=2, sort_keys=True)
        self._data = json.loads(self.text)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.text == other.text

    def __repr__(self) -> str:
        return f"Config({self.get('model_type')!r})"


def read_config(folder: Any) -> Config:
    """The `config.json` of a folder."""
    path = pathlib.Path(folder) / "config.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no object: expected keys and values")
    return Config(found)


class Reader:
    """Reads a config key by key; `finish` refuses the keys that nobody asked for."""

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default if it is missing or null."""
        self.seen.add(key)
        value = self.data.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether the key is there, null or not."""
        self.seen.add(key)
        return key in self.data

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on."""
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"config.json has no {key}: expected a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {key}={value!r}: expected a whole number "
                             "of 1 or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A real number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"config.json: {key}={value!r}: expected a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {key}={value!r}: expected true or false")
        return value

    def kinds(self, key: str, default: list[str], known: tuple[str, ...]) -> list[str]:
        """One word of `known` for each layer."""
        value = self.get(key, default)
        if not isinstance(value, list) or len(value) != len(default):
            raise ValueError(f"config.json: {key}={value!r}: expected one of {known} "
                             f"for each of the {len(default)} layers")
        for kind in value:
            if kind not in known:
                raise NotImplementedError(
                    f"{key}={kind!r}: not there yet, expected one of {known}")
        return value

    def only(self, key: str, *values: Any) -> Any:
        """The value, refused by name if it is none of these; missing is the first."""
        value = self.get(key, values[0])
        if value not in values:
            raise NotImplementedError(
                f"{key}={value!r}: not there yet, expected one of {values}")
        return value

    def ignore(self, *keys: str) -> None:
        """Keys that change nothing in this architecture."""
        self.seen.update(keys)

    def finish(self) -> None:
        """NotImplementedError for keys with a value that were not read."""
        for key, value in self.data.items():
            if key in self.seen or key in INERT or key.startswith("_"):
                continue
            if value is not None:
                raise NotImplementedError(
                    f"config.json: {key}={value!r} is not known for model_type="
                    f"{self.data.get('model_type')!r}: refused rather than ignored")
