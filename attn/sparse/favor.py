"""FAVOR+ (Choromanski et al., 2020) arXiv:2009.14794: positive random features."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


class Directions:
    """What a linen module has whose features are of fixed random directions, made from
    its field `seed`: they are a variable, `fixed/directions`, which no optimiser sees.
    Its `_features(d)` says how many there are."""

    def redrawn(self: Any, time: int, d: int, heads: int | None = None) -> jax.Array:
        """The random directions [m,D], or [K,m,D] of K `heads`, after `time` redraws,
        for `fixed/directions`."""
        key = jax.random.fold_in(jax.random.key(self.seed), time)
        draw = functools.partial(projection, features=self._features(d), width=d)
        return draw(key) if heads is None else jax.vmap(draw)(
            jax.random.split(key, heads))

    def _directions(self: Any, d: int, heads: int | None = None) -> jax.Array:
        draw = functools.partial(self.redrawn, 0, d, heads)
        if self.is_initializing() or self.has_variable("fixed", "directions"):
            return self.variable("fixed", "directions", draw).value
        return draw()


def projection(key: jax.Array, features: int, width: int) -> jax.Array:
    """Rows of random directions that are orthogonal in groups of D = width, as long as
    normal ones are: [m,D] float32."""
    groups = -(-features // width)
    of_directions, of_lengths = jax.random.split(key)
    square = jax.random.normal(of_directions, (groups, width, width), jnp.float32)
    # rows [m,D], orthonormal in groups of D; then each as long as a normal vector
    rows = jnp.linalg.qr(square)[0].swapaxes(1, 2).reshape(-1, width)[:features]
    normal = jax.random.normal(of_lengths, (features, width), jnp.float32)
    return rows * jnp.linalg.norm(normal, axis=1, keepdims=True)


def projected(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """w.x [B,T,H,m] and |x|^2/2 [B,T,H,1] of x [B,T,H,D] D^-1/4, float32, whose
    difference is the logarithm of a feature; w [m,D], or [H,m,D] of each head."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    # exponentiated: their absolute error counts
    # [B,T,H,D] x [m,D] or [H,m,D] -> [B,T,H,m]
    s = jnp.einsum(
        "bthd,md->bthm" if w.ndim == 2 else "bthd,hmd->bthm", x, w,
        precision=jax.lax.Precision.HIGHEST)
    return s, (x * x).sum(-1, keepdims=True) / 2


def softmax_features(
    x: jax.Array, w: jax.Array, over: tuple[int, ...], real: jax.Array | None = None,
) -> jax.Array:
    """m^-1/2 (exp(w.x - |x|^2/2 - max) + 1e-4) of x [B,T,H,D] D^-1/4, whose products
    are near exp(q.k): [B,T,H,m]; the maximum is taken over the axes `over`. 0 where
    real [B,T] is False."""
    s, half = projected(x, w)
    if real is not None:
        s = jnp.where(real[..., None, None], s, -jnp.inf)
    # a constant: but for the 1e-4 beside it, it cancels in the quotient
    top = jax.lax.stop_gradient(s.max(over, keepdims=True))
    # where all is padding: exp(-inf - 0) = 0, and not -inf - -inf
    top = jnp.where(jnp.isfinite(top), top, 0)
    found = w.shape[0] ** -0.5 * (jnp.exp(s - half - top) + 1e-4)
    return found if real is None else jnp.where(real[..., None, None], found, 0)


def relu_features(x: jax.Array, w: jax.Array) -> jax.Array:
    """relu(w.x) + 1e-3 of x [B,T,H,D] D^-1/4: [B,T,H,m]."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    # [B,T,H,D] x [m,D] -> [B,T,H,m]
    return jax.nn.relu(jnp.einsum("bthd,md->bthm", x, w)) + 1e-3
