"""Adapter for lamina.npz: attention in two parts, and what two pools cost."""

from __future__ import annotations

from typing import Any, Mapping

import jax.numpy as jnp
import numpy as np

from attn.exact.attend import attend
from attn.exact.dense import logits
from attn.exact.online import join, output, state_of
from experiments import offload

TOLERANCE = dict.fromkeys(("LLaMA_33B", "LLaMA_65B", "LLaMA3_70B"), 1e-6)


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    f = merge if "q" in case else costs
    return {name: np.asarray(a) for name, a in f(case).items()}


def merge(case):
    """What was there before is read when q arrives; the new token is joined later."""
    q, k, v, k_new, v_new = (jnp.asarray(case[name]) for name in (
        "q", "k_prev", "v_prev", "k_new", "v_new"))
    old, new = attend(q, k, v), attend(q, k_new, v_new)
    out = output(join(state_of(*old), state_of(*new)))
    return {"out_prev": old[0][:, 0], "lse_prev": old[1][..., 0],
            "logit_new": logits(q, k_new)[..., 0, 0], "out": out}


def costs(case):
    config, out = case["config"], {}
    fast, cheap = (offload.HARDWARE[name] for name in ("H100", "H20"))
    for name, info in config["info"].items():
        m, key = offload.MODELS[name], name.replace("-", "_")
        rows = [[batch, *offload.point(
            m, int(batch), config["l"], fast, cheap, tuple(info["dop"]),
            config["alpha"], mfu=config["MFU"], mbu=config["MBU"])]
            for batch in np.asarray(case[key])[:, 0]]
        out[key] = np.array(rows)
    return out
