"""Adapter for combiner.npz: every plan with its gradients."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.combiner import Combiner

# specs/combiner.md section 7: float32 1e-5
TOLERANCE: dict[str, float] = {}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    form = (lambda c: {}) if "x" in case else _plans
    return {name: np.asarray(a) for name, a in form(case).items()}


def _plans(case):
    q, k, v, do = (jnp.asarray(case[name]) for name in ("q", "k", "v", "cotangent"))
    config, found = case["config"], {}
    for plan in sorted({name.partition("/")[0] for name in case.keys() if "/" in name}):
        attention = Combiner(
            plan, config["block"], config["causal"], scale=config["scale"])
        out, back = jax.vjp(jax.jit(attention), q, k, v)
        names = ("out", "dq", "dk", "dv")
        found |= {f"{plan}/{n}": a for n, a in zip(names, (out, *back(do)))}
    return found
