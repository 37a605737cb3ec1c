"""One layer: attention of the last token over all before it, and how it learns.

The model and the flow of Scan and Snap (Tian et al., 2023, arXiv:2305.16380), in the
two matrices of logits that its embeddings only factor: Z [M,M], how much query m looks
at token l, and Y [M,M], what token l says of the next. Without positions a text is its
query and how often each token stands in it: counts [B,M]. Probabilities P(l|n) in the
place of counts give the population, texts without end.

    b = softmax of Z[m, x_t] over the tokens of the text, the query left out
    c = X^T b        f = c / |c|        logits = Y^T f

All is in the order [query, token] and [token, next]; a batch counts as its mean.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Weights(NamedTuple):
    """z [M,M]: of a query's logits for each token; y [M,M]: of a token's word for each
    next token."""

    z: jax.Array
    y: jax.Array


class Texts(NamedTuple):
    """counts [B,M] of the tokens of each text, its query [B] and next token [B]."""

    counts: jax.Array
    query: jax.Array
    label: jax.Array


def random_weights(key: jax.Array, vocab: int) -> Weights:
    """Uniform within +-M^-0.5, as linear layers of the authors' framework begin."""
    bound = vocab**-0.5
    z, y = jax.random.split(key)
    draw = lambda k: jax.random.uniform(k, (vocab, vocab), minval=-bound, maxval=bound)
    return Weights(draw(z), draw(y))


def zero_weights(vocab: int) -> Weights:
    """Every token is looked at alike, and says nothing."""
    return Weights(jnp.zeros((vocab, vocab)), jnp.zeros((vocab, vocab)))


def mix(z: jax.Array, texts: Texts) -> jax.Array:
    """c [B,M] = X^T b: what share of its attention a text gives each token. Of a text
    without tokens it is 0."""
    there = texts.counts > 0
    row = jnp.where(there, z[texts.query], -jnp.inf)
    # the largest logit of a token that is there: no overflow, whatever Z
    top = row.max(1, keepdims=True)
    weight = texts.counts * jnp.exp(row - jnp.where(jnp.isfinite(top), top, 0))
    total = weight.sum(1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


def length(c: jax.Array) -> jax.Array:
    """|c| [B,1]; 1 of a text without tokens."""
    square = (c * c).sum(1, keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1))


def logits(weights: Weights, texts: Texts, normalise: bool = True) -> jax.Array:
    """[B,M] for the next token. normalise: the mixture has length 1."""
    c = mix(weights.z, texts)
    return (c / length(c) if normalise else c) @ weights.y


def loss(weights: Weights, texts: Texts, normalise: bool = True) -> jax.Array:
    """Cross entropy in nats of the next token, a mean over the batch."""
    log_p = jax.nn.log_softmax(logits(weights, texts, normalise))
    return -jnp.take_along_axis(log_p, texts.label[:, None], 1).mean()


def flow(weights: Weights, texts: Texts, normalise: bool = True) -> Weights:
    """The direction of gradient flow, minus the gradient of `loss`, by the paper's
    equations:

        dY = f e^T        dZ[m] = e^T Y^T (I - f f^T) / |c| diag(c)

    with e = onehot(n) - softmax(logits); of the Jacobian of the softmax, diag(b) - b
    b^T, the second part falls to (I - f f^T) c = 0. Without the norm it stays, and
    dZ[m] = e^T Y^T (I - c 1^T) diag(c), where what all tokens say alike cancels.
    """
    vocab = weights.z.shape[0]
    c = mix(weights.z, texts)  # [B,M]
    size = length(c) if normalise else jnp.ones_like(c[:, :1])
    f = c / size
    e = jax.nn.one_hot(texts.label, vocab, dtype=f.dtype)
    e -= jax.nn.softmax(f @ weights.y)
    said = e @ weights.y.T  # [B,M]: what more of each token would do for the loss
    along = (f * said).sum(1, keepdims=True)
    rows = (said - (f * along if normalise else along)) * c / size
    of_query = jax.nn.one_hot(texts.query, vocab, dtype=f.dtype)
    many = len(texts.counts)
    return Weights(of_query.T @ rows / many, f.T @ e / many)


class Rates(NamedTuple):
    """Learning rates of Z and of Y, and the momentum of both."""

    z: jax.Array | float = 1.0
    y: jax.Array | float = 1.0
    momentum: jax.Array | float = 0.0


def step(weights: Weights, velocity: Weights, texts: Texts, rates: Rates,
         normalise: bool = True) -> tuple[Weights, Weights]:
    """One step of gradient descent with momentum -> weights, velocity."""
    push = flow(weights, texts, normalise)
    velocity = jax.tree.map(lambda v, g: rates.momentum * v + g, velocity, push)
    z, y = weights.z + rates.z * velocity.z, weights.y + rates.y * velocity.y
    return Weights(z, y), velocity


def population(probabilities: np.ndarray, query: np.ndarray,
               label: np.ndarray) -> Texts:
    """The texts of all classes at once, as probabilities P(l|n) [K,M]."""
    return Texts(jnp.asarray(probabilities, jnp.result_type(float)),
                 jnp.asarray(query), jnp.asarray(label))


def entropy(c: jax.Array) -> jax.Array:
    """In nats, of each mixture: c [...,M] -> [...]."""
    return -(c * jnp.log(jnp.where(c > 0, c, 1))).sum(-1)
