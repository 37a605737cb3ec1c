"""Dense: the architectures of exact attention and one MLP a layer."""

from __future__ import annotations

import math
from typing import Any

from attn.softmax import Softmax
from models.checkpoint.config import Config, Reader
from models.checkpoint.decoder import (
    ACTIVATIONS, FULL, SLIDING, Architecture, attention, decoder, feed, head_dim, heads,
    layers, mlp, outside, place, rms, softmaxes,
)
from models.checkpoint.rope import rope
from models.checkpoint.tensors import Entry, flat, fused, linear, norm, same
from models.feed import Feed
from models.lm import LM
from models.stack import Norm, Residual

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
    size = r.get("sliding_window") if r.flag("use_sliding_window") else None
    r.ignore("sliding_window", "max_window_layers")
    kinds = [FULL if turn or size is None else SLIDING for turn in turns]
    kinds = r.kinds("layer_types", kinds, (FULL, SLIDING))
    if not r.flag("use_sliding_window"):
        kinds = [FULL] * count
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
        r, options, attention=softmaxes([kind] * layers(r), size), position=rope(r),
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


# ------------------------------------------------------------------------------ Gemma


def gemma(r: Reader, options: dict[str, Any], **fields: Any) -> LM:
    """What Gemma 2 and 3 share: norms around mixer and MLP with scales stored as what
    they differ from 1, a scaled embedding."""
    act = "hidden_activation" if r.get("hidden_activation") else "hidden_act"
    r.ignore("hidden_act")  # of the two keys the older one is not used
    return decoder(
        r, options, norms=rms(r, offset=1.0), tied=r.flag("tie_word_embeddings", True),
        residual=Residual(before=True, after=True),
        embed_scale=math.sqrt(r.size("hidden_size")),
        softcap=r.get("final_logit_softcapping"),
        use_bias=r.flag("attention_bias"), head_dim=r.size("head_dim", 256),
        feed=feed(r, key=act), **fields,
    )


def scores(r: Reader) -> dict[str, Any]:
    """The scale and the softcap of Gemma's logits."""
    r.only("use_bidirectional_attention", None, False)
    return {"scale": r.number("query_pre_attn_scalar", 256) ** -0.5,
            "softcap": r.get("attn_logit_softcapping")}


def gemma2(r: Reader, options: dict[str, Any]) -> LM:
    """Gemma 2 (Gemma team, 2024) arXiv:2408.00118: every second layer has a window,
    attention and logits a softcap."""
    every = [FULL if n % 2 else SLIDING for n in range(layers(r))]
    kinds = r.kinds("layer_types", every, (FULL, SLIDING))
    return gemma(
        r, options, attention=softmaxes(kinds, r.get("sliding_window", 4096),
                                        **scores(r)), position=rope(r),
    )


def gemma3(r: Reader, options: dict[str, Any]) -> LM:
    """Gemma 3 (Gemma team, 2025) arXiv:2503.19786: five layers of a window with a
    rotation of their own to one that sees all."""
    period = r.size("sliding_window_pattern", r.data.get("_sliding_window_pattern", 6))
    every = [SLIDING if (n + 1) % period else FULL for n in range(layers(r))]
    kinds = r.kinds("layer_types", every, (FULL, SLIDING))
    turned = {
        FULL: rope(r, FULL, theta=1000000.0),
        SLIDING: rope(r, SLIDING, old_theta="rope_local_base_freq", scaled=False),
    }
    return gemma(
        r, options, attention=softmaxes(kinds, r.get("sliding_window", 4096),
                                        **scores(r)),
        position=tuple(turned[kind] for kind in kinds), qk_norm="head",
    )


# ------------------------------------------------------------------------------ GPT-2


def gpt2(r: Reader, options: dict[str, Any]) -> LM:
    """GPT-2 (Radford et al., 2019): learned positions, LayerNorm, biases throughout."""
    width, count = r.size("n_embd", 768), r.size("n_head", 12)
    depth, d = r.size("n_layer", 12), width // count
    scale = d**-0.5 if r.flag("scale_attn_weights", True) else 1.0
    by_layer = r.flag("scale_attn_by_inverse_layer_idx")
    r.ignore("reorder_and_upcast_attn")  # the order of rounding
    r.only("add_cross_attention", False)
    act = r.only("activation_function", "gelu_new", *sorted(ACTIVATIONS))
    fields: dict[str, Any] = dict(
        vocab=r.size("vocab_size", 50257), width=width, heads=count, head_dim=d,
        attention=tuple(Softmax(scale=scale / (n + 1 if by_layer else 1))
                        for n in range(depth)),
        position=None, learned=r.size("n_positions", 1024), use_bias=True,
        norms=Norm("layer", r.number("layer_norm_epsilon", 1e-5)),
        feed=Feed(r.size("n_inner", 4 * width), ACTIVATIONS[act], gated=False,
                  bias=True),
        tied=r.flag("tie_word_embeddings", True), source=Config(r.data),
    )
    return LM(**fields | options)


def gpt2_tensors(r: Reader, model: LM) -> list[Entry]:
    """GPT-2's: its matrices are [in,out]."""
    found = [same("transformer.wte.weight", "embed/embedding"),
             same("transformer.wpe.weight", "positions/embedding"),
             *norm("transformer.ln_f", "norm", bias=True)]
    found += [] if model.tied else linear("lm_head", "head")
    for n in range(len(model.attention)):
        name, path = f"transformer.h.{n}", f"layers/layer_{n}"
        mixer = f"{path}/mixer"
        found += [
            fused(f"{name}.attn.c_attn.weight", [f"{mixer}/{c}/kernel" for c in "qkv"],
                  transposed=False),
            fused(f"{name}.attn.c_attn.bias", [f"{mixer}/{c}/bias" for c in "qkv"], 0),
            *linear(f"{name}.attn.c_proj", f"{mixer}/out", 2, True, False),
            *linear(f"{name}.mlp.c_fc", f"{path}/mlp/up", 1, True, False),
            *linear(f"{name}.mlp.c_proj", f"{path}/mlp/out", 1, True, False),
            *norm(f"{name}.ln_1", f"{path}/mixer_norm", bias=True),
            *norm(f"{name}.ln_2", f"{path}/mlp_norm", bias=True),
        ]
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
    "gemma2": LLAMA._replace(model=gemma2),
    "gemma3_text": LLAMA._replace(
        model=gemma3, renamed=((r"^(model\.)?language_model\.(model\.)?", "model."),),
        ignored=(*BUFFERS, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
    ),
    "gpt2": Architecture(
        gpt2, gpt2_tensors,
        # the first writer had no prefix, and kept the causal mask as a tensor
        renamed=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
        ignored=(r"\.attn\.(masked_)?bias$",),
    ),
}
