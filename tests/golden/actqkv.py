"""Adapter for actqkv.npz: the probe and its blocks, budgets of layers, statistics."""

from __future__ import annotations

from typing import Any, Mapping

import jax.numpy as jnp
import numpy as np

from attn.cache import probes


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which part it is, its arrays say."""
    config = case["config"]
    f = next(f for word, f in (
        ("history", budget), ("repr_topk", probe), ("count_upper", running))
        if word in config)
    return {name: np.asarray(a) for name, a in f(case, config).items()}


def budget(case, config):
    eta = np.asarray(case["H_normalized"], np.float64)
    held: list[list[float]] = [[] for _ in range(config["L"])]
    out = []
    for row in eta:
        pool, given = config["initial_budget"], []
        for layer, x in enumerate(row):
            held[layer] = [*held[layer], float(x)][-config["history"]:]
            warm = all(len(own) >= config["history"] for own in held)
            means = [np.mean(own) if own else 0.0 for own in held]
            given.append(probes.shares(
                means, layer, pool, config["tok_K_min"], config["tok_K_max"], warm))
            pool -= given[-1]
        out.append(given)
    return {"k_per_layer": np.array(out)}


def probe(case, config):
    q = jnp.asarray(case["window_q"])
    flat = q.reshape(1, q.shape[0], -1)
    w, p = probes.probe(flat)
    keys = jnp.repeat(jnp.asarray(case["keys"]), config["H"] // config["K"], 2)
    z = probes.represented(
        jnp.moveaxis(keys, 2, 1), jnp.asarray(case["local_score"]),
        config["repr_topk"])
    scores = probes.block_scores(z[None], p)[0]
    whole, share = probes.entropy(scores)
    return {"weights": w[0], "probe": p[0], "mean_probe": flat[0].mean(0),
            "block_repr": z, "scores": scores, "entropy": whole, "entropy_norm": share}


def running(case, config):
    state, devs = None, []
    for h in jnp.asarray(case["h"]):
        state, dev = probes.running(state, h, config["count_upper"])
        devs.append(dev)
    return {"dev": np.stack(devs), "final_mean": state.mean[None],
            "final_var": state.var[None]}
