"""Effective weights: the matrix A of an attention that has one, row by row.

Most attentions give o[t] = sum_s A[t,s] v[s], with A made from q, k and gates (the
unified template, `attn/template.py`; Sieber et al., 2024, arXiv:2405.15731, equation
of the transfer operator), whether they ever write A down or not. Then A is the
derivative of o by v, and a row of it one backward pass. Exact attention makes its rows
from q and k instead, by a method `weights`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# the collections of a look inside: what is wanted, and what was seen
VIEW, SEEN = "view", "seen"


def weights_of(attention: Any, q, k, v, heads, rows, **options) -> jax.Array:
    """A [B,n,m,S] of n heads [n] and m query rows [m], of a call of `attention` with
    q, k, v and `options`. NotImplementedError for one without such a matrix."""
    reason = getattr(attention, "weightless", None)
    if reason:
        raise NotImplementedError(
            f"pattern: {type(attention).__name__} has no matrix of weights, as {reason}"
        )
    own = getattr(attention, "weights", None)
    if own is not None:
        return own(q, k, v, heads, rows, **options)
    return by_derivative(attention, q, k, v, heads, rows, **options)


def by_derivative(attention: Any, q, k, v, heads, rows, **options) -> jax.Array:
    """`weights_of` for any attention that is linear in v, channel by channel and alike
    for all: one backward pass a row and head."""
    call = attention if not hasattr(attention, "scope") else _free(attention)
    shared = q.shape[2] // v.shape[2]
    o, back = jax.vjp(lambda v: call(q, k, v, **options), v.astype(jnp.float32))

    def entry(row, head):
        # d o[:, row, head, 0] / d v[:, s, head's, 0]
        (found,) = back(jnp.zeros_like(o).at[:, row, head, 0].set(1))
        return found[:, :, head // shared, 0]  # [B,S]

    # a backward pass has the size of v: heads are side by side, rows are not
    found = jax.lax.map(
        lambda row: jax.vmap(entry, (None, 0))(row, heads), rows)  # [m,n,B,S]
    return jnp.moveaxis(found, (0, 1, 2), (2, 1, 0))


def _free(attention: Any) -> Any:
    """A bound module of linen as a function: derivatives cannot go through its scope.
    """
    variables = {name: kept for name, kept in attention.variables.items()
                 if name not in (VIEW, SEEN)}
    free = attention.clone(parent=None)

    def call(*args, **named):
        return free.apply(variables, *args, **named)

    return call
