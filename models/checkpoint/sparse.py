"""Sparse: the architectures whose MLPs are experts."""

from __future__ import annotations

from typing import Any

from models.checkpoint.config import Reader
from models.checkpoint.decoder import (
    FULL, SLIDING, Architecture, activation, attention, decoder, layers, mlp, outside,
    place, rms, softmaxes,
)
from models.checkpoint.dense import BUFFERS, PRE
from models.checkpoint.hybrid import delta_tensors, gated, gated_softmax, is_delta
from models.checkpoint.mxfp4 import quantised
from models.checkpoint.rope import rope
from models.checkpoint.tensors import (
    Entry, alternating, fused, kernel, linear, norm, same, stacked,
)
from models.experts import Experts
from models.feed import Feed
from models.lm import LM

W123 = "w1.weight", "w3.weight", "w2.weight"  # gate, up and out
PROJ = "gate_proj.weight", "up_proj.weight", "down_proj.weight"


def experts_of(
    model: LM, n: int, name: str, path: str, leaves: tuple[str, ...]
) -> list[Entry]:
    """The router and the experts of layer n, a matrix each."""
    how = model._each("feed")[n]
    found = [kernel(f"{name}.gate.weight", f"{path}/router/kernel")]
    for ours, leaf in zip(("gate", "up", "out"), leaves):
        names = [f"{name}.experts.{i}.{leaf}" for i in range(how.experts)]
        found.append(stacked(names, f"{path}/experts/{ours}_kernel"))
    return found


def norms(name: str, path: str) -> list[Entry]:
    """The norms in front of mixer and MLP."""
    return [entry for theirs, ours in PRE
            for entry in norm(f"{name}.{theirs}", f"{path}/{ours}")]


def mixture(r: Reader, **fields: Any) -> Experts:
    """Mixtral's experts."""
    return Experts(
        r.size("intermediate_size"), r.size("num_local_experts", 8),
        r.size("num_experts_per_tok", 2), activation=activation(r), **fields,
    )


# ---------------------------------------------------------------------------- Mixtral


def mixtral(r: Reader, options: dict[str, Any]) -> LM:
    """Mixtral (Jiang et al., 2024) arXiv:2401.04088."""
    size = r.get("sliding_window")
    kind = FULL if size is None else SLIDING
    return decoder(
        r, options, attention=softmaxes([kind] * layers(r), size),
        position=rope(r, theta=1000000.0), norms=rms(r, 1e-5), feed=mixture(r),
    )


def mixtral_tensors(r: Reader, model: LM) -> list[Entry]:
    """Mixtral's."""
    found = outside(model)
    for n in range(len(model.attention)):
        name, path = place(n)
        found += attention(model, f"{name}.self_attn", f"{path}/mixer")
        found += experts_of(
            model, n, f"{name}.block_sparse_moe", f"{path}/mlp", W123)
        found += norms(name, path)
    return found


# ----------------------------------------------------------------------------- gpt-oss


def gpt_oss(r: Reader, options: dict[str, Any]) -> LM:
    """gpt-oss (OpenAI, 2025) arXiv:2508.10925: sinks, a window in every second layer,
    clamped gates, biases throughout."""
    every = [FULL if n % 2 else SLIDING for n in range(layers(r))]
    kinds = r.kinds("layer_types", every, (FULL, SLIDING))
    r.only("hidden_act", "silu")
    r.ignore("initial_context_length", "experts_per_token", "quantization_config")
    feed = Experts(
        r.size("intermediate_size", 2880), r.size("num_local_experts", 128),
        r.size("num_experts_per_tok", 4), "top", bias=True,
        limit=r.number("swiglu_limit", 7.0), steep=r.number("swiglu_alpha", 1.702),
    )
    return decoder(
        r, options, attention=softmaxes(kinds, r.get("sliding_window", 128)),
        position=rope(r, theta=150000.0), norms=rms(r, 1e-5), feed=feed, sinks=True,
        use_bias=r.flag("attention_bias", True), head_dim=r.size("head_dim", 64),
    )


def gpt_oss_tensors(r: Reader, model: LM) -> list[Entry]:
    """gpt-oss's: experts in one tensor, gate and up in turns."""
    found = outside(model)
    for n in range(len(model.attention)):
        name, path = place(n)
        own, ours = f"{name}.mlp.experts", f"{path}/mlp/experts"
        found += attention(model, f"{name}.self_attn", f"{path}/mixer")
        found += linear(f"{name}.mlp.router", f"{path}/mlp/router", bias=True)
        both, down = [f"{ours}/gate_kernel", f"{ours}/up_kernel"], f"{ours}/out_kernel"
        if r.get("quantization_config"):
            found += [quantised(f"{own}.gate_up_proj", both),
                      quantised(f"{own}.down_proj", [down])]
        else:
            found += [alternating(f"{own}.gate_up_proj", both),
                      same(f"{own}.down_proj", down)]
        found += [
            alternating(f"{own}.gate_up_proj_bias",
                        [f"{ours}/gate_bias", f"{ours}/up_bias"]),
            same(f"{own}.down_proj_bias", f"{ours}/out_bias"),
            *norms(name, path),
        ]
    return found


# -------------------------------------------------------------------------- Qwen3-Next


def qwen3_next(r: Reader, options: dict[str, Any]) -> LM:
    """Qwen3-Next (Qwen team, 2025): Qwen3.5's layers, and experts of which one is
    shared and gated."""
    act = activation(r)
    dense = Feed(r.size("intermediate_size", 5632), act)
    experts = Experts(
        r.size("moe_intermediate_size", 512), r.size("num_experts", 512),
        r.size("num_experts_per_tok", 10), activation=act,
        renormalise=r.flag("norm_topk_prob", True), shared_gate=True,
        shared=Feed(r.size("shared_expert_intermediate_size", 512), act),
    )
    step, plain = r.size("decoder_sparse_step", 1), r.get("mlp_only_layers", [])
    return gated(r, options, feed=tuple(
        dense if n in plain or (n + 1) % step else experts for n in range(layers(r))
    ))


def qwen3_next_tensors(r: Reader, model: LM) -> list[Entry]:
    """Qwen3-Next's: of each head of keys its query, key, values and gates in one
    matrix, and betas and decays in another."""
    found = outside(model)
    for n, layer in enumerate(model.attention):
        name, path = place(n)
        mixer, learned = f"{path}/mixer", f"{path}/mixer/attention"
        found += norms(name, path)
        found += shared_experts(model, n, f"{name}.mlp", f"{path}/mlp")
        if not is_delta(model, n):
            found += gated_softmax(model, f"{name}.self_attn", mixer)
            continue
        own = f"{name}.linear_attn"
        found += delta_tensors(own, mixer)
        found += [
            fused(f"{own}.in_proj_qkvz.weight",
                  [f"{mixer}/{c}/kernel" for c in ("q", "k", "v", "gate")],
                  groups=layer.heads),
            fused(f"{own}.in_proj_ba.weight",
                  [f"{learned}/{c}/kernel" for c in ("beta", "decay")],
                  groups=layer.heads),
        ]
    return found


def shared_experts(model: LM, n: int, name: str, path: str) -> list[Entry]:
    """Experts with one that all tokens go through, or a plain MLP."""
    if isinstance(model._each("feed")[n], Feed):
        return mlp(name, path)
    return [
        *experts_of(model, n, name, path, PROJ),
        *mlp(f"{name}.shared_expert", f"{path}/shared"),
        kernel(f"{name}.shared_expert_gate.weight", f"{path}/shared_gate/kernel"),
    ]


SPARSE = {
    "mixtral": Architecture(mixtral, mixtral_tensors, ignored=BUFFERS),
    "gpt_oss": Architecture(gpt_oss, gpt_oss_tensors, ignored=BUFFERS),
    "qwen3_next": Architecture(
        qwen3_next, qwen3_next_tensors, ignored=(*BUFFERS, r"^mtp\.")),
}
