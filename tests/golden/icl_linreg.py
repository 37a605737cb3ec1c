"""Adapter for icl-linreg.npz: the layer of heads, its effective matrices, and the
closed forms.

Weights lie as linear layers of the authors' framework have them, [out,in]; head h has
rows h D to (h + 1) D of q, k and v, and those columns of o.
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.regression import Prompts
from experiments.measure import regression
from experiments.training.regression_heads import Heads, softmax_answer

NAMES = ("q", "k", "v", "o")


# the spec's: 1e-5 in float32, which exact attention here computes its logits in, and
# 1e-10 for all that is in float64
TOLERANCE = {
    **dict.fromkeys(("out", "loss", "grad_z", *(f"{n}_proj.weight" for n in NAMES)),
                    1e-5),
    **dict.fromkeys((
        "KQ", "OV", "mu_star", "approx_loss_at_mu_star", "half_loss_rand",
        "grad_mu_half", "grad_omega_half", "est_tf", "est_gd", "est_dgd", "est_ridge",
        "ridge_asymptotic"), 1e-10),
}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All of it as one program."""
    config = case["config"]
    names = ("z", "zq", "yq", "omega", "mu_rand")
    with jax.enable_x64(True):
        given = {name: jnp.asarray(case[name]) for name in names}
        weights = {n: jnp.asarray(case[f"w/{n}_proj.weight"]) for n in NAMES}
        found = jax.jit(layer)(weights, given) | jax.jit(
            closed, static_argnums=1)(given, tuple(config[n] for n in (
                "d", "L", "noise_var")))
    found = {name: np.asarray(a) for name, a in found.items()}
    expected = regression.bayes_excess(config["d"], config["L"], config["noise_var"])
    return found | {"ridge_asymptotic": np.asarray(expected)}


def heads(weights) -> Heads:
    """Theirs as ours."""
    d = weights["q"].shape[1]
    q, k, v = (weights[n].reshape(-1, d, d) for n in "qkv")
    return Heads(q, k, v, weights["o"].reshape(-1, d))


def layer(weights, given):
    """Output, loss, gradients and effective matrices."""
    def loss(weights, z):
        own = heads(weights)
        f = softmax_answer(own.kq, own.ov, z, given["zq"][:, 0])
        return ((f - given["yq"][:, 0, 0]) ** 2).mean(), f[:, None, None]

    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (value, out), (grads, grad_z) = both(weights, given["z"])
    own = heads(weights)
    return {"out": out, "loss": value, "grad_z": grad_z, "KQ": own.kq, "OV": own.ov} | {
        f"gw/{n}_proj.weight": grads[n] for n in NAMES}


def closed(given, sizes):
    """The reduced model, its approximate loss, and the predictors."""
    w, mu = given["omega"], given["mu_rand"]
    half = lambda w, mu: regression.approximate_loss(w, mu, *sizes) / 2
    value, (by_w, by_mu) = jax.value_and_grad(half, (0, 1))(w, mu)
    star = regression.best_mu(w, *sizes)
    prompts = Prompts(given["z"], given["zq"][:, 0], given["yq"][:, 0, 0])
    dim, _, s2 = sizes
    step = 2 * 0.1 * 3  # 2 omega mu of the authors' one pair of heads
    return {
        "mu_star": star, "half_loss_rand": value, "grad_mu_half": by_mu,
        "grad_omega_half": by_w,
        "approx_loss_at_mu_star": regression.approximate_loss(w, star, *sizes),
        "est_tf": regression.reduced(w, star, prompts),
        "est_gd": step * regression.descent(prompts),
        "est_dgd": step * regression.debiased(prompts),
        "est_ridge": regression.ridge(s2 * dim, prompts),
    }
