"""Adapter for rat.npz: the layer between its norm and the sum with its input."""

from __future__ import annotations

from typing import Any, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.layers import MultiHead
from attn.rat import RAT

TOLERANCE = {"out": 2e-5, "dx": 2e-5}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    config = case["config"]
    e, h, groups = config["E"], config["H"], config["G"]
    d = e // h
    layer = MultiHead(RAT(chunk=config["chunk"]), heads=h, position=None)
    # the authors' rows of the input projection: z, v, g, then the groups of q and of k
    cuts = np.cumsum([e, e, e, groups * d])
    heads = lambda w: jnp.tile(w.reshape(-1, d, e), (h * d // len(w), 1, 1))

    def forward(weights, x):
        z, v, g, q, k = (
            jnp.moveaxis(heads(w), 2, 0) for w in jnp.split(weights["in_proj"], cuts)
        )
        params = {n: {"kernel": a} for n, a in zip("qkv", (q, k, v))}
        params["gate"] = {"kernel": z}
        params["out"] = {"kernel": weights["out_proj"].T.reshape(h, d, e)}
        params["attention"] = {
            "gate": {"kernel": g}, "gate_bias": weights["gate_bias"].reshape(h, d)
        }
        norm = nn.RMSNorm(epsilon=config["rms_eps"])
        u = norm.apply({"params": {"scale": weights["input_norm"]}}, x)
        return x + layer.apply({"params": params}, u)

    names = {
        "in_proj": "in_proj_weight", "out_proj": "out_proj_weight",
        "input_norm": "input_norm_weight", "gate_bias": "gate_bias",
    }
    weights = {n: jnp.asarray(case[f"w_{name}"]) for n, name in names.items()}
    with jax.default_matmul_precision("highest"):
        out, back = jax.vjp(jax.jit(forward), weights, jnp.asarray(case["x"]))
        grads, dx = back(jnp.asarray(case["cotangent"]))
    found = {"out": out, "dx": dx}
    found |= {f"dw_{name}": grads[n] for n, name in names.items()}
    return {name: np.asarray(a) for name, a in found.items()}
