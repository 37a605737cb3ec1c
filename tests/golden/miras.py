"""Adapter for miras.npz, of which the file here has the `fla/*` case only: the linear
recurrences that Miras starts from, as flash-linear-attention's references compute them.
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.recurrent.delta_rule import recurrence as delta_rule
from attn.recurrent.linear import recurrence

TOLERANCE = {"out": 2e-5, "state": 2e-5}  # the spec's, section 9


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs and last states of the six recurrences."""
    q, k, v, beta, g = (
        jnp.asarray(case[n]) for n in ("q", "k", "v", "beta", "log_decay")
    )
    by_channel = jnp.asarray(case["log_decay_channel"])
    retnet = jnp.asarray(case["retnet/log_decay"])
    scale = q.shape[-1] ** -0.5
    linear = lambda *decay: recurrence(q * scale, k, v, *decay, chunk=8)
    rule = lambda *decay: delta_rule(q, k, v, beta, *decay, scale=scale, chunk=8)
    forms = {
        "delta_rule": lambda: rule(),
        "gated_delta_rule": lambda: rule(g),
        "gla": lambda: linear(by_channel),
        "scalar_decay_linear_attention": lambda: linear(g),
        "retnet": lambda: linear(retnet),
        "linear_attention": lambda: linear(),
    }
    found = {}
    for name, form in forms.items():
        state, o = jax.jit(form)()
        found |= {f"{name}/out": np.asarray(o), f"{name}/state": np.asarray(state)}
    return found
