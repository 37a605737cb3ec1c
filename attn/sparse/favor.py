"""FAVOR+ (Choromanski et al., 2020) arXiv:2009.14794: positive random features."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def projection(key: jax.Array, features: int, width: int) -> jax.Array:
    """Rows of random directions that are orthogonal in groups of D = width, as long as
    normal ones are: [m,D] float32."""
    groups = -(-features // width)
    of_directions, of_lengths = jax.random.split(key)
    square = jax.random.normal(of_directions, (groups, width, width), jnp.float32)
    rows = jnp.linalg.qr(square)[0].swapaxes(1, 2).reshape(-1, width)[:features]
    normal = jax.random.normal(of_lengths, (features, width), jnp.float32)
    return rows * jnp.linalg.norm(normal, axis=1, keepdims=True)


def softmax_features(
    x: jax.Array, w: jax.Array, over: tuple[int, ...], real: jax.Array | None = None,
) -> jax.Array:
    """m^-1/2 (exp(w.x - |x|^2/2 - max) + 1e-4) of x [B,T,H,D] D^-1/4, whose products
    are near exp(q.k): [B,T,H,m]; the maximum is taken over the axes `over`. 0 where
    real [B,T] is False."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    s = jnp.einsum("bthd,md->bthm", x, w)
    if real is not None:
        s = jnp.where(real[..., None, None], s, -jnp.inf)
    top = jax.lax.stop_gradient(s.max(over, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    half = (x * x).sum(-1, keepdims=True) / 2
    found = w.shape[0] ** -0.5 * (jnp.exp(s - half - top) + 1e-4)
    return found if real is None else jnp.where(real[..., None, None], found, 0)


def relu_features(x: jax.Array, w: jax.Array) -> jax.Array:
    """relu(w.x) + 1e-3 of x [B,T,H,D] D^-1/4: [B,T,H,m]."""
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    return jax.nn.relu(jnp.einsum("bthd,md->bthm", x, w)) + 1e-3
