"""Adapter for sinklora.npz: shifted groups, groups with sinks, and the H2O cache that
answers with what they were trained for."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.exact.dense import values, weights
from attn.h2o import H2O, simulated
from attn.sinklora import SinkLoRA
from tests.golden.h2o_streaming import arrays, decoded, map_of


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    config = case["config"]
    f = next(f for word, f in (
        ("shift", groups), ("shifted_heads", sinks), ("heavy_budget", mask),
        ("heavy", cache)) if word in config)
    return {key: np.asarray(a) for key, a in f(case, config).items()}


def groups(case, config):
    q, k, v, do = arrays(case, ("q", "k", "v", "cotangent"))
    roll, flash = (SinkLoRA(config["group"], form=form, scale=config["scale"])
                   for form in ("roll", "flash"))
    o, back = jax.vjp(roll, q, k, v)
    return {"out_roll": o, "out_flash_semantics": flash(q, k, v),
            **dict(zip(("dq", "dk", "dv"), back(do)))}


def sinks(case, config):
    q, k, v = arrays(case)
    sf = SinkLoRA(config["group"], sinks=config["sink"], scale=config["scale"],
                  shifted=config["shifted_heads"])
    seen = sf.mask(q.shape[2])(*np.ogrid[:q.shape[2], :q.shape[1], :q.shape[1]])
    return {"out": sf(q, k, v), "mask": seen}


def cache(case, config):
    q, k, v = arrays(case)
    policy = H2O(
        heavy=config["heavy"], recent=config["recent"], scale=config["scale"])
    outs, pos, score = decoded(policy, q, k, v, config["prompt"], config["steps"])
    return {"out_prompt": outs[0][0], "kept_positions_after_step": pos,
            "out_steps": jnp.stack([o[0, 0] for o in outs[1:]]),
            "final_scores": score[-1:]}


def mask(case, config):
    q, k, v = arrays(case)
    p = map_of(q, k)
    heavy, recent = config["heavy_budget"], config["recent_budget"]
    seen = simulated(p, heavy, recent) & np.tri(q.shape[1], dtype=bool)[None, None]
    logit = jnp.einsum("bthd,bshd->bhts", q, k) * config["scale"]
    return {"heavy_mask": simulated(p, heavy), "mask": seen,
            "out": values(weights(logit, seen), v)}
