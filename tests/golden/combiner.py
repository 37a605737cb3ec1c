"""Adapter for combiner.npz: every plan with its gradients."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.combiner import Combiner, RowMajor


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    form = _row_major if "x" in case else _plans
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


def _row_major(case):
    x = jnp.asarray(case["x"])
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, case[f"W{n}"], precision="highest")
               for n in "qkv")
    attention = RowMajor(case["config"]["block"])
    params = {
        "summary_out": {"kernel": case["W_summary_out"]},
        "summary_norm": {"scale": case["ln_scale"], "bias": case["ln_bias"]},
        "summary_key": {"kernel": case["W_summary_key"]},
    }
    out = jax.jit(attention.apply)({"params": params}, q, k, v, x=x)
    return {"out_before_final_projection": out}
