"""Adapter for flexprefill.npz: the pattern step by step, and attention by it."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.flexprefill import FlexPrefill
from attn.sparse import block_scores

# specs/flexprefill.md: sums 1e-5, mask exact, out 2e-5
TOLERANCE = {"out": 2e-5}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The pattern of q [1,S,H,D], k, v [1,S,K,D], and the output."""
    config = case["config"]
    most = config["max_budget"]
    attention = FlexPrefill(
        block=config["block"], gamma=config["gamma"], tau=config["tau"],
        min_budget=config["min_budget"], capacity=None,
        max_budget=most if most < 2**31 - 1 else None,
    )
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    found = jax.jit(attention.pattern)(q, k)
    out = {
        "vertical_token": found.vertical, "slash_token": found.slash,
        "vertical_block": block_scores.summed(found.vertical, attention.block),
        "slash_block": block_scores.summed(found.slash, attention.block),
        "sqrt_js": found.divergence, "query_aware": found.query_aware,
        "nv_tokens": found.columns, "ns_tokens": found.diagonals,
        "block_mask": found.active, "out": jax.jit(attention)(q, k, v),
    }
    return {name: np.asarray(a) for name, a in out.items()}
