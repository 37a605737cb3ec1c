"""Adapter for retrievalhead.npz: scores of given rows, and two masks of heads."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn import maps
from attn.contract.view import Site, replaced
from attn.softmax import Softmax
from experiments.measure.heads import retrieval_score


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    config = case["config"]
    return masks(case, config) if "q" in case.keys() else score(case, config)


def score(case, config):
    rows = jnp.asarray(case["attn_last_row"])  # [steps,L,H,P+steps]
    size, k = config["prompt"], config["topk"]
    own = []
    for t in range(rows.shape[0]):
        # row t has P + t keys
        row = jnp.where(jnp.arange(rows.shape[3]) < size + t, rows[t], 0)
        top = maps.argmax(row)[..., None] if k == 1 else maps.top(row, k)
        own.append(np.asarray(top))  # [L,H,k]
    found = retrieval_score(np.stack(own), np.asarray(case["prompt_ids"]),
                            np.asarray(case["generated"]), tuple(config["needle"]))
    return {"score": found}


def masks(case, config):
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    heads = jnp.zeros((q.shape[2], 1), bool).at[jnp.array(config["heads"])].set(True)
    call, nothing = jax.jit(Softmax()), Site(heads, 0.0)
    out = call(q, k, v)
    found = {"out": out, "out_masked_zero": replaced(out, nothing),
             "out_masked_uniform_official": call(replaced(q, nothing), k, v)}
    return {name: np.asarray(a) for name, a in found.items()}
