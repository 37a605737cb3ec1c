"""Kimi: KDA in most layers, MLA without rotation in the others, experts in nearly all.
"""

from __future__ import annotations

from typing import Any

from attn.contract.norm import Norm
from attn.delta import Delta
from attn.layers import MultiHead
from attn.mla import MLA
from models.checkpoint.config import Reader
from models.checkpoint.decoder import (
    FULL, LINEAR, Architecture, activation, decoder, heads, layers, mlp, outside, place,
    rms,
)
from models.checkpoint.dense import BUFFERS
from models.checkpoint.hybrid import convs
from models.checkpoint.sparse import W123, experts_of, norms
from models.checkpoint.tensors import Entry, flat, fused, kernel, linear, norm
from models.experts import Experts
from models.feed import Feed
from models.lm import LM

DENSE, SPARSE = "dense", "sparse"


def kimi_linear(r: Reader, options: dict[str, Any]) -> LM:
    """Kimi Linear (Kimi team, 2025) arXiv:2510.26692."""
    count = layers(r)
    every = [FULL if n and n % 4 == 0 else LINEAR for n in range(count)]
    kinds = r.kinds("layer_types", every, (FULL, LINEAR))
    r.only("hidden_act", "silu")
    # what its config inherits: it has no rotation
    r.ignore("head_dim", "qk_head_dim", "rope_theta", "rope_parameters", "rope_scaling")
    # nor does transformers tie its head, whatever the config says
    r.ignore("tie_word_embeddings")
    each = {LINEAR: kda_layer(r, options), FULL: mla_layer(r, options)}
    return decoder(
        r, options, attention=tuple(each[kind] for kind in kinds), position=None,
        norms=rms(r, 1e-5), head_dim=r.size("qk_nope_head_dim", 128),
        feed=feeds(r, count), tied=False,
    )


def kda_layer(r: Reader, options: dict[str, Any]) -> MultiHead:
    """Kimi Delta Attention."""
    d = r.size("linear_head_dim", 128)
    delta = Delta(gated=True, channels=True, rank=d,
                  conv=r.size("linear_conv_kernel_dim", 4))
    return MultiHead(
        delta, r.size("linear_num_heads", 32), head_dim=d, value_dim=d, position=None,
        out_gate="sigmoid", gate_rank=d, norm=rms(r, 1e-5), dtype=options["dtype"],
        parent=None,
    )


def mla_layer(r: Reader, options: dict[str, Any]) -> MLA:
    """MLA, whose shared part is not turned."""
    query_rank = r.get("q_lora_rank")
    return MLA(
        heads(r), r.size("kv_lora_rank", 512), r.size("qk_nope_head_dim", 128),
        r.size("qk_rope_head_dim", 64), r.size("v_head_dim", 128), query_rank,
        norm=Norm(), use_bias=r.flag("attention_bias"), dtype=options["dtype"],
        parent=None,
    )


def feeds(r: Reader, count: int) -> tuple:
    """Plain MLPs first, experts with shared ones then."""
    act, wide = activation(r), r.size("moe_intermediate_size", 1024)
    kinds = r.kinds("mlp_layer_types", [DENSE] + [SPARSE] * (count - 1),
                    (DENSE, SPARSE))
    shared = r.size("num_shared_experts", 1)
    experts = Experts(
        wide, r.size("num_experts", 256), r.size("num_experts_per_token", 8), "sigmoid",
        renormalise=r.flag("moe_renormalize", True),
        factor=r.number("routed_scaling_factor", 2.446),
        groups=r.size("num_expert_group", 1), top_groups=r.size("topk_group", 1),
        shared=Feed(wide * shared, act), activation=act,
    )
    dense = Feed(r.size("intermediate_size"), act)
    return tuple(dense if kind == DENSE else experts for kind in kinds)


def kimi_tensors(r: Reader, model: LM) -> list[Entry]:
    """Kimi Linear's."""
    found = outside(model)
    for n, layer in enumerate(model.attention):
        name, path = place(n)
        moe, mixer = f"{name}.block_sparse_moe", f"{path}/mixer"
        found += norms(name, path)
        if isinstance(model._each("feed")[n], Feed):
            found += mlp(moe, f"{path}/mlp")
        else:
            found += experts_of(model, n, moe, f"{path}/mlp", W123)
            found += mlp(f"{moe}.shared_experts", f"{path}/mlp/shared")
            found.append(flat(f"{moe}.gate.e_score_correction_bias",
                              f"{path}/mlp/correction"))
        of = mla_tensors if isinstance(layer, MLA) else kda_tensors
        found += of(layer, f"{name}.self_attn", mixer)
    return found


def kda_tensors(layer: MultiHead, name: str, mixer: str) -> list[Entry]:
    """A matrix for each projection; gates through as many channels as a head has."""
    learned = f"{mixer}/attention"
    pairs = {
        "q_proj": f"{mixer}/q", "k_proj": f"{mixer}/k", "v_proj": f"{mixer}/v",
        "g_a_proj": f"{mixer}/gate_down", "g_b_proj": f"{mixer}/gate",
        "f_a_proj": f"{learned}/decay_down", "f_b_proj": f"{learned}/decay_up",
        "b_proj": f"{learned}/beta",
    }
    return [
        *(kernel(f"{name}.{theirs}.weight", f"{ours}/kernel")
          for theirs, ours in pairs.items()),
        kernel(f"{name}.o_proj.weight", f"{mixer}/out/kernel", inputs=2),
        *norm(f"{name}.o_norm", f"{mixer}/out_norm"),
        convs([f"{name}.{c}_conv1d.weight" for c in "qkv"], learned),
        flat(f"{name}.dt_bias", f"{learned}/dt_bias"),
        flat(f"{name}.A_log", f"{learned}/A_log", (1, 1, -1, 1)),
    ]


def mla_tensors(layer: MLA, name: str, mixer: str) -> list[Entry]:
    """The matrix that makes keys and values has, of each head, first its keys."""
    if layer.query_rank is None:
        queries = [kernel(f"{name}.q_proj.weight", f"{mixer}/q/kernel")]
    else:
        queries = [
            *linear(f"{name}.q_a_proj", f"{mixer}/q_down", bias=layer.use_bias),
            *norm(f"{name}.q_a_layernorm", f"{mixer}/q_norm"),
            kernel(f"{name}.q_b_proj.weight", f"{mixer}/q_up/kernel"),
        ]
    return queries + [
        *linear(f"{name}.kv_a_proj_with_mqa", f"{mixer}/kv_down", bias=layer.use_bias),
        *norm(f"{name}.kv_a_layernorm", f"{mixer}/kv_norm"),
        fused(f"{name}.kv_b_proj.weight", [f"{mixer}/k_up", f"{mixer}/v_up"],
              groups=layer.heads),
        *linear(f"{name}.o_proj", f"{mixer}/out", inputs=2, bias=layer.use_bias),
    ]


def older(data: dict[str, Any]) -> dict[str, Any]:
    """The config of the code that came with the weights, in which layers count from 1.
    """
    data = dict(data)
    own = data.pop("linear_attn_config", None)
    count = data.get("num_hidden_layers", 27)
    if own is not None:
        full, kda = own.get("full_attn_layers"), own.get("kda_layers")
        if sorted([*(full or ()), *(kda or ())]) != list(range(1, count + 1)):
            raise ValueError("config.json: linear_attn_config: expected "
                             "full_attn_layers and kda_layers to be the layers 1 to "
                             f"{count}")
        data["layer_types"] = [FULL if n + 1 in full else LINEAR for n in range(count)]
        for theirs, ours in (("head_dim", "linear_head_dim"),
                             ("num_heads", "linear_num_heads"),
                             ("short_conv_kernel_size", "linear_conv_kernel_dim")):
            if theirs in own:
                data[ours] = own[theirs]
    first, step = data.pop("first_k_dense_replace", 1), data.pop("moe_layer_freq", 1)
    if data.get("mlp_layer_types") is None:
        data["mlp_layer_types"] = [
            SPARSE if n >= first and n % step == 0 else DENSE for n in range(count)]
    for key, value in (("moe_router_activation_func", "sigmoid"),
                       ("mla_use_nope", True), ("num_nextn_predict_layers", 0)):
        if data.pop(key, value) != value:
            raise NotImplementedError(f"{key} other than {value!r}: not there yet")
    data.pop("use_grouped_topk", None)  # what groups there are says it
    return data


KIMI = {"kimi_linear": Architecture(
    kimi_linear, kimi_tensors, older=older, ignored=BUFFERS,
    # the code that came with the weights names a plain MLP so
    renamed=((r"\.mlp\.", ".block_sparse_moe."),),
)}
