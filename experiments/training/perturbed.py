"""Perturbed: a loss and the same loss with what it depends on moved against it.

Attention AT and iAT (Attention Meets Perturbations): the scores of attention, before
the softmax, are moved by a vector r of fixed length that the gradient g of the loss
names, and the network is trained on both,

    L(s) + lambda L(s + r),   r a constant.

at          r = eps g / |g| of each text
repo        r = -eps g / |g|: what the authors' code of Attention iAT comes to, whose
            gradient is taken behind a normalisation of zero, so that directions between
            words drop out and the sign turns: a loss that is made smaller
word        r_t = eps sign(g_t): iAT with every word's weights normalised alone
difference  r = eps g |d|^2 / |g |d|^2|, d_t = s_t - s_k: iAT normalised over a text,
            with directions that keep their length, so that words far from the others
            are moved most
random      of length eps, in any direction

The iAT equations in words are recalled, not read; which normalisation the paper has is
not known. (With unit directions and one normalisation for a text iAT is AT itself.)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

VARIANTS = ("at", "repo", "word", "difference", "random")
TINY = 1e-12  # a gradient below it moves nothing


def normalised(g: jax.Array) -> jax.Array:
    """g [B,...] with length 1 in each row; 0 stays 0."""
    axes = tuple(range(1, g.ndim))
    # the square of what is small would be 0: scaled first
    most = jnp.abs(g).max(axes, keepdims=True)
    scaled = g / jnp.where(most > 0, most, 1)
    length = jnp.sqrt((scaled**2).sum(axes, keepdims=True))
    return jnp.where(most * length > TINY, scaled / jnp.where(
        length > 0, length, 1), g / TINY)


def differences(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """|d_t|^2 [B,T], of d_t = s_t - s_k over the words k of a text; 0 at padding."""
    gap = (scores[:, :, None] - scores[:, None]) ** 2  # [B,T,T]
    both = mask[:, :, None] & mask[:, None]
    return jnp.where(both, gap, 0).sum(2)


def direction(variant: str, g: jax.Array, scores: jax.Array, mask: jax.Array,
              key: jax.Array | None = None) -> jax.Array:
    """r / eps [B,T] by one of `VARIANTS`, of g = dL/ds, s and mask [B,T]; key: of
    "random". 0 at padding."""
    g = jnp.where(mask, g, 0)
    if variant == "at":
        return normalised(g)
    if variant == "repo":
        return -normalised(g)
    if variant == "word":
        return jnp.sign(g)
    if variant == "difference":
        return normalised(g * differences(scores, mask))
    if variant == "random" and key is not None:
        return normalised(jnp.where(mask, jax.random.normal(key, g.shape, g.dtype), 0))
    given = "without a key" if variant == "random" else ""
    raise ValueError(
        f"variant={variant!r} {given}: expected one of {VARIANTS}, random with a key")


def total(loss: Callable[[jax.Array], jax.Array], scores: jax.Array, r: jax.Array,
          weight: jax.Array | float = 1.0) -> jax.Array:
    """L(s) + weight L(s + r). No gradient goes through r."""
    return loss(scores) + weight * loss(scores + jax.lax.stop_gradient(r))


def cross_entropy(logit: jax.Array, label: jax.Array,
                  weight: jax.Array | float = 1.0) -> jax.Array:
    """Of labels 0 and 1, those of 1 counted `weight` times: a mean over texts; logit
    and label [B]."""
    each = jax.nn.softplus(logit) - label * logit
    return (jnp.where(label > 0, weight, 1.0) * each).mean()
