"""Estimator: rows of an attention's matrix, guessed from a Performer's contexts.

A Performer says for little what a token's context might be; a small convolutional
decoder makes of it an estimate of the token's row of the matrix, compressed to K
columns, of which the best of all heads together are chosen. What is read of them, and
how the estimate learns, is another matter (`attn/sparse/estimated.py`).

Source: Lee et al., 2023, arXiv:2310.01777.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.varying import gelu
from attn.recurrent.factors import beside_one
from attn.recurrent.linear import recurrence
from attn.sparse import estimated, favor
from attn.sparse.column_decoder import Decoder, layer_norm


class Estimate(NamedTuple):
    """Of each token: scores [B,T,H,K], context [B,T,H,D+V] of the Performer, gates
    [B,T,H,2]; valid [B,T]; length [B,T]: keys that it sees."""

    scores: jax.Array
    context: jax.Array
    gates: jax.Array
    valid: jax.Array
    length: jax.Array


class Estimator(favor.Directions, nn.Module):
    """What a module inherits that has the fields columns, keep, causal, length,
    nb_factor and count_padding of `SEA`: its estimates and their parameters."""

    def _features(self: Any, d: int) -> int:
        return max(int(d * math.log(d) / self.nb_factor), 1)

    @nn.compact
    def _estimate(self: Any, q, k, v, valid, state: Any):
        """The estimate of T tokens; and memory, tails and total of the state."""
        b, t, h, d = q.shape
        if self.causal and state is None and t > self.length:
            raise ValueError(f"T={t} tokens: expected at most length={self.length}")
        w = self._directions(d)
        wide = [a.astype(jnp.float32) for a in (q, k, v)]
        q, k, v = (jnp.repeat(a, h // a.shape[2], 2) for a in wide)
        seen = self._lengths(valid, state)
        place = self._places(valid, seen, d)[:, :, None]  # [B|1,T,1,D]
        beside = jnp.concatenate([jnp.broadcast_to(place, (b, t, h, d)), v], -1)
        beside = jnp.where(valid[..., None, None], beside, 0)
        counted = valid | self.count_padding
        v = jnp.where(valid[..., None, None], v, 0)
        memory, context = self._performer(q, k, beside, w, state, counted)
        u = jnp.concatenate([context, v], -1)  # [B,T,H,D+2V]
        z = nn.Dense(2 * d, name="enc")(u)  # [D+2V,2D]
        z = gelu(layer_norm("enc_norm")(z))  # [B,T,H,2D]
        decoder = Decoder(self.columns, self.causal, name="decoder")
        tails = None if state is None else state.tails
        scores, tails = decoder(z, tails)
        # [B,T,H,2D] [2D,2]
        gates = nn.sigmoid(nn.Dense(2, name="gate")(z))
        total = (0 if state is None else state.total) + jnp.where(
            valid[..., None, None], wide[2], 0).sum(1)
        return Estimate(scores, context, gates, valid, seen), (memory, tails, total)

    def _lengths(self: Any, valid, state) -> jax.Array:
        """How many keys each token sees [B,T]."""
        if not self.causal:
            length = valid.sum(1, dtype=jnp.int32)[:, None]
            return jnp.where(valid, length, 0)
        before = 0 if state is None else state.end[:, None]
        count = jnp.arange(1, valid.shape[1] + 1, dtype=jnp.int32)[None] + before
        return jnp.broadcast_to(count, valid.shape)

    def _places(self: Any, valid, seen, d: int) -> jax.Array:
        """What says where a token stands [B,T,D]."""
        if self.causal:
            normal = nn.initializers.normal(1.0)
            table = self.param("place", normal, (self.length, d), jnp.float32)
            return table.at[seen - 1].get(mode="clip")
        # position p of D, linearly between two channels
        index = jnp.cumsum(valid.astype(jnp.float32), 1) - 1
        most = valid.astype(jnp.float32).sum(1, keepdims=True) - 1
        p = index / jnp.maximum(most, 1) * (d - 1)
        low = jnp.floor(p)
        one = functools.partial(jax.nn.one_hot, num_classes=d, dtype=jnp.float32)
        part = (p - low)[..., None]
        low = low.astype(jnp.int32)
        return one(low) * (1 - part) + one(low + 1) * part

    def _performer(self: Any, q, k, v, w, state, counted):
        """The Performer's sums and contexts [B,T,H,D+V] float32."""
        if self.causal:
            q, k = favor.relu_features(q, w), favor.relu_features(k, w)
            memory, o = recurrence(
                q, k, beside_one(v), state=None if state is None else state.memory)
            return memory, o[..., :-1] / (o[..., -1:] + 1e-6 * q.sum(-1, keepdims=True))
        q = favor.softmax_features(q, w, (3,))
        k = favor.softmax_features(k, w, (1, 3), counted)
        # [B,S,H,m] x [B,S,H,D+V+1] -> [B,H,m,D+V+1], the last one the sum of weights
        sums = jnp.einsum("bshm,bshv->bhmv", k, beside_one(v))
        # [B,T,H,m] x [B,H,m,D+V+1] -> [B,T,H,D+V+1]
        o = jnp.einsum("bthm,bhmv->bthv", q, sums)
        return None, o[..., :-1] / o[..., -1:]

    def shares(self: Any, estimate: Estimate) -> jax.Array:
        """The estimated rows of the matrix [B,T,H,K]; 0 at padding."""
        rows = estimate.valid[..., None, None]
        return jnp.where(rows, nn.softmax(estimate.scores), 0)

    def selected(self: Any, estimate: Estimate) -> jax.Array:
        """The columns that are read [B,T,H,K] bool."""
        p = jax.lax.stop_gradient(self.shares(estimate))
        return estimated.selected(p, estimate.length, self.keep)
