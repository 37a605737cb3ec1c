"""Regression: prompts of examples (x, y) of a linear map, and one x that wants its y.

The data of In-Context Linear Regression Demystified (multi-head softmax attention):
x ~ N(0, I), beta ~ N(0, I / d), y = beta.x + noise, anew in every prompt.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prompts(NamedTuple):
    """examples [B,L,d+1], rows (x, y); query [B,d+1], (x, 0); answer [B], noisy as
    every y is; clean [B]: it without its noise, where that is known."""

    examples: jax.Array
    query: jax.Array
    answer: jax.Array
    clean: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Regression:
    """Prompts of `length` examples in `dim` variables; noise: the variance of y's."""

    dim: int = 5
    length: int = 40
    noise: float = 0.1

    def __post_init__(self):
        for name in ("dim", "length"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Regression: {name}={getattr(self, name)}: expected 1 or more")
        if not self.noise >= 0:
            raise ValueError(f"Regression: noise={self.noise}: expected 0 or more")

    def draw(self, key: jax.Array, batch: int) -> Prompts:
        """`batch` prompts B."""
        for_x, for_beta, for_noise = jax.random.split(key, 3)
        x = jax.random.normal(for_x, (batch, self.length + 1, self.dim))
        beta = jax.random.normal(for_beta, (batch, self.dim)) / self.dim**0.5
        noise = jax.random.normal(for_noise, (batch, self.length + 1))
        clean = jnp.einsum("bld,bd->bl", x, beta)
        y = clean + self.noise**0.5 * noise
        z = jnp.concatenate([x, y[..., None]], -1)
        query = z[:, -1].at[:, -1].set(0)
        return Prompts(z[:, :-1], query, y[:, -1], clean[:, -1])
