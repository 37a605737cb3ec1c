"""Additive attention over a text read in both directions: a classifier of texts.

The network of Attention Meets Perturbations (Attention AT and iAT): embeddings, a
bidirectional LSTM, scores s_t = v . tanh(W h_t + b) of one learned query, a mean of h_t
weighted by their softmax, one logit. Scores are a step of their own, so that something
can be added to them before the softmax.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def weights(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """The softmax of scores [B,T] over the words of each text, mask [B,T]: 0 at
    padding, and everywhere in a text of padding alone."""
    logits = jnp.where(mask, scores, -jnp.inf)
    top = logits.max(1, keepdims=True)
    e = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
    total = e.sum(1, keepdims=True)
    return e / jnp.where(total > 0, total, 1)


class AdditivePooling(nn.Module):
    """States of words to scores, and scores to one logit. width: of tanh."""

    width: int = 32

    def setup(self):
        self.hidden = nn.Dense(self.width)
        self.query = nn.Dense(1, use_bias=False)
        self.out = nn.Dense(1)

    def scores(self, h: jax.Array) -> jax.Array:
        """h [B,T,E] -> s [B,T]."""
        return self.query(jnp.tanh(self.hidden(h)))[..., 0]

    def pooled(self, h: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
        """h [B,T,E], s and mask [B,T] -> logit [B]."""
        a = weights(scores, mask)
        return self.out(jnp.einsum("bt,bte->be", a, h))[..., 0]

    def __call__(self, h: jax.Array, mask: jax.Array) -> jax.Array:
        """h [B,T,E], mask [B,T] -> logit [B]."""
        return self.pooled(h, self.scores(h), mask)


class TextClassifier(nn.Module):
    """Tokens [B,T], 0 is padding, to a logit [B] for the label 1. width: of embeddings,
    of the LSTM in each direction, and of the attention."""

    vocab: int
    width: int = 32

    def setup(self):
        self.embedding = nn.Embed(self.vocab, self.width)
        self.lstm: Any = nn.Bidirectional(
            nn.RNN(nn.OptimizedLSTMCell(self.width)),
            nn.RNN(nn.OptimizedLSTMCell(self.width)))
        self.attention = AdditivePooling(self.width)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B,T] -> [B,T,width]."""
        return self.embedding(tokens)

    def encode(self, embedded: jax.Array, tokens: jax.Array) -> jax.Array:
        """[B,T,width] -> states h [B,T,2 width]; what stands at padding is not read."""
        return self.lstm(embedded, seq_lengths=(tokens > 0).sum(1))

    def scores(self, h: jax.Array) -> jax.Array:
        """h [B,T,E] -> s [B,T]."""
        return self.attention.scores(h)

    def pooled(self, h: jax.Array, scores: jax.Array, tokens: jax.Array) -> jax.Array:
        """States and scores of words -> logit [B]."""
        return self.attention.pooled(h, scores, tokens > 0)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B,T] -> [B]."""
        h = self.encode(self.embed(tokens), tokens)
        return self.pooled(h, self.scores(h), tokens)
