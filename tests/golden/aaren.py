"""Adapter for aaren.npz: softmax over prefixes, its states, and stacked attention."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.aaren import Aaren
from attn.exact.online import OnlineSoftmax
from attn.layers import MultiHead
from attn.recurrent.scan import merge, prefix_scan, prefix_softmax


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    form = _module if "x" in case.keys() else _core
    return {name: np.asarray(a) for name, a in form(case).items()}


def _core(case):
    s, v = (jnp.asarray(case[name], jnp.float32) for name in ("scores", "v"))
    if "valid" in case.keys():
        # what stands at padding is the answer over the tokens before it
        s = jnp.where(jnp.asarray(case["valid"])[..., None], s, -jnp.inf)

    @jax.jit
    def both(s, v, do):
        o, back = jax.vjp(lambda s, v: prefix_softmax(s, v, chunk=4)[1], s, v)
        leaves = OnlineSoftmax(s, (s > -jnp.inf).astype(s.dtype), v)
        return o, *back(do), *prefix_scan(merge, leaves, chunk=4)[1]

    found = both(s, v, jnp.asarray(case["cotangent"], jnp.float32))
    return dict(zip(("out", "dscores", "dv", *"muw"), found))


def _module(case):
    heads, x = case["config"]["heads"], jnp.asarray(case["x"], jnp.float32)
    layer, outs = MultiHead(Aaren(), heads, position=None), []
    apply = jax.jit(layer.apply)
    for n in range(case["layer_outs"].shape[0]):
        w = {name: np.asarray(case[f"l{n}_{name}"], np.float32)
             for name in ("q_token", "wq", "wk", "wv", "wo")}
        split = lambda a: a.reshape(*a.shape[:-1], heads, -1)
        params = {
            "attention": {"query": split(w["q_token"] @ w["wq"])},
            "k": {"kernel": split(w["wk"])}, "v": {"kernel": split(w["wv"])},
            "out": {"kernel": w["wo"].reshape(heads, -1, x.shape[-1])},
        }
        x = apply({"params": params}, x)
        outs.append(x)
    return {"layer_outs": jnp.stack(outs)}
