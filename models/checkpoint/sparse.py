"""Sparse: the architectures whose MLPs are experts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from attn.layers import MultiHead
from attn.lightning import Lightning, slopes
from models.checkpoint.config import Reader
from models.checkpoint.decoder import (
    FULL, LINEAR, SLIDING, Architecture, activation, attention, decoder, head_dim,
    heads, layers, mlp, outside, place, rms, softmaxes,
)
from models.checkpoint.dense import BUFFERS, PRE
from models.checkpoint.hybrid import (
    delta_tensors, gated, gated_softmax, is_delta, mixed,
)
from models.checkpoint.mxfp4 import quantised
from models.checkpoint.rope import rope
from models.checkpoint.tensors import (
    Entry, alternating, fused, kernel, linear, norm, same, stacked,
)
from models.experts import Experts
from models.feed import Feed
from models.lm import LM
from models.stack import Norm, Residual

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


# ----------------------------------------------------------------------------- MiniMax


def minimax(r: Reader, options: dict[str, Any]) -> LM:
    """MiniMax-01 (MiniMax, 2025) arXiv:2501.08313: Lightning in most layers, and
    residuals that start behind the norm."""
    every = [LINEAR if n % 2 else FULL for n in range(layers(r))]
    kinds = r.kinds("layer_types", every, (FULL, LINEAR))
    size, count = r.get("sliding_window"), layers(r)
    r.ignore("block_size")  # of its own chunked form
    r.only("hidden_act", "silu")
    full = softmaxes([FULL if size is None else SLIDING], size)[0]
    # the slopes of layer n
    lightning = [
        MultiHead(
            Lightning(slopes="minimax", layer=n, layers=count), heads=heads(r),
            head_dim=head_dim(r), position=None, qkv_act="silu", out_norm="all",
            out_gate="sigmoid", norm=Norm(), dtype=options["dtype"], parent=None,
        ) if kind == LINEAR else full
        for n, kind in enumerate(kinds)
    ]

    def factors(what: str) -> tuple[float, float]:
        return r.number(f"{what}_alpha_factor", 1), r.number(f"{what}_beta_factor", 1)

    own = {FULL: factors("full_attn"), LINEAR: factors("linear_attn")}
    return decoder(
        r, options, attention=tuple(lightning), position=rope(r, theta=1000000.0),
        norms=rms(r, 1e-5), feed=mixture(r),
        residual=tuple(Residual(normed=True, mixer=own[kind], mlp=factors("mlp"))
                       for kind in kinds),
    )


def older_minimax(data: dict[str, Any]) -> dict[str, Any]:
    """The config of the code that came with the weights."""
    data = dict(data)
    types = data.pop("attn_type_list", None)
    if types is not None:
        data["layer_types"] = [FULL if kind else LINEAR for kind in types]
    for theirs, ours in (("full_attention", "full_attn"), ("mlp", "mlp"),
                         ("linear_attention", "linear_attn")):
        for which in ("alpha", "beta"):
            value = data.pop(f"layernorm_{theirs}_{which}", None)
            if value is not None:
                data[f"{ours}_{which}_factor"] = value
    for key, value in (("postnorm", True), ("shared_intermediate_size", 0)):
        if data.pop(key, value) != value:
            raise NotImplementedError(f"{key} other than {value!r}: not there yet")
    data.pop("shared_moe_mode", None)  # of no shared expert
    turned = data.pop("rotary_dim", None)
    if turned is not None:
        d = data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"]
        data["partial_rotary_factor"] = turned / d
    return data


def minimax_tensors(r: Reader, model: LM) -> list[Entry]:
    """MiniMax's: the Lightning layers have q, k and v of each head in one matrix."""
    found = outside(model)
    for n, layer in enumerate(model.attention):
        name, path = place(n)
        mixer, own = f"{path}/mixer", f"{name}.self_attn"
        found += experts_of(
            model, n, f"{name}.block_sparse_moe", f"{path}/mlp", W123)
        found += norms(name, path)
        if not isinstance(layer, MultiHead):
            found += attention(model, own, mixer)
            continue
        found += [
            fused(f"{own}.qkv_proj.weight", [f"{mixer}/{c}/kernel" for c in "qkv"],
                  groups=layer.heads),
            kernel(f"{own}.output_gate.weight", f"{mixer}/gate/kernel"),
            kernel(f"{own}.out_proj.weight", f"{mixer}/out/kernel", inputs=2),
            *norm(f"{own}.norm", f"{mixer}/out_norm"),
            decays(own, layer, r.size("block_size", 256)),
        ]
    return found


def decays(name: str, layer: Any, block: int) -> Entry:
    """The buffers that transformers keeps with the parameters. They follow from the
    slopes: what is read must be that, and the same, to a rounding of its exponentials,
    is written."""
    names = [f"{name}.{leaf}" for leaf in
             ("slope_rate", "query_decay", "key_decay", "diagonal_decay")]
    return Entry(tuple(names), (), functools.partial(_known, names[0], layer, block),
                 functools.partial(_decays, layer, block), optional=True)


def _known(name: str, layer, block: int, arrays, shapes) -> list[np.ndarray]:
    rate = _decays(layer, block, ())[0]
    if not np.allclose(arrays[0].astype(np.float32), rate, rtol=1e-2):
        raise NotImplementedError(f"{name} has other slopes than MiniMax-01: not there "
                                  "yet")
    return []


def _decays(layer, block: int, arrays) -> list[np.ndarray]:
    def exp(a):
        return np.exp(a.astype(np.float64)).astype(np.float32)

    # exponents in float32, as they were made
    how = layer.attention
    rate = slopes(layer.heads, how.slopes, how.layer, how.layers)
    rate = rate.astype(np.float32)[:, None, None]
    i = np.arange(1, block + 1, dtype=np.float32)
    between = (i[:, None] - i[None])[None, None]  # [1,1,c,c]
    diagonal = exp(np.where(between >= 0, -rate * between, np.float32(-np.inf)))
    return [rate, exp(-rate * i[:, None]), exp(-rate * (block - i[:, None])), diagonal]


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
    "minimax": Architecture(
        minimax, minimax_tensors, ignored=BUFFERS, older=older_minimax),
    "gpt_oss": Architecture(gpt_oss, gpt_oss_tensors, ignored=BUFFERS),
    "qwen3_next": Architecture(
        qwen3_next, qwen3_next_tensors, ignored=(*BUFFERS, r"^mtp\.")),
}
