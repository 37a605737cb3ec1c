"""Experts: each token's weighted sum, in float64, with gradients, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.experts import Experts
from models.feed import Feed
from tests.compiled import apply, init

X = jax.random.normal(jax.random.key(0), (2, 8, 12))
KINDS = {
    "softmax": Experts(20, 4, 2),
    "raw": Experts(20, 4, 3, renormalise=False, factor=1.5),
    "top": Experts(20, 4, 2, "top", bias=True, limit=0.5),
    "sigmoid": Experts(20, 8, 2, "sigmoid", groups=4, top_groups=2, factor=2.4,
                       shared=Feed(16)),
    "shared": Experts(20, 4, 1, shared=Feed(16), shared_gate=True),
}


def drawn(how):
    """Parameters away from zeros."""
    params = init(how.module(jnp.float32), jax.random.key(1), X)
    return jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(2), a.shape), params)


def exact(how, params, x):
    """Token by token, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)["params"]
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    silu = lambda a: a * sigmoid(a)
    out = np.zeros(x.shape)
    for at in np.ndindex(*x.shape[:2]):
        t = np.asarray(x[at], np.float64)
        logits = t @ p["router"]["kernel"] + p["router"].get("bias", 0)
        scores = sigmoid(logits) if how.score == "sigmoid" else (
            np.exp(logits) / np.exp(logits).sum())
        worth = scores + p.get("correction", 0)
        parts = worth.reshape(how.groups, -1)
        best = np.sort(parts, 1)[:, -2:].sum(1)
        closed = np.argsort(-best)[how.top_groups:]
        parts[closed] = -np.inf
        chosen = np.argsort(-parts.reshape(-1))[: how.top_k]
        w = scores[chosen]
        if how.renormalise or how.score == "top":
            w = w / w.sum()
        for n, weight in zip(chosen, w * how.factor):
            e = {k: a[n] for k, a in p["experts"].items()}
            gate, up = (t @ e[f"{c}_kernel"] + e.get(f"{c}_bias", 0)
                        for c in ("gate", "up"))
            if how.limit is None:
                y = silu(gate) * up
            else:
                gate = np.minimum(gate, how.limit)
                y = (np.clip(up, -how.limit, how.limit) + 1) * (
                    gate * sigmoid(how.steep * gate))
            out[at] += weight * (y @ e["out_kernel"] + e.get("out_bias", 0))
        if how.shared is not None:
            s = {k: a["kernel"] for k, a in p["shared"].items()}
            y = (silu(t @ s["gate"]) * (t @ s["up"])) @ s["out"]
            out[at] += y * (sigmoid(t @ p["shared_gate"]["kernel"])
                            if how.shared_gate else 1)
    return out


def close(a, b, bound=1e-5):
    a, b = (np.asarray(m, np.float64) for m in (a, b))
    assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_weighted_sum(kind):
    how = KINDS[kind]
    params = drawn(how)
    close(apply(how.module(jnp.float32), params, X), exact(how, params, X))


def test_gradients_are_those_of_the_sum_over_all_experts():
    """Every expert chosen: then it is dense, and its gradient is plain jnp's."""
    how = Experts(20, 3, 3)
    params = drawn(how)

    def dense(params, x):
        p = params["params"]
        w = jax.nn.softmax(x @ p["router"]["kernel"])
        e = p["experts"]
        gate, up = (jnp.einsum("bte,nef->btnf", x, e[f"{c}_kernel"])
                    for c in ("gate", "up"))
        y = jnp.einsum("btnf,nfe->btne", jax.nn.silu(gate) * up, e["out_kernel"])
        return (jnp.einsum("btn,btne->bte", w, y) ** 2).sum()

    def sparse(params, x):
        return (how.module(jnp.float32).apply(params, x) ** 2).sum()

    want, found = (jax.jit(jax.grad(f, (0, 1)))(params, X) for f in (dense, sparse))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "top"])
def test_a_mesh_changes_nothing(kind):
    how = KINDS[kind]
    layer, params = how.module(jnp.float32), drawn(how)

    def both(params, x):
        def f(params, x):
            y = layer.apply(params, x)
            return (y**2).sum(), y
        return jax.value_and_grad(f, (0, 1), has_aux=True)(params, x)

    want = jax.jit(both)(params, X)
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 4, 2), ("data", "seq", "model"), axis_types=kinds)
    with jax.set_mesh(mesh):
        found = jax.jit(both)(params, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("fields, words", [
    (dict(top_k=9), "top_k=9"), (dict(experts=0), "experts=0"),
    (dict(groups=3), "groups=3"), (dict(score="max"), "score='max'"),
    (dict(groups=2, top_groups=1, top_k=3), "top_k=3"),
    (dict(top_groups=2), "top_groups=2"),
])
def test_experts_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        Experts(**{"hidden": 4, "experts": 4, "top_k": 2} | fields)
