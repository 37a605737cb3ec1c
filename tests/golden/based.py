"""Adapter for based.npz: the layer, its core, the convolution, the window, the data."""

from __future__ import annotations

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.baseconv import BaseConv
from attn.based import Based, features
from attn.masks import Causal, Window
from attn.softmax import Softmax
from experiments.data import mqar


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    if "inputs" in case:
        form: Callable = _recall
    elif "w_conv_conv_weight" in case:
        form = _convolution
    else:
        form = _layer if "x" in case else _core
    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(a) for name, a in form(case).items()}


def _core(case):
    """Taylor attention, or, where the config has a window, softmax over it."""
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    config = case["config"]
    attention: Any = Based(eps=config.get("eps", 0.0))
    if "left" in config:
        attention = Softmax(mask=Causal() & Window(config["left"]))
    o, back = jax.vjp(jax.jit(attention), q, k, v)
    out = {"out": o}
    out.update(zip(("dq", "dk", "dv"), back(jnp.asarray(case["cotangent"]))))
    if "phi_q" in case:
        out["phi_q"] = features(q[:, : case["phi_q"].shape[1]])
    return out


def _layer(case):
    x, config = jnp.asarray(case["x"]), case["config"]
    attention = Based(eps=config["eps"])
    heads = lambda name, x: (x @ case[f"w_proj_{name}_weight"].T).reshape(
        *x.shape[:2], config["num_heads"], -1
    )

    def layer(x):
        o = attention(*(heads(name, x) for name in "qkv"))
        return o.reshape(*x.shape[:2], -1) @ case["w_out_proj_weight"].T

    o, back = jax.vjp(jax.jit(layer), x)
    q, k, v = (heads(name, x) for name in "qkv")
    empty = attention.init_state(x.shape[1], q, k, v)
    state, _ = jax.jit(attention.step)(empty, q, k, v)
    sums = state.memory.swapaxes(2, 3)[:, :, None]  # [B,H,1,V+1,P]
    return {
        "out": o, "dx": back(jnp.asarray(case["cotangent"]))[0],
        "state_kv": sums[:, :, :, :-1], "state_k": sums[:, :, :, -1:],
    }


def _convolution(case):
    x, config = jnp.asarray(case["x"]), case["config"]
    layer = BaseConv(kernel=config["kernel_size"], expand=config["expand_proj"])
    dense = lambda name: {
        "kernel": case[f"w_{name}_proj_weight"].T, "bias": case[f"w_{name}_proj_bias"]
    }
    weight = case["w_conv_conv_weight"][:, 0].T  # [C,1,W], last tap the token itself
    params = {"in": dense("in"), "out": dense("out"), "conv": weight}
    o, back = jax.vjp(jax.jit(lambda x: layer.apply({"params": params}, x)), x)
    return {"out": o, "dx": back(jnp.asarray(case["cotangent"]))[0]}


def _recall(case):
    config = case["config"]
    inputs, labels = mqar(
        config["vocab_size"], config["num_examples"], config["input_seq_len"],
        config["num_kv_pairs"], config["power_a"], config["seed"],
        random_non_queries=False, passes=config.get("num_passes", 1),
    )
    return {"inputs": inputs, "labels": labels}
