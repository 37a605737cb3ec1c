"""Decoder: what the architectures of transformers have in common, as fields of `LM` and
as tensors. An architecture says in its own file what differs."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Sequence

import jax.numpy as jnp

from attn.contract.norm import Norm
from attn.masks import Causal, Window
from attn.softmax import Softmax
from models.checkpoint.config import Config, Reader
from models.checkpoint.tensors import Entry, flat, linear, norm, same
from models.feed import Feed
from models.lm import LM

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Architecture(NamedTuple):
    """model(reader, options): the `LM` of a config; tensors(reader, model): its
    entries, by the names that transformers 5 writes. renamed: (pattern, replacement) of
    names that are found elsewhere; ignored: patterns of tensors that are no parameters
    or of other parts (buffers, a tower for images). older: the config of other writers
    as transformers 5 has it."""

    model: Callable[[Reader, dict[str, Any]], LM]
    tensors: Callable[[Reader, LM], list[Entry]]
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    older: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def decoder(r: Reader, options: dict[str, Any], **fields: Any) -> LM:
    """The model, of the fields that all of them have; options: of the one who loads."""
    found: dict[str, Any] = dict(
        vocab=r.size("vocab_size"), width=r.size("hidden_size"),
        heads=heads(r), kv_heads=r.size("num_key_value_heads", heads(r)),
        head_dim=head_dim(r), tied=r.flag("tie_word_embeddings", False),
        norms=rms(r), source=Config(r.data),
    )
    return LM(**found | fields | options)


def heads(r: Reader) -> int:
    """H."""
    return r.size("num_attention_heads")


def layers(r: Reader) -> int:
    """How many layers there are."""
    return r.size("num_hidden_layers")


def head_dim(r: Reader) -> int:
    """D; E/H if the config does not say it."""
    return r.size("head_dim", max(r.size("hidden_size") // heads(r), 1))


def rms(r: Reader, default: float = 1e-6, **fields: Any) -> Norm:
    """RMSNorm with the config's epsilon."""
    return Norm(eps=r.number("rms_norm_eps", default), **fields)


def feed(r: Reader, bias: bool = False, key: str = "hidden_act", **fields: Any) -> Feed:
    """The gated MLP."""
    return Feed(r.size("intermediate_size"), activation(r, key), bias=bias, **fields)


def activation(r: Reader, key: str = "hidden_act", default: str = "silu") -> str:
    """The activation, by the name that it has here."""
    return ACTIVATIONS[r.only(key, default, *sorted(ACTIVATIONS))]


def window(n: int) -> Any:
    """A mask of the n last tokens, the token itself among them."""
    return Causal() & Window(n - 1)


def softmaxes(
    kinds: Sequence[str], size: int | None, **fields: Any
) -> tuple[Softmax, ...]:
    """Exact attention in layers of these kinds, with a window of `size` tokens where
    they slide."""
    full = Softmax(**fields)
    if SLIDING not in kinds:
        return (full,) * len(kinds)
    if size is None:
        raise ValueError(
            "config.json: sliding_window is null and layer_types has sliding_attention"
        )
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"config.json: sliding_window={size!r}: expected a whole number from 1 on"
        )
    slides = Softmax(mask=window(size), **fields)
    return tuple(slides if kind == SLIDING else full for kind in kinds)


# ----------------------------------------------------------------------- tensors


def outside(model: LM, prefix: str = "model.") -> list[Entry]:
    """Embedding, last norm and head."""
    bias = model.norms.kind == "layer"
    found = [same(f"{prefix}embed_tokens.weight", "embed/embedding"),
             *norm(f"{prefix}norm", "norm", bias)]
    return found if model.tied else found + linear("lm_head", "head")


def attention(
    model: LM, name: str, path: str, out: str = "o_proj", bias: Any = None
) -> list[Entry]:
    """q, k, v and out, and the norms and sinks that the model has."""
    bias = model.use_bias if bias is None else bias
    found: list[Entry] = []
    for letter in "qkv":
        found += linear(f"{name}.{letter}_proj", f"{path}/{letter}", bias=bool(bias))
    found += linear(f"{name}.{out}", f"{path}/out", inputs=2, bias=bias is True)
    if model.qk_norm:
        found += norm(f"{name}.q_norm", f"{path}/q_norm")
        found += norm(f"{name}.k_norm", f"{path}/k_norm")
    if model.sinks:
        found.append(flat(f"{name}.sinks", f"{path}/sink"))
    return found


def mlp(name: str, path: str, bias: bool = False) -> list[Entry]:
    """The gated MLP."""
    names = ("gate", "gate_proj"), ("up", "up_proj"), ("out", "down_proj")
    return [entry for ours, theirs in names
            for entry in linear(f"{name}.{theirs}", f"{path}/{ours}", bias=bias)]


def place(n: int) -> tuple[str, str]:
    """The names of layer n: the file's and ours."""
    return f"model.layers.{n}", f"layers/layer_{n}"
