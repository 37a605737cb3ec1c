"""GPT-2: learned positions, LayerNorm, matrices the other way round."""

from __future__ import annotations

from typing import Any

from attn.contract.norm import Norm
from attn.softmax import Softmax
from models.checkpoint.config import Config, Reader
from models.checkpoint.decoder import ACTIVATIONS, Architecture
from models.checkpoint.tensors import Entry, fused, linear, norm, same
from models.feed import Feed
from models.lm import LM


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


GPT2 = {
    "gpt2": Architecture(
        gpt2, gpt2_tensors,
        # the first writer had no prefix, and kept the causal mask as a tensor
        renamed=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
        ignored=(r"\.attn\.(masked_)?bias$",),
    ),
}
