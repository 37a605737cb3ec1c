"""Adapter for pointer.npz: the network in float64 with all gradients, and the data."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import points as data
from models.pointernet import PointerNet

# the spec's, of float64; lengths of tours and areas are the data's own
TOLERANCE = {name: 1e-9 for name in (
    "logits", "log_probs", "loss", "enc_out", "dec_out", "grad_points")}
TOLERANCE |= {"tsp_len": 1e-12, "hull_area": 1e-12, "hull": 0.0, "delaunay": 0.0,
              "tsp_tour": 0.0}
LEARNED = {"W1": "w1", "W2": "w2", "v": "v", "start": "start", "end": "end",
           "c0": "cell"}
LSTMS = {"enc": "encoder", "dec": "decoder"}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    if case["config"]["kind"] == "data":
        return _data(case["points"], case["delaunay"].shape[1])
    with jax.enable_x64(True):
        return {name: np.asarray(a) for name, a in _model(case).items()}


def _model(case):
    model = PointerNet(case["config"]["hidden"])
    params: dict[str, Any] = {ours: case[name] for name, ours in LEARNED.items()}
    for name, ours in LSTMS.items():
        biases = [case[f"{name}/bias_{kind}_l0"] for kind in ("ih", "hh")]
        params[ours] = {
            "inputs": case[f"{name}/weight_ih_l0"].T,
            "hidden": case[f"{name}/weight_hh_l0"].T, "bias": sum(biases)}
    params = {"params": jax.tree.map(jnp.asarray, params)}
    points, targets = (jnp.asarray(case[n]) for n in ("points", "targets"))

    def loss(params, points):
        logits, kept = model.apply(
            params, points, targets, capture_intermediates=_decoded,
            mutable=["intermediates"])
        logp = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logp, targets[..., None], 2)
        decoded = kept["intermediates"]["decoder"]["__call__"][0][1]
        return -own.mean(), (logits, logp, decoded)

    f = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, (logits, logp, decoded)), (grads, dpoints) = f(params, points)
    encoded = model.apply(params, points, method="encode")
    grads, found = grads["params"], {
        "logits": logits, "log_probs": logp, "loss": total, "grad_points": dpoints,
        "enc_out": encoded.memory, "dec_out": decoded}
    found |= {f"g{name}": grads[ours] for name, ours in LEARNED.items()}
    for name, ours in LSTMS.items():
        own = grads[ours]
        found |= {f"g{name}/weight_ih_l0": own["inputs"].T,
                  f"g{name}/weight_hh_l0": own["hidden"].T}
        # both biases are one here
        found |= {f"g{name}/bias_{kind}_l0": own["bias"] for kind in ("ih", "hh")}
    return {name: a for name, a in found.items() if name in case}


def _decoded(module, method) -> bool:
    return module.name == "decoder" and method == "__call__"


def _data(points, most: int):
    n = points.shape[1]
    hulls = [data.hull(one) for one in points]
    triangles = [data.delaunay(one) for one in points]
    lengths, tours = data.held_karp(points)
    padded = np.zeros((len(points), most, 3), int)
    for row, found in zip(padded, triangles):
        row[:len(found)] = found
    return {
        "hull": np.array([np.pad(one, (0, n + 1 - len(one))) for one in hulls]),
        "hull_area": np.array([data.area(p[one - 1]) for p, one in zip(points, hulls)]),
        "delaunay": padded, "tsp_len": lengths, "tsp_tour": tours,
    }
