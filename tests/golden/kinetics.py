"""Adapter for kinetics.npz: costs, which keys are read, coverage."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.topk import TopK
from experiments import kinetics
from experiments.kinetics import Job, Model

TOLERANCE = {"rows": 1e-9}  # in float64, as the spec has it


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    config = case["config"]
    f = next(f for word, f in (
        ("L_in", costs), ("topk_block", kept), ("correct", coverage)) if word in config)
    return f(case, config)


def costs(case, config):
    job = Job(config["L_in"], config["L_out"], config["N"])
    rows = []
    for name, sizes in zip(case["models"], case["model_dims"]):
        m = Model(float(sizes[0]), *(int(n) for n in sizes[1:]))
        assert name not in kinetics.MODELS or kinetics.MODELS[str(name)] == m
        found = (
            kinetics.dense(m, job, config["I"]),
            kinetics.top_k(m, job, config["topk_budget"], config["I"]),
            kinetics.block_top_k(m, job, config["local"], config["block_size"],
                                 config["block_topk"], config["I"]))
        rows.append([n for cost in found for n in cost])
    return {"rows": np.array(rows)}


def kept(case, config):
    """Keys with one channel a position make any logits of single queries."""
    lens, s = np.asarray(case["lens"]), case["logits"].shape[2]
    h, heads = config["H"], config["K"]
    logits = np.where(np.isfinite(case["logits"]), case["logits"], 0)
    k = jnp.broadcast_to(jnp.eye(s)[None, :, None], (len(lens), s, heads, s))
    q = jnp.asarray(logits, jnp.float32)
    segments = jnp.asarray(np.arange(s) < lens[:, None], jnp.int32)
    wide = jnp.zeros((len(lens), s, h, s))
    out = {}
    for name, block, top in (("topk_keep", 1, config["topk"]),
                             ("block_keep", config["block_size"],
                              config["topk_block"])):
        policy = TopK(top_k=top, block=block, sink=config["sink"],
                      local=config["local"], scale=1.0)
        state, _ = jax.jit(policy.step)(
            policy.init_state(s, wide, k, k), wide, k, k, segments=segments)
        slots = np.asarray(policy.chosen_slots(state, q, jnp.asarray(lens)))
        mask = np.zeros(case["logits"].shape, bool)
        for b, head in np.ndindex(len(lens), h):
            own = slots[b, :, head // (h // heads)]
            mask[b, head, own[own >= 0]] = True
        out[name] = mask
    return out


def coverage(case, config):
    return {"coverage": np.array([
        kinetics.coverage(config["n"], config["correct"], k) for k in config["k"]])}
