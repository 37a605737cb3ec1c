"""Adapter for essaformer.npz: the attention with its projections, and the network."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.essa import Essa
from attn.layers import MultiHead
from models.essaformer import ESSAformer

# the spec bounds the largest error over the largest value; these are the norms'
TOLERANCE = {"out": 2e-5, "dx": 5e-5}
BLOCKS = {"up": "high", "down": "low"}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    form = _network if "w_conv_first_weight" in case else _attention
    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(a) for name, a in form(case).items()}


def _projections(case, name: str) -> dict[str, Any]:
    """q, k, v and out of `MultiHead` with one head."""
    weights = np.split(case[f"{name}lnqkv_weight"], 3)
    biases = np.split(case[f"{name}lnqkv_bias"], 3)
    own = {
        n: {"kernel": w.T[:, None], "bias": b[None]}
        for n, w, b in zip("qkv", weights, biases)
    }
    own["out"] = {
        "kernel": case[f"{name}ln_weight"].T[None], "bias": case[f"{name}ln_bias"]
    }
    return own


def _attention(case):
    layer = MultiHead(Essa(), heads=1, position=None, use_bias=True)
    params = {"params": jax.tree.map(jnp.asarray, _projections(case, "w_"))}
    out, back = jax.vjp(jax.jit(layer.apply), params, jnp.asarray(case["x"]))
    grads, dx = back(jnp.asarray(case["cotangent"]))
    grads = grads["params"]
    joined = lambda name: np.concatenate([grads[n][name].T.reshape(
        case["x"].shape[-1], -1) for n in "qkv"])
    return {
        "out": out, "dx": dx, "dw_lnqkv_weight": joined("kernel"),
        "dw_lnqkv_bias": joined("bias")[:, 0],
        "dw_ln_weight": grads["out"]["kernel"][0].T,
        "dw_ln_bias": grads["out"]["bias"],
    }


def _conv(case, name: str) -> dict[str, Any]:
    kernel = case[f"w_{name}_weight"].transpose(2, 3, 1, 0)
    return {"conv": {"kernel": kernel, "bias": case[f"w_{name}_bias"]}}


def _refine(case, way: str) -> dict[str, Any]:
    at = f"blockup_conv{way}_"
    convs = zip(("first", "second", "third"), (0, 3, 6))
    own = {n: _conv(case, f"{at}conv{way[0]}_{i}") for n, i in convs}
    own["attention"] = _projections(case, f"w_{at}attn_")
    own["norm"] = {
        "scale": case[f"w_{at}norm_weight"], "bias": case[f"w_{at}norm_bias"]
    }
    return own


def _resize(case, way: str) -> dict[str, Any]:
    names = [n for n in case if n.startswith(f"w_blockup_conv{way}sample_")]
    at = sorted({n.rpartition("_")[0].removeprefix("w_") for n in names})
    return {f"conv_{n}": _conv(case, name) for n, name in enumerate(at)}


def _network(case):
    config = case["config"]
    model = ESSAformer(config["upscale"], config["dim"])
    params = {own: _refine(case, way) for way, own in BLOCKS.items()}
    params |= {way: _resize(case, way) for way in BLOCKS}
    params |= {n: _conv(case, f"conv_{n}") for n in ("first", "last")}
    params = {"params": jax.tree.map(jnp.asarray, params)}
    last, first = (lambda a: jnp.moveaxis(a, 1, -1)), (lambda a: jnp.moveaxis(a, -1, 1))
    f = jax.jit(lambda x: first(model.apply(params, last(x))))
    out, back = jax.vjp(f, jnp.asarray(case["x"]))
    return {"out": out, "dx": back(jnp.asarray(case["cotangent"]))[0]}
