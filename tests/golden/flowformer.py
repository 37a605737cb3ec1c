"""Adapter for flowformer.npz: the projections, the attention, and their gradients."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.flow import Flow

# specs: outputs 2e-5, gradients 5e-5
TOLERANCE = {"core_out": 2e-5, "out": 2e-5, "dxq": 5e-5, "dxkv": 5e-5}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    config = case["config"]
    attention = Flow(causal="Causal" in config["kind"], eps=config["eps"])
    heads = case["q_proj"].shape[2]
    xkv = case.get("xkv")
    inputs = [jnp.asarray(a) for a in (case["xq"], xkv) if a is not None]

    def linear(name, x):
        weight = jnp.asarray(case[f"w_{name}_projection_weight"])
        bias = jnp.asarray(case[f"w_{name}_projection_bias"]).reshape(1, 1, -1)
        return x @ weight.T + bias

    def forward(*inputs):
        xq, xkv = inputs[0], inputs[-1]
        named = (("query", xq), ("key", xkv), ("value", xkv))
        split = [linear(n, x).reshape(*x.shape[:2], heads, -1) for n, x in named]
        o = attention(*split)
        return linear("out", o.reshape(*o.shape[:2], -1)), (*split, o)

    with jax.default_matmul_precision("highest"):
        out, back, more = jax.vjp(jax.jit(forward), *inputs, has_aux=True)
        grads = back(jnp.asarray(case["cotangent"]))
    found = dict(zip(("q_proj", "k_proj", "v_proj", "core_out"), more)) | {"out": out}
    found |= dict(zip(("dxq", "dxkv"), grads))
    return {name: np.asarray(a) for name, a in found.items()}
