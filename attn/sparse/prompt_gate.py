"""Prompt gate: how much a block of queries will look at a block of keys, learned.

Queries and keys are pooled over blocks, before any rotation, and projected; the product
of both is the gate's word on a pair of blocks. It learns from the largest weight that
the attention itself gives in each pair.

Source: Gao et al., 2024, arXiv:2410.13276, and the code that its authors published.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.segments import locate
from attn.sparse import block_gate
from attn.sparse.block_grid import Grid, grid


class PromptGate(nn.Module):
    """What a module inherits that has the fields block, gate_dim, pool_q, pool_k,
    double, threshold, ratio, last_dense, diagonal, capacity, rope and scale of `Seer`:
    the gate, what it is to learn, and what it names."""

    @nn.compact
    def _weights(self: Any, d: int, h: int, heads: int) -> tuple[Any, jax.Array]:
        """The projections of the gate: of queries, or None, and of keys."""
        double = self.double or len(self.pool_q) > 1 or self.gate_dim != d
        init = nn.initializers.normal(0.02)  # the models' initializer_range
        of = functools.partial(self.param, init_fn=init)
        of_q = None
        if double:
            of_q = of("gate_q", shape=(h, len(self.pool_q) * d, self.gate_dim))
        of_k = of("gate_k", shape=(  # [K|H,c D,Dg]
            heads if double else h, len(self.pool_k) * d, self.gate_dim))
        return of_q, of_k

    def _gates(self: Any, weights, q, k, on: Grid) -> tuple[jax.Array, jax.Array]:
        """q [B,N I,H,D] and k [B,N I,K,D] on a grid -> their gates [B,N,H,Dg]."""
        real, h = on.segment > 0, q.shape[2]
        q = block_gate.pooled(q, real, self.pool_q)
        k = block_gate.pooled(k, real, self.pool_k)
        of_q, of_k = weights
        if of_q is None:
            k = jnp.repeat(k, h // k.shape[2], 2)
        else:
            # [B,N,H,c D] x [H,c D,Dg] -> [B,N,H,Dg]
            q = jnp.einsum("bnhc,hcd->bnhd", q, of_q)
        # [B,N,K|H,c D] x [K|H,c D,Dg] -> [B,N,K|H,Dg]
        k = jnp.einsum("bnkc,kcd->bnkd", k, of_k)
        k = jnp.repeat(k, h // k.shape[2], 2)
        pos = jnp.maximum(on.pos[..., 0], 0)  # of the block's first token
        return self._turned(q, pos), self._turned(k, pos)

    def _turned(self: Any, a, pos):
        return a if self.rope is None else self.rope.rotate(a, pos)

    def logits(self: Any, q, k) -> jax.Array:
        """The gate's logits [B,H,n,n] of unturned q [B,T,H,D] and k [B,T,K,D], -1e9 for
        blocks of the future."""
        weights = self._weights(q.shape[3], q.shape[2], k.shape[2])
        return self._gate_logits(weights, q, k)

    def _gate_logits(self: Any, weights, q, k):
        now = locate(None, 1, q.shape[1])
        on = grid(now.pos, now.segment, self.block, packed=False)
        q_gate, k_gate = self._gates(weights, on.put(q), on.put(k), on)
        # [B,n,H,Dg] x [B,n,H,Dg] -> [B,H,n,n]
        s = jnp.einsum("bmhd,bnhd->bhmn", q_gate, k_gate) * self.gate_dim**-0.5
        tri = jnp.tril(jnp.ones(s.shape[-2:], bool))[None, None]
        return jnp.where(tri, s, -1e9)

    def target(self: Any, q, k) -> jax.Array:
        """What the gate should say [B,H,n,n]: the largest weight of each pair of
        blocks, as a share of its row; of unturned q and k, without gradient. Time T^2,
        memory T."""
        now = locate(None, 1, q.shape[1])
        q, k = (jax.lax.stop_gradient(self._turned(a, now.pos)) for a in (q, k))
        p = block_gate.block_maxima(q, k, self.block, self.scale)
        return p / p.sum(-1, keepdims=True)  # of a causal row never 0

    def loss(self: Any, q, k) -> jax.Array:
        """The divergence of the gate from `target`, a number: the mean over all pairs
        of blocks, the first quarter of the rows left out."""
        return self._loss(self._weights(q.shape[3], q.shape[2], k.shape[2]), q, k)

    def _loss(self: Any, weights, q, k):
        target, s = self.target(q, k), self._gate_logits(weights, q, k)
        rows = slice(s.shape[2] // 4, None)
        return block_gate.divergence(target[:, :, rows], s[:, :, rows])

    def mask(self: Any, q, k) -> jax.Array:
        """Which pairs of blocks the gate asks for [B,H,n,n] bool, of a whole row:
        without `capacity`, with the last two rows if they are dense."""
        s = self.logits(q, k)
        n = s.shape[-1]
        tri = jnp.tril(jnp.ones((n, n), bool))[None, None]
        if self.threshold is None:
            # the rank of each block in its row, 0 for the best
            top = jnp.argsort(jnp.argsort(-s, axis=-1, stable=True), axis=-1)
            asked = top < int(self._most(n)[n])
        else:
            asked = jax.nn.softmax(s) > self.threshold
        dense = self.last_dense & (jnp.arange(n) >= n - 2)[None, None, :, None]
        own = self.diagonal & jnp.eye(n, dtype=bool)[None, None]
        return tri & (asked | dense | own)

    def share(self: Any, q, k) -> tuple[jax.Array, jax.Array]:
        """The share of the causal pairs of blocks that each head asks for and the one
        that it reads, for want of room: [B,H] each."""
        asked = self.mask(q, k).sum(-1)  # [B,H,n]
        n = asked.shape[-1]
        most = n if self.threshold is None else self.capacity or n
        last = self.last_dense & (jnp.arange(n) >= n - 2)
        room = jnp.where(last, n, most + self.diagonal)
        read, pairs = jnp.minimum(asked, room[None, None]), n * (n + 1) / 2
        return asked.sum(-1) / pairs, read.sum(-1) / pairs

    def _most(self: Any, n: int) -> np.ndarray:
        """How many blocks a row of a sequence of 0, 1, ..., n blocks reads."""
        # of n columns: so `ratio` is the share of the causal triangle
        share = 1 - math.sqrt(1 - self.ratio)
        return np.array([max(int(share * i), 1) for i in range(n + 1)], np.int32)
