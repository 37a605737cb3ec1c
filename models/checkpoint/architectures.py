"""Architectures: which there are, by the `model_type` of a `config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from attn.masks import Causal
from attn.positions import RoPE
from attn.softmax import Softmax
from models.checkpoint.config import Config, Reader
from models.checkpoint.decoder import Architecture
from models.checkpoint.dense import DENSE
from models.checkpoint.gemma import GEMMA
from models.checkpoint.gpt2 import GPT2
from models.checkpoint.hybrid import HYBRID
from models.checkpoint.kimi import KIMI
from models.checkpoint.minimax import MINIMAX
from models.checkpoint.sparse import SPARSE
from models.feed import Feed
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
    """A config for a model that was not loaded: of Llama, or of Qwen3 or OLMo 2 where q
    and k are normed. ValueError for a model that they do not describe, which names a
    field that is in the way."""
    if not isinstance(model, LM):
        raise ValueError(f"a {type(model).__name__} has no config.json: expected an LM")
    name = {"head": "qwen3", "all": "olmo2"}.get(str(model.qk_norm), "llama")
    source = _sizes(name, model)
    like = ARCHITECTURES[name].model(Reader(dict(source)), {"dtype": model.dtype})
    theirs = _spelled(like)
    for field, value in _spelled(model).items():
        if field not in theirs:  # of a subclass
            raise ValueError(f"{field}={value!r} stands in no config.json of {name}: "
                             f"expected an LM, not a {type(model).__name__}")
        if value != theirs[field]:
            raise ValueError(f"{field}={_short(value)} stands in no config.json of "
                             f"{name}: expected {_short(theirs[field])}")
    return source


def _sizes(name: str, model: LM) -> Config:
    """The config of an architecture with the sizes of a model."""
    position, feed = model._each("position")[0], model._each("feed")[0]
    if not isinstance(position, RoPE):
        raise ValueError(f"position={position!r} stands in no config.json of {name}: "
                         "expected a RoPE")
    hidden = model.blocks()[0].hidden if feed is None else getattr(feed, "hidden", 0)
    if not hidden:
        raise ValueError(f"hidden={model.hidden}, feed={feed!r} stands in no "
                         f"config.json of {name}: expected a gated MLP")
    title = {"qwen3": "Qwen3", "olmo2": "Olmo2", "llama": "Llama"}[name]
    longest = max(1, model.learned or position.original)
    return Config({
        "architectures": [f"{title}ForCausalLM"], "model_type": name,
        "vocab_size": model.vocab, "hidden_size": model.width,
        "intermediate_size": hidden, "num_hidden_layers": len(model.attention),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.head_dim or model.width // model.heads,
        "hidden_act": "silu", "max_position_embeddings": longest,
        "rms_norm_eps": model.norms.eps, "tie_word_embeddings": model.tied,
        "attention_bias": model.use_bias is True,
        **({"mlp_bias": bool(getattr(feed, "bias", False))} if name == "llama" else {}),
        "rope_parameters": {"rope_type": "default", "rope_theta": position.theta},
        "dtype": jnp.dtype(model.dtype).name,
    })


def _spelled(model: LM) -> dict[str, Any]:
    """The fields of a model, defaults written out."""
    free = "parent", "name", "source", "scan", "remat"  # which change no number
    found = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)
             if f.name not in free}
    blocks = model.blocks()
    return found | {
        "kv_heads": model.kv_heads or model.heads,
        "head_dim": model.head_dim or model.width // model.heads,
        "feed": tuple(block.feed or Feed(block.hidden) for block in blocks),
        "hidden": None, "dtype": jnp.dtype(model.dtype),
        "use_bias": model.use_bias or False, "qk_norm": model.qk_norm or False,
        "position": model._each("position"), "residual": model._each("residual"),
        "attention": tuple(_plain(a) for a in model.attention),
    }


def _short(value: Any) -> str:
    """A value in one line: of a module, whose fields stand in many, its class."""
    return f"{type(value).__name__}()" if isinstance(value, nn.Module) else repr(value)


def _plain(attention: Any) -> Any:
    """An exact attention without what changes no number."""
    if not isinstance(attention, Softmax):
        return attention
    mask = None if attention.mask == Causal() else attention.mask
    return dataclasses.replace(attention, mask=mask, implementation=None, axis=None)
