"""Adapter for scansnap.npz: steps of gradient descent on texts, by the flow equations.

K1 and K2 are weights of linear layers [out,in]: K2[m,l] = Z[m,l], K1 = Y^T.
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training.one_layer import Rates, Texts, Weights, flow, loss, step

# the spec's: 2e-5 relative on weights, and so on what they give
TOLERANCE = dict.fromkeys(
    ("losses", "K1_final", "K2_final", "grad_K1_step1", "grad_K2_step1"), 2e-5)


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All steps in float32, the authors' type."""
    config, x, label = case["config"], case["x"], case["label"]
    check_facts(case, x, label)
    vocab = config["M"]
    counts = jax.nn.one_hot(x[..., :-1], vocab).sum(2)  # [steps,B,M]
    texts = Texts(counts, jnp.asarray(x[..., -1]), jnp.asarray(label))
    weights = Weights(jnp.asarray(case["K2_init"]), jnp.asarray(case["K1_init"]).T)
    rates = Rates(config["lr_z"], config["lr_y"], config["momentum"])
    normalise = config["normalize"]

    @jax.jit
    def train(weights):
        def one(carry, now):
            before = carry[0]
            found = loss(before, now, normalise), flow(before, now, normalise)
            return step(*carry, now, rates, normalise), found

        zeros = jax.tree.map(jnp.zeros_like, weights)
        return jax.lax.scan(one, (weights, zeros), texts)

    (last, _), (losses, pushes) = train(weights)
    return {
        "losses": losses, "K1_final": last.y.T, "K2_final": last.z,
        "grad_K1_step1": -pushes.y[1].T, "grad_K2_step1": -pushes.z[1],
    }


def check_facts(case, x, label) -> None:
    """Texts hold the tokens of their facts, whose probabilities add up to 1."""
    assert np.allclose(case["fact_probs"].sum(1), 1, atol=1e-5)
    here = case["fact_next"] == label[..., None]
    assert (here.sum(-1) == 1).all()
    fact = here.argmax(-1)
    assert (case["fact_last"][fact] == x[..., -1]).all()
    tokens = case["fact_tokens"][fact]  # [steps,B,n]
    assert (x[..., :-1, None] == tokens[..., None, :]).any(-1).all()
