"""Adapter for attention-at.npz: attention of a text, the perturbation of its scores,
and the loss that is trained on, in float64.
"""

from __future__ import annotations

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training import perturbed
from models.additive import AdditivePooling, weights

KINDS = {"at": "at", "iat": "repo"}
MODULES = {"attn.0": "hidden", "attn.2": "query", "out": "out"}
# the spec's, in float64
TOLERANCE = dict.fromkeys((
    "scores", "attn_clean", "logit_clean", "loss_clean", "loss_first", "grad_d",
    "r_adv", "attn_adv", "logit_adv", "loss_adv", "loss_total", "grad_h", "dir_normed",
    "d_value_first", *(f"{name}.{kind}" for name in MODULES
                       for kind in ("weight", "bias"))), 1e-9)


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Everything as one program."""
    config = case["config"]
    own = [n for n in case if n.startswith("w/")]
    with jax.enable_x64(True):
        given = {n: jnp.asarray(case[n]) for n in ("h", "mask", "label", "pos_weight")}
        params = {n[2:]: jnp.asarray(case[n]) for n in own}
        found = jax.jit(functools.partial(
            both, KINDS[config["kind"]], config["xi"], config["lam"]))(params, given)
        found = {name: np.asarray(a) for name, a in found.items()}
    if "dir_normed" in case:
        # differences between texts of the batch, of length 1 over the second of them;
        # they stand behind a gradient at zero, and drop out
        gap = found["scores"][:, None] - found["scores"][None]
        found["dir_normed"] = gap / np.maximum(
            np.linalg.norm(gap, axis=1, keepdims=True), 1e-12)
    return found


def tree(params):
    """Theirs as parameters of ours: kernels are [in,out]."""
    found: dict[str, dict] = {}
    for name, a in params.items():
        module, kind = name.rsplit(".", 1)
        found.setdefault(MODULES[module], {})[
            "kernel" if kind == "weight" else "bias"] = a.T
    return {"params": found}


def both(kind, eps, lam, params, given):
    """The clean pass, the perturbation, and the gradient of the total loss."""
    mask, label, weight = given["mask"], given["label"], given["pos_weight"][0, 0]
    module = AdditivePooling(params["attn.0.bias"].shape[0])

    def logit(params, h, scores):
        return module.apply(tree(params), h, scores, mask, method="pooled")

    def loss(params, h, scores):
        return perturbed.cross_entropy(logit(params, h, scores), label, weight)

    def scored(params, h):
        return module.apply(tree(params), h, method="scores")

    scores = scored(params, given["h"])
    g = jax.grad(loss, 2)(params, given["h"], scores)
    unit = perturbed.direction(kind, g, scores, mask)

    def total(params, h):
        return perturbed.total(functools.partial(loss, params, h), scored(params, h),
                               eps * unit, lam)

    value, (by_w, by_h) = jax.value_and_grad(total, (0, 1))(params, given["h"])
    moved = scores + eps * unit
    clean = loss(params, given["h"], scores)
    return {
        "scores": scores, "attn_clean": weights(scores, mask),
        "logit_clean": logit(params, given["h"], scores)[:, None],
        "loss_clean": clean, "loss_first": clean,
        "d_value_first": jnp.zeros_like(scores),  # at zero nothing is moved
        "grad_d": g, "r_adv": unit,
        "attn_adv": weights(moved, mask),
        "logit_adv": logit(params, given["h"], moved)[:, None],
        "loss_adv": loss(params, given["h"], moved), "loss_total": value,
        "grad_h": by_h, **{f"gw/{name}": a for name, a in by_w.items()},
    }
