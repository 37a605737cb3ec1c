"""Architectures: which there are, by the `model_type` of a `config.json`."""

from __future__ import annotations

from typing import Any

from models.checkpoint.config import Config
from models.checkpoint.decoder import Architecture
from models.checkpoint.dense import DENSE
from models.checkpoint.gemma import GEMMA
from models.checkpoint.gpt2 import GPT2
from models.checkpoint.hybrid import HYBRID
from models.checkpoint.kimi import KIMI
from models.checkpoint.minimax import MINIMAX
from models.checkpoint.sparse import SPARSE
from models.lm import LM

ARCHITECTURES: dict[str, Architecture] = {
    **DENSE, **GEMMA, **GPT2, **HYBRID, **SPARSE, **MINIMAX, **KIMI,
}
# a text model inside a model of texts and images, and what it is called there
WRAPPERS = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}
# what code that came with weights called them
OTHERS = {"minimax_text_01": "minimax", "MiniMaxText01": "minimax"}


def architecture(source: Config) -> Architecture:
    """The entry of a config; NotImplementedError for one that is not there."""
    name = normalised(source).get("model_type")
    if name not in ARCHITECTURES:
        raise NotImplementedError(
            f"model_type={name!r}: not there yet, expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def normalised(source: Config) -> dict[str, Any]:
    """The keys of the text model, whatever stands around it, as transformers 5 has
    them."""
    data = dict(source)
    inner = data.get("text_config")
    if isinstance(inner, dict):
        name = WRAPPERS.get(str(data.get("model_type")))
        if name is None:
            raise NotImplementedError(
                f"model_type={data.get('model_type')!r} with a text_config: not there "
                f"yet, expected one of {', '.join(sorted(WRAPPERS))}")
        outer = {k: data[k] for k in ("tie_word_embeddings", "dtype", "torch_dtype")
                 if data.get(k) is not None}
        data = outer | {"model_type": name} | inner
    data["model_type"] = OTHERS.get(str(data.get("model_type")), data.get("model_type"))
    packed = data.get("quantization_config")
    method = packed.get("quant_method") if isinstance(packed, dict) else packed
    if method is not None and (method, data["model_type"]) != ("mxfp4", "gpt_oss"):
        raise NotImplementedError(f"quant_method={method!r}: not there yet")
    found = ARCHITECTURES.get(str(data.get("model_type")))
    return found.older(data) if found is not None and found.older else data


def unpacked(source: Config) -> Config:
    """The config of the same parameters, stored as plain numbers."""
    return Config({k: v for k, v in source.items() if k != "quantization_config"})


def described(model: LM) -> Config:
    """A config for a model that was not loaded."""
    raise ValueError("the model has no source: expected one that was loaded")
