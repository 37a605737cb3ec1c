"""Regression in closed form: what heads of attention are held against.

Predictors f [B] for prompts of examples (x, y) and a query x (see
`experiments/data/regression.py`), and the theory of the reduced model of In-Context
Linear Regression Demystified, two scalars a head: KQ_h = diag(w_h I, 0) and OV_h = (0,
mu_h), in the form of the authors' code. s2 is the variance of the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.regression import Prompts, Regression


def split(prompts: Prompts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B,L,d], y [B,L] and the query's x [B,d]."""
    z = prompts.examples
    return z[..., :-1], z[..., -1], prompts.query[:, :-1]


def reduced(w: jax.Array, mu: jax.Array, prompts: Prompts) -> jax.Array:
    """f = sum_h mu_h sum_l y_l softmax_l(w_h x_l.x_q); w, mu [H]."""
    x, y, x_q = split(prompts)
    logits = jnp.einsum("h,bld,bd->bhl", w, x, x_q)
    return jnp.einsum("h,bhl,bl->b", mu, jax.nn.softmax(logits), y)


def descent(prompts: Prompts) -> jax.Array:
    """One step of gradient descent from zero, of size 1: sum_l y_l x_l.x_q / L."""
    x, y, x_q = split(prompts)
    return jnp.einsum("bl,bld,bd->b", y, x, x_q) / y.shape[1]


def debiased(prompts: Prompts) -> jax.Array:
    """The same with x_l less their mean over the prompt: the predictor that a pair of
    heads (w, -w), (mu, -mu) tends to for small w, with a step of 2 mu w."""
    x, y, x_q = split(prompts)
    return jnp.einsum("bl,bld,bd->b", y, x - x.mean(1, keepdims=True), x_q) / y.shape[1]


def ridge(penalty: float, prompts: Prompts) -> jax.Array:
    """x_q.(X^T X + penalty I)^-1 X^T y. Penalty s2 d is Bayes' predictor, as beta has
    variance 1 / d; 0 is least squares."""
    x, y, x_q = split(prompts)
    gram = jnp.einsum("bli,blj->bij", x, x)
    gram += penalty * jnp.eye(x.shape[-1])[None]
    # solved by elimination: of a positive definite matrix no pivot is 0, and thousands
    # of matrices of 5 rows are no work for a library's call each
    rows = jnp.concatenate([gram, jnp.einsum("bli,bl->bi", x, y)[..., None]], -1)
    for n in range(x.shape[-1]):
        own = rows[:, n] / rows[:, n, n, None]  # [B,d+1]
        rows = (rows - rows[:, :, n, None] * own[:, None]).at[:, n].set(own)
    return jnp.einsum("bi,bi->b", rows[..., -1], x_q)


def curvature(w: jax.Array, dim: int, length: int, s2: float) -> jax.Array:
    """A [H,H] = w w^T + (1 + s2) / L exp(d w w^T), elementwise."""
    both = jnp.outer(w, w)
    return both + (1 + s2) / length * jnp.exp(dim * both)


def approximate_loss(w: jax.Array, mu: jax.Array, dim: int, length: int,
                     s2: float) -> jax.Array:
    """1 + s2 - 2 mu.w + mu^T A mu: the loss of the reduced model for many examples and
    |x_q|^2 near d."""
    return 1 + s2 - 2 * mu @ w + mu @ curvature(w, dim, length, s2) @ mu


def best_mu(w: jax.Array, dim: int, length: int, s2: float) -> jax.Array:
    """A^-1 w, where the approximate loss is least; finite for distinct w."""
    return jnp.linalg.solve(curvature(w, dim, length, s2), w)


def bayes_excess(dim: int, length: int, s2: float) -> float:
    """Excess risk of Bayes' predictor as d and L grow with xi = d / L:
    (s2 + (xi - 1) / xi + sqrt(4 s2 + (s2 + (1 - xi) / xi)^2)) / 2."""
    one = (length - dim) / dim  # (1 - xi) / xi
    return float((s2 - one + np.sqrt(4 * s2 + (s2 + one) ** 2)) / 2)


def moments(predict: Callable[[Prompts], jax.Array], data: Regression, key: jax.Array,
            batches: int, batch: int = 4000) -> jax.Array:
    """Means over prompts of f^2, f y and y^2 [3], with the clean answer y; of
    predictors f [...,B], a row [...,3] each."""
    def one(total, n):
        prompts = data.draw(jax.random.fold_in(key, n), batch)
        f = predict(prompts)
        y = jnp.broadcast_to(jnp.asarray(prompts.clean), f.shape)
        each = jnp.stack([f * f, f * y, y * y], -1)
        return total + each.mean(-2), None

    like = jax.eval_shape(predict, jax.eval_shape(lambda k: data.draw(k, batch), key))
    zeros = jnp.zeros((*like.shape[:-1], 3))
    return jax.lax.scan(one, zeros, jnp.arange(batches))[0] / batches


def excess(moments: np.ndarray, step: np.ndarray | float = 1.0) -> np.ndarray:
    """Excess risk of step f from its `moments` [...,3]."""
    square, both, own = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    return step**2 * square - 2 * step * both + own


def best_step(moments: np.ndarray) -> np.ndarray:
    """The multiple of a predictor whose excess risk is least."""
    square, both, _ = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    return both / square


def pattern(kq: np.ndarray, ov: np.ndarray) -> dict[str, np.ndarray]:
    """How near heads are to two scalars each, sorted by w: w and mu [H]; w_spread, the
    standard deviation along KQ's diagonal, off, the largest entry beside it, of the
    first d columns (the last one meets the query's 0, and is never learned), and
    ov_off, the largest entry of OV but mu, all [H]."""
    d = kq.shape[-1] - 1
    along = np.diagonal(kq[:, :d, :d], axis1=1, axis2=2)
    rest = np.abs(kq[:, :, :d] - np.eye(d + 1, d) * np.pad(along, [(0, 0), (0, 1)])
                  [..., None])
    found = {
        "w": along.mean(1), "mu": ov[:, -1], "w_spread": along.std(1),
        "off": rest.max((1, 2)), "ov_off": np.abs(ov[:, :-1]).max(1),
    }
    order = np.argsort(found["w"])
    return {name: a[order] for name, a in found.items()}
