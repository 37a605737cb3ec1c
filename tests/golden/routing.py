"""Adapter for routing.npz: clusters, their attention, losses and moving centroids."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.routing import Routing
from attn.sparse import kmeans, routed
from attn.sparse.kmeans import Centroids

# specs/routing.md section 7: float32 2e-5, gradients 2e-4
TOLERANCE = {"out": 2e-5, "loss": 2e-5, "ema_means1": 2e-5, "means1": 2e-5,
             "one_kmeans_iteration": 2e-5, "dq": 2e-4, "dk": 2e-4, "dv": 2e-4}


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    form = _google if "q_cluster" in case else _lucidrains
    return {name: np.asarray(a) for name, a in form(case).items()}


def _applied(attention: Routing, centroids: Centroids, params, q, k, v):
    """(o, loss) and the centroids after the batch."""
    variables = {"centroids": {"kmeans": centroids._asdict()}, **params}
    o, after = attention.apply(variables, q, k, v, mutable=["centroids", "losses"])
    loss = after["losses"]["kmeans"]["commitment"][0]
    return (o, loss), Centroids(**after["centroids"]["kmeans"])


def _google(case):
    config = case["config"]
    q, k, v, do = (jnp.asarray(case[name]) for name in ("q", "k", "v", "cotangent"))
    share = config["share_qk"]
    attention = Routing(
        config["clusters"], config["window"], share_qk=share, causal=config["causal"],
        eps=config["scatter_eps"], decay=config["decay"], beta=config["beta"],
    )
    held = (case[name] for name in ("means", "ema_count0", "ema_means0"))
    centroids = Centroids(*map(jnp.asarray, held))

    @jax.jit
    def both(q, k, v):
        def f(q, k, v):
            return _applied(attention, centroids, {}, q, k, v)

        found, back, after = jax.vjp(f, q, k, v, has_aux=True)
        return found, back((do, jnp.ones(()))), after

    (out, loss), (dq, dk, dv), after = both(q, k, v)
    by_q, by_k = (kmeans.normalised(a, "layer") for a in (q, q if share else k))
    if not share:
        # the file's centroids follow the queries alone
        after = kmeans.follow(centroids, by_q, config["decay"], "layer")
    score, other = (kmeans.scores(a, centroids.mean) for a in (by_q, by_k))
    found = {
        "out": out, "loss": loss, "dq": dq, "dv": dv,
        "q_cluster": score.argmax(2), "k_cluster": other.argmax(2),
        "q_members_sorted": routed.members(score, config["window"]),
        "k_members_sorted": routed.members(other, config["window"]),
        "ema_count1": after.number, "ema_means1": after.total, "means1": after.mean,
    }
    case.get("k")
    return found if share else {**found, "dk": dk}


def _lucidrains(case):
    config = case["config"]
    q, k, v, mean = (jnp.asarray(case[name]) for name in ("q", "k", "v", "means"))
    memory = {n: jnp.asarray(case[f"mem_{m}"])
              for n, m in (("memory_k", "key"), ("memory_v", "value"))}
    size = memory["memory_k"].shape[2]
    share = config["shared_qk"]
    attention = Routing(
        config["clusters"], config["window"], share_qk=share, causal=config["causal"],
        norm="unit", memory=size, eps=1e-5, beta=config["commitment"],
    )
    centroids = Centroids(mean, jnp.zeros(mean.shape[:2]), mean)
    params = {"params": memory} if size else {}
    (out, loss), _ = _applied(attention, centroids, params, q, k, v)
    vectors = q if share else jnp.concatenate([q, k], 1)
    unit = kmeans.normalised(vectors, "unit")
    return {"out": out, "loss": loss,
            "one_kmeans_iteration": kmeans.iterated(unit, mean)}
