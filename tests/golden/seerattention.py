"""Adapter for seerattention.npz: the gate, its target, loss, gradients and masks."""

from __future__ import annotations

import re
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.positions import RoPE
from attn.seer import Seer
from attn.sparse import block_gate

# specs/seerattention.md: 1e-5, gradients 1e-4
TOLERANCE = {"dq": 1e-4, "dk": 1e-4, "dWk": 1e-4, "dWq": 1e-4}


def _pools(name: str) -> tuple[str, ...]:
    return tuple(re.findall("max|min|avg", name))


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the gate says of unturned q [1,T,H,D] and k [1,T,K,D]."""
    config = case["config"]
    pool_q, pool_k = (_pools(part) for part in config["gate"].split("_"))
    fields = {
        "block": config["block"], "gate_dim": config["gate_dim"], "pool_q": pool_q,
        "pool_k": pool_k, "double": "W_q" in case, "rope": RoPE(config["rope_theta"]),
        "last_dense": config["last_block_dense"], "ratio": config["nz_ratio"],
    }
    best = Seer(**fields)
    above = Seer(**fields, threshold=config["threshold"], capacity=None)
    read = Seer(**fields, threshold=config["threshold"], capacity=None, diagonal=True)
    q, k, v = (jnp.asarray(case[name]) for name in ("q_nope", "k_nope", "v"))
    params = {"gate_k": jnp.asarray(case["W_k"])}
    if "W_q" in case:
        params["gate_q"] = jnp.asarray(case["W_q"])

    @jax.jit
    def all_of_it(params, q, k, v):
        def said(method, module=best):
            return module.apply({"params": params}, q, k, method=method)

        def loss(params, q, k):
            return best.apply({"params": params}, q, k, method="loss")

        value, (dw, dq, dk) = jax.value_and_grad(loss, (0, 1, 2))(params, q, k)
        turned = (best.rope.rotate(a, jnp.arange(q.shape[1])[None]) for a in (q, k))
        logits = said("logits")
        out = {
            "gate_logits": logits, "gate_probs": jax.nn.softmax(logits),
            "block_target": said("target"), "loss": value, "dq": dq, "dk": dk,
            "block_target_unnormalised": block_gate.block_maxima(
                *turned, best.block, None),
            "mask_threshold": said("mask", above), "mask_nz_ratio": said("mask"),
            "out_threshold_diag_on": read.apply({"params": params}, q, k, v),
            "dWk": dw["gate_k"],
        }
        return out | ({"dWq": dw["gate_q"]} if "gate_q" in dw else {})

    return {name: np.asarray(a) for name, a in all_of_it(params, q, k, v).items()}
