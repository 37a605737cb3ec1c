"""Adapter for lightnet.npz: the recurrence, the one scan, the layer, and the places."""

from __future__ import annotations

from typing import Any, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.grid import MDLRPE, along, coordinates
from attn.layers import MultiHead
from attn.lightnet import LightNet

# the spec's: 1e-5, the layer 2e-5
TOLERANCE = {"out": 1e-5, "dq": 1e-5, "dk": 1e-5, "dv": 1e-5, "dx": 2e-5}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    kind = case["config"]["kind"]
    if "MD-TPE" in kind:
        return _mdtpe(case)
    if "MD-LRPE" in kind:
        return _mdlrpe(case)
    return _module(case) if "x" in case else _core(case)


def _core(case) -> dict[str, np.ndarray]:
    causal = "bidirectional" not in case["config"]["kind"]
    attention = LightNet(causal=causal, scale=1.0, activation=None)
    args = [jnp.asarray(case[n], jnp.float32) for n in "qkv"]
    cotangent = jnp.asarray(case["cotangent"], jnp.float32)

    @jax.jit
    def both(*args):
        out, back = jax.vjp(attention, *args)
        return out, *back(cotangent)

    found = dict(zip(("out", "dq", "dk", "dv"), both(*args)))
    # the last token of a stream holds what all tokens without order share out
    stream = LightNet(scale=1.0, activation=None)
    state, _ = jax.jit(stream.step)(stream.init_state(99, *args), *args)
    found |= {"final_state": state.memory, "final_logz": state.z}
    return {name: np.asarray(a) for name, a in found.items()}


def _module(case) -> dict[str, np.ndarray]:
    config = case["config"]
    heads, e = config["num_heads"], config["hidden"]
    layer = MultiHead(
        LightNet(), heads, head_dim=config["expand_ratio"], value_dim=e // heads,
        position=None, out_norm="all", out_gate="silu",
        gate_rank=config["gate_low_rank"],
    )
    weight = lambda name: jnp.asarray(case[f"w_{name}_weight"])
    split = lambda name: {"kernel": weight(name).T.reshape(-1, heads, e // heads)}
    params: dict[str, Any] = {n: split(f"{n}_proj") for n in "qkv"}
    params["gate_down"] = {"kernel": weight("g_proj_0").T}
    params["gate"] = split("g_proj_1")
    params["out_norm"] = {"scale": weight("g_norm").reshape(heads, -1)}
    params["out"] = {"kernel": weight("o_proj").T.reshape(heads, -1, e)}

    @jax.jit
    def both(x):
        out, back = jax.vjp(lambda x: layer.apply({"params": params}, x), x)
        return out, *back(jnp.asarray(case["cotangent"]))

    out, dx = both(jnp.asarray(case["x"]))
    return {"out": np.asarray(out), "dx": np.asarray(dx)}


def _mdtpe(case) -> dict[str, np.ndarray]:
    @jax.jit
    def per_axis(x, q, k, decay):
        split = x.reshape(*x.shape[:-1], q.shape[1], -1)
        return jnp.stack([
            along(split, a, (q[a] * k[a]).sum(-1), decay[a]).reshape(x.shape)
            for a in range(x.ndim - 2)
        ])

    arrays = (jnp.asarray(case[n], "f4") for n in ("x", "q", "k", "log_decay"))
    each = np.asarray(per_axis(*arrays))
    return {"out_per_axis": each, "out_sum": each.sum(0)}


def _mdlrpe(case) -> dict[str, np.ndarray]:
    config, theta = case["config"], jnp.asarray(case["theta"], jnp.float32)
    position = MDLRPE(tuple(config["dims"]), extra=config["l"])
    x = jnp.asarray(case["x"], jnp.float32).swapaxes(1, 2)
    pos = jnp.arange(x.shape[1])[None]
    turn = jax.jit(nn.apply(lambda m, x: m.rotate(x, pos), position))
    out = turn({"params": {"theta": theta}}, x)
    at = coordinates(pos[0], position.dims, position.extra)
    angles = at[None, :, :, None] * theta[:, None, None]
    angles = angles.reshape(*angles.shape[:2], -1)
    return {
        "out": np.asarray(out.swapaxes(1, 2)),
        "angles": np.asarray(angles[..., : x.shape[-1]]),
    }
