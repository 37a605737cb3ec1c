"""Dense: the architectures of exact attention and one MLP a layer."""

from __future__ import annotations

from typing import Any

from models.block import Residual
from models.checkpoint.config import Reader
from models.checkpoint.decoder import (
    FULL, SLIDING, Architecture, attention, decoder, feed, layers, mlp, outside, place,
    rms, softmaxes,
)
from models.checkpoint.rope import rope
from models.checkpoint.tensors import Entry, fused, linear, norm
from models.lm import LM

PRE = (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "mlp_norm"))
POST = (("post_attention_layernorm", "mixer_out_norm"),
        ("post_feedforward_layernorm", "mlp_out_norm"))
AROUND = (("input_layernorm", "mixer_norm"),
          ("post_attention_layernorm", "mixer_out_norm"),
          ("pre_feedforward_layernorm", "mlp_norm"),
          ("post_feedforward_layernorm", "mlp_out_norm"))
BUFFERS = (r"\.rotary_emb\.inv_freq$",)


def norms_of(model: LM, n: int) -> tuple[tuple[str, str], ...]:
    """The norms of layer n, theirs and ours, by where they stand."""
    how = model._each("residual")[n]
    return AROUND if how.before and how.after else PRE if how.before else POST


def dense_tensors(r: Reader, model: LM) -> list[Entry]:
    """q, k, v, out, a gated MLP and norms, as Llama names them."""
    found = outside(model)
    for n in range(len(model.attention)):
        name, path = place(n)
        found += attention(model, f"{name}.self_attn", f"{path}/mixer")
        found += mlp(f"{name}.mlp", f"{path}/mlp", model._each("feed")[n].bias)
        for theirs, ours in norms_of(model, n):
            found += norm(f"{name}.{theirs}", f"{path}/{ours}")
    return found


# ------------------------------------------------------------------ Llama and its kin


def llama(r: Reader, options: dict[str, Any]) -> LM:
    """Llama (Touvron et al., 2023) arXiv:2302.13971, up to Llama 3 (2407.21783)."""
    return decoder(
        r, options, attention=softmaxes([FULL] * layers(r), None), position=rope(r),
        use_bias=r.flag("attention_bias"), feed=feed(r, r.flag("mlp_bias")),
    )


def mistral(r: Reader, options: dict[str, Any]) -> LM:
    """Mistral (Jiang et al., 2023) arXiv:2310.06825: a window in every layer."""
    # a config without the key means the published window, null means none
    size = r.get("sliding_window") if r.has("sliding_window") else 4096
    kind = FULL if size is None else SLIDING
    return decoder(
        r, options, attention=softmaxes([kind] * layers(r), size), position=rope(r),
        feed=feed(r),
    )


def sliding(r: Reader) -> tuple[list[str], int | None]:
    """The kinds of Qwen's layers: windows from `max_window_layers` on, if any."""
    size = r.get("sliding_window", 4096) if r.flag("use_sliding_window") else None
    first = r.get("max_window_layers", 28)
    r.ignore("sliding_window")
    kinds = [SLIDING if size is not None and n >= first else FULL
             for n in range(layers(r))]
    return r.kinds("layer_types", kinds, (FULL, SLIDING)), size


def qwen2(r: Reader, options: dict[str, Any]) -> LM:
    """Qwen2 (Yang et al., 2024) arXiv:2407.10671: biases of q, k and v."""
    kinds, size = sliding(r)
    return decoder(
        r, options, attention=softmaxes(kinds, size), position=rope(r), feed=feed(r),
        use_bias="qkv",
    )


def qwen3(r: Reader, options: dict[str, Any]) -> LM:
    """Qwen3 (Yang et al., 2025) arXiv:2505.09388: q and k are normed by head."""
    kinds, size = sliding(r)
    return decoder(
        r, options, attention=softmaxes(kinds, size), position=rope(r), feed=feed(r),
        use_bias=r.flag("attention_bias"), qk_norm="head",
        head_dim=r.size("head_dim", 128),
    )


def smollm3(r: Reader, options: dict[str, Any]) -> LM:
    """SmolLM3 (Bakouch et al., 2025): every fourth layer has no rotation."""
    count, turned = layers(r), rope(r, theta=2000000.0)
    every = r.size("no_rope_layer_interval", 4)
    turns = r.get("no_rope_layers", [int((n + 1) % every != 0) for n in range(count)])
    if not isinstance(turns, list) or len(turns) != count:
        raise ValueError(f"config.json: no_rope_layers={turns!r}: expected one number "
                         f"for each of the {count} layers, 1 for a rotation")
    size, slides = r.get("sliding_window"), r.flag("use_sliding_window")
    r.ignore("max_window_layers")
    # the flag says what kinds there are, but not to a config that has them
    kinds = [FULL if turn or size is None or not slides else SLIDING for turn in turns]
    kinds = r.kinds("layer_types", kinds, (FULL, SLIDING))
    return decoder(
        r, options, attention=softmaxes(kinds, size),
        position=tuple(turned if turn else None for turn in turns),
        use_bias=r.flag("attention_bias"), feed=feed(r, r.flag("mlp_bias")),
        tied=r.flag("tie_word_embeddings", True),
    )


def olmo2(r: Reader, options: dict[str, Any]) -> LM:
    """OLMo 2 (OLMo team, 2025) arXiv:2501.00656: norms behind mixer and MLP, and of
    all channels of q and k."""
    return decoder(
        r, options, attention=softmaxes([FULL] * layers(r), None), position=rope(r),
        use_bias=r.flag("attention_bias"), feed=feed(r), qk_norm="all",
        norms=rms(r, 1e-5), residual=Residual(before=False, after=True),
    )


# ------------------------------------------------------------------------------ Phi-3


def phi3(r: Reader, options: dict[str, Any]) -> LM:
    """Phi-3 (Abdin et al., 2024) arXiv:2404.14219: Llama with fused projections."""
    size = r.get("sliding_window")
    kind = FULL if size is None else SLIDING
    r.ignore("original_max_position_embeddings")
    return decoder(
        r, options, attention=softmaxes([kind] * layers(r), size),
        position=rope(r, fraction=1.0),
        feed=feed(r), norms=rms(r, 1e-5), use_bias=r.only("attention_bias", False),
    )


def phi3_tensors(r: Reader, model: LM) -> list[Entry]:
    """Phi-3's: q, k and v in one matrix, gate and up in one."""
    found = outside(model)
    for n in range(len(model.attention)):
        name, path = place(n)
        mixer = f"{path}/mixer"
        found += [
            fused(f"{name}.self_attn.qkv_proj.weight",
                  [f"{mixer}/{c}/kernel" for c in "qkv"]),
            *linear(f"{name}.self_attn.o_proj", f"{mixer}/out", inputs=2),
            fused(f"{name}.mlp.gate_up_proj.weight",
                  [f"{path}/mlp/{c}/kernel" for c in ("gate", "up")]),
            *linear(f"{name}.mlp.down_proj", f"{path}/mlp/out"),
        ]
        for theirs, ours in PRE:
            found += norm(f"{name}.{theirs}", f"{path}/{ours}")
    return found


LLAMA = Architecture(llama, dense_tensors, ignored=BUFFERS)
DENSE = {
    "llama": LLAMA,
    "mistral": LLAMA._replace(model=mistral),
    "qwen2": LLAMA._replace(model=qwen2),
    "qwen3": LLAMA._replace(model=qwen3),
    "smollm3": LLAMA._replace(model=smollm3),
    "olmo2": LLAMA._replace(model=olmo2),
    "phi3": Architecture(phi3, phi3_tensors, ignored=BUFFERS),
}
