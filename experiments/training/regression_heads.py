"""Heads that learn regression: one attention layer whose query is no example.

The model of In-Context Linear Regression Demystified (multi-head softmax attention):
heads as wide as what they read, D = d + 1, no biases and no positions,

    f = sum_h O_h V_h Z^T softmax(Z K_h^T Q_h z_q / sqrt(D))

with examples Z [L,D]. What heads compute are two products, KQ_h = K_h^T Q_h / sqrt(D)
and OV_h = O_h V_h, so that one head of keys and values, the examples themselves, serves
them all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.masks import Full
from attn.recurrent.noncausal import noncausal
from attn.softmax import Softmax


class Heads(NamedTuple):
    """q, k, v [H,D,D], each a map from inputs to channels [out,in]; o [H,D]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array

    @property
    def kq(self) -> jax.Array:
        """KQ [H,D,D]: of the example (rows) and of the query (columns)."""
        return jnp.einsum("hci,hcj->hij", self.k, self.q) / self.q.shape[-1] ** 0.5

    @property
    def ov(self) -> jax.Array:
        """OV [H,D]: what an example adds to the answer."""
        return jnp.einsum("hc,hci->hi", self.o, self.v)


def random_heads(key: jax.Array, heads: int, dim: int) -> Heads:
    """Uniform within +-fan_in^-0.5, as linear layers of the authors' framework begin;
    dim: D."""
    keys = jax.random.split(key, 4)
    draw = lambda k, bound, *shape: jax.random.uniform(
        k, shape, minval=-bound, maxval=bound)
    q, k, v = (draw(key, dim**-0.5, heads, dim, dim) for key in keys[:3])
    return Heads(q, k, v, draw(keys[3], (heads * dim) ** -0.5, heads, dim))


def softmax_answer(kq: jax.Array, ov: jax.Array, examples: jax.Array,
                   query: jax.Array) -> jax.Array:
    """kq [H,D,D], ov [H,D], examples [B,L,D], query [B,D] -> f [B]."""
    asked = jnp.einsum("hij,bj->bhi", kq, query)[:, None]  # [B,1,H,D]
    shared = examples[:, :, None]  # [B,L,1,D]: keys and values of all heads
    # the scale stands in KQ
    seen = Softmax(mask=Full(), scale=1.0)(asked, shared, shared)[:, 0]  # [B,H,D]
    return jnp.einsum("hi,bhi->b", ov, seen)


def linear_answer(kq: jax.Array, ov: jax.Array, examples: jax.Array, query: jax.Array,
                  length: int) -> jax.Array:
    """The same without softmax and without a normaliser: sums of examples over
    `length`, a constant, which is the length that was trained at -> f [B]."""
    asked = jnp.einsum("hij,bj->bhi", kq, query)[:, None]  # [B,1,H,D]
    shared = examples[:, :, None]
    seen = noncausal(asked, shared, shared)[:, 0] / length  # [B,H,D]
    return jnp.einsum("hi,bhi->b", ov, seen)
