"""Adapter for autopasta.npz: the bias of a mask edit, and attention under it."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.pasta import Pasta, spans_of


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The call with marks, its weights, and those without."""
    config = case["config"]
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    pasta = Pasta(alpha=config["alpha"], heads=tuple(config["heads"]),
                  position=config["position"], spans="official")
    t, s, h = q.shape[1], k.shape[1], q.shape[2]
    marks = pasta.marks(spans_of(config["ranges"], s)[None], config["input_len"])
    steered = jnp.zeros((1, h)).at[0, jnp.array(config["heads"])].set(1)
    bias = pasta._bias(marks, steered)[:, :, None]
    seen = np.tri(s, dtype=bool)[None, None, s - t:]
    whole = jnp.arange(h), jnp.arange(t)
    found = {
        "out": jax.jit(pasta)(q, k, v, marks=marks),
        "attn_steered": pasta.weights(q, k, v, *whole, marks=marks),
        "attn_plain": pasta.weights(q, k, v, *whole),
        "bias_delta": jnp.where(seen, bias, 0),
    }
    return {name: np.asarray(a) for name, a in found.items()}
