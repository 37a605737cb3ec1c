"""Adapter for act.npz: logits with a boost of some columns, their sinks, the output."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.act import ACT


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The boost is a bias: what the stored logits are beside scale q.k."""
    config = case["config"]
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    s = q.shape[1]
    plain = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    seen = np.tri(s, dtype=bool)[None, None]
    bias = jnp.where(seen, jnp.asarray(case["logits_causal"]) - plain, 0)
    act = ACT(heads=tuple(config["heads"]), beta=config["beta"],
              threshold=config["threshold"])
    received, _ = act.found(q, k, bias=bias)
    heads, rows = jnp.arange(q.shape[2]), jnp.arange(s)
    # before the first one is left alone
    every = ACT(threshold=config["threshold"], first="token0")
    detected = every.found(q, k, bias=bias)[1]
    first = (received[..., :1] > config["threshold"])
    detected = jnp.concatenate([first, detected[..., 1:]], -1)
    found = {
        "out": jax.jit(act)(q, k, v, bias=bias),
        "attn": act._few_rows(q, k, act._where(q, k, None), heads, rows, bias)[0],
        "attn_calibrated": act.weights(q, k, v, heads, rows, bias=bias),
        "avg_received": received, "detected": detected,
    }
    return {name: np.asarray(a) for name, a in found.items()}
