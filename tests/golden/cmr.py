"""Adapter for cmr.npz: what tokens read of a buffer, and every gradient."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.cmr import Buffer, read


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Steps 2 to 4; the relevance is given."""
    config = case["config"]
    names = ("Wq", "Wk", "Wv", "Wl", "Wo", "Wg", "bg")
    w = {name: jnp.asarray(case[f"w_{name}"]) for name in names}
    h, mem, rho = (jnp.asarray(case[name]) for name in ("h", "mem", "mem_rel"))
    at = jnp.where(case["mem_valid"], jnp.asarray(case["mem_pos"], jnp.int32), -1)
    pos = config["segment_start"] + jnp.arange(h.shape[1], dtype=jnp.int32)
    pos = jnp.broadcast_to(pos[None], h.shape[:2])

    def f(h, mem, w):
        found = read(h, Buffer(mem, at, rho), rho, pos, w, config["decay"],
                     config["rms_eps"])
        return found.out, found

    out, back, found = jax.vjp(f, h, mem, w, has_aux=True)
    dh, dmem, dw = back(jnp.asarray(case["cotangent"]))
    results = {"out": out, "reconstruction": found.r, "layer_weights": found.a,
               "gate": found.gate, "grad_h": dh, "grad_mem": dmem}
    results |= {f"grad_{name}": dw[name] for name in names}
    return {name: np.asarray(a) for name, a in results.items()}
