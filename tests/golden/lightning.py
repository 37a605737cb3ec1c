"""Adapter for lightning.npz: the attention, its example module, the compact model."""

from __future__ import annotations

import re
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.lightning import Lightning, slopes
from models.transnormer import GLA, TransNormer


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    form = _model if "tokens" in case else _module if "x" in case else _core
    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(a) for name, a in form(case).items()}


def _attention(config: Mapping[str, Any]) -> Lightning:
    if "layer_idx" in config:
        return Lightning(layer=config["layer_idx"], layers=config["num_layers"])
    if config["kind"] == "no decay":
        return Lightning(slopes="none")
    raise ValueError(f"config {config}: expected layer_idx, or the kind 'no decay'")


def _slopes(attention: Lightning, heads: int) -> np.ndarray:
    return slopes(heads, attention.slopes, attention.layer, attention.layers)


def _core(case):
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    attention = _attention(case["config"])
    o, back = jax.vjp(jax.jit(attention), q, k, v)
    empty = attention.init_state(q.shape[1], q, k, v)
    state, _ = jax.jit(attention.step)(empty, q, k, v)
    out = {"out": o, "final_state": state.memory}
    out["slopes"] = _slopes(attention, q.shape[2])
    out.update(zip(("dq", "dk", "dv"), back(jnp.asarray(case["cotangent"]))))
    return out


def _module(case):
    x, heads = jnp.asarray(case["x"]), case["config"]["num_heads"]
    attention = _attention(case["config"])
    layer = GLA(attention, heads, variant="example")
    names = {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out",
        "output_gate_0": "gate_down", "output_gate_1": "gate_up",
    }
    params = {ours: _linear(case[f"w_{name}_weight"]) for name, ours in names.items()}
    params["norm"] = {"scale": case["w_norm_weight"], "bias": case["w_norm_bias"]}
    o, back = jax.vjp(jax.jit(lambda x: layer.apply({"params": params}, x)), x)
    (dx,) = back(jnp.asarray(case["cotangent"]))
    return {"out": o, "dx": dx, "slopes": _slopes(attention, heads)}


def _model(case):
    config = case["config"]
    if not config["tied_embedding"]:
        raise ValueError("tied_embedding=False: expected the head to be the embedding")
    depth, heads = config["n_layer"], config["n_head"]
    rotating = {
        int(found[1]) for name in case.keys()
        if (found := re.fullmatch(r"w_transnormer_h_(\d+)_.*lrpe_theta", name))
    }
    places = {"first": {0}, "rest": set(range(1, depth)), None: set()}
    where = next(name for name, layers in places.items() if layers == rotating)
    model = TransNormer(
        config["vocab"], config["n_embd"], heads, depth,
        config["ffn_mult"] * config["n_embd"], lrpe=where,
    )
    params = {"embed": {"embedding": case["w_lm_head_weight"]}}
    for n in range(depth):
        at = f"w_transnormer_h_{n}_"
        fused = np.split(case[f"{at}token_mixer_qkvu_proj_weight"], 4)
        mixer = dict(zip("qkvu", map(_linear, fused)))
        mixer["out"] = _linear(case[f"{at}token_mixer_out_proj_weight"])
        if n in rotating:
            mixer["theta"] = case[f"{at}token_mixer_lrpe_theta"][:, 0]
        linear = lambda i: _linear(case[f"{at}channel_mixer_l{i}_weight"])
        params[f"mixers_{n}"] = mixer
        params[f"channels_{n}"] = {"v": linear(1), "u": linear(2), "out": linear(3)}
    tokens = jnp.asarray(case["tokens"], jnp.int32)
    logits = jax.jit(model.apply)({"params": params}, tokens)
    return {"logits": logits, "slopes": slopes(heads)}


def _linear(weight: np.ndarray) -> dict[str, np.ndarray]:
    """A torch weight [out,in] as parameters of a Dense."""
    return {"kernel": weight.T}
