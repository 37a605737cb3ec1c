"""Adapter for lasp2.npz: attentions over a mesh of W devices, and the states that their
shards leave, gather and send back.
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.parallel.sharding import over_mesh
from attn.recurrent.lasp import CarryIn, carry_in
from attn.recurrent.linear import inter_shard, recurrence, token_decays
from attn.recurrent.noncausal import noncausal
from attn.softmax import Softmax

# specs: outputs and gradients 2e-5, states 1e-5
GRADIENTS = ("dq", "dk", "dv")
STATES = ("local_states", "prefix_states", "local_dstates", "suffix_dstates")
TOLERANCE = dict.fromkeys(("out", *GRADIENTS), 2e-5) | dict.fromkeys(STATES, 1e-5)


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    config = case["config"]
    q, k, v, d_o = (jnp.asarray(case[name]) for name in ("q", "k", "v", "cotangent"))
    mesh = jax.make_mesh(
        (1, config["W"], 1), ("data", "seq", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[: config["W"]],
    )
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        if "slopes" not in case:
            found = _pulled(Softmax(axis="seq"), q, k, v, d_o)
        else:
            g = -jnp.asarray(case["slopes"])
            g = g if config["decay"] else None
            form = _masked if config["causal"] else _unmasked
            found = form(q, k, v, g, d_o)
        return {name: np.asarray(a) for name, a in found.items()}


def _pulled(f, q, k, v, d_o) -> dict[str, jax.Array]:
    o, back = jax.vjp(jax.jit(f), q, k, v)
    return dict(zip(("out", *GRADIENTS), (o, *back(d_o))))


def _masked(q, k, v, g, d_o) -> dict[str, jax.Array]:
    form = "." if g is None else "H"
    f = over_mesh(lambda *a: recurrence(*a, axis="seq")[1],
                  f"BTHD BTHD BTHV {form} -> BTHV", "seq")

    def states(q, k, v, g, d_o):
        local, _ = recurrence(q, k, v, g)
        total = None if g is None else g[None, :, None] * q.shape[1]
        factor = None if total is None else jnp.exp(total)
        handed = lambda m: carry_in(m, factor, None, "seq", alike=True).state
        before, back = jax.vjp(handed, local)
        decays = token_decays(g, q.shape[1])
        read = lambda p: inter_shard(q, decays, None, CarryIn(p, 1, None))
        (d_before,) = jax.vjp(read, before)[1](d_o)
        return tuple(a[None] for a in (local, before, d_before, *back(d_before)))

    outs = " ".join(["TBHDV"] * 4)
    f_states = over_mesh(states, f"BTHD BTHD BTHV {form} BTHV -> {outs}", "seq")
    found = _pulled(lambda q, k, v: f(q, k, v, g), q, k, v, d_o)
    return found | dict(zip(STATES, jax.jit(f_states)(q, k, v, g, d_o)))


def _unmasked(q, k, v, g, d_o) -> dict[str, jax.Array]:
    f = over_mesh(lambda *a: noncausal(*a, axis="seq"), "BTHD BSHD BSHV -> BTHV", "seq")

    def states(q, k, v, d_o):
        sums = lambda a, b: jnp.einsum("bthd,bthv->bhdv", a, b)
        local, d_local = sums(k, v), sums(q, d_o)
        every = lambda a: jax.lax.psum(a, "seq")
        return tuple(a[None] for a in (local, every(local), d_local, every(d_local)))

    outs = " ".join(["TBHDV"] * 4)
    f_states = over_mesh(states, f"BTHD BTHD BTHV BTHV -> {outs}", "seq")
    found = _pulled(f, q, k, v, d_o)
    return found | dict(zip(STATES, jax.jit(f_states)(q, k, v, d_o)))
