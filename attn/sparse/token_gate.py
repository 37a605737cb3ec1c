"""Token gate: which blocks of earlier keys a token and a group of heads will look at.

The queries of a group together are compared with the pooled keys of each block. The
gate learns from the largest weight that the group gives in each earlier block; the own
one is read in any case, and is not the gate's.

Source: Gao et al., 2025, arXiv:2506.08889, and the code that its authors published.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.sparse import block_gate

GROUPS = ("proj", "avgproj", "avg")
HIDDEN = -1e20  # the logit of a block that is not the gate's


class TokenGate(nn.Module):
    """What a module inherits that has the fields block, gate_dim, pool_k, group, norm,
    skip, rope and scale of `SeerR`: the gate and what it is to learn."""

    @nn.compact
    def _weights(self: Any, q, k) -> dict[str, Any]:
        """The projections of the gate, of each key head, and its norms."""
        (h, d), heads = q.shape[2:], k.shape[2]
        widths = {"proj": h // heads * d, "avgproj": d}
        init = nn.initializers.glorot_uniform(batch_axis=(0,))
        found = {"k": self.param(
            "gate_k", init, (heads, len(self.pool_k) * d, self.gate_dim))}
        if self.group in widths:
            shape = heads, widths[self.group], self.gate_dim
            found["q"] = self.param("gate_q", init, shape)
        elif d != self.gate_dim:
            raise ValueError(f"SeerR: gate_dim={self.gate_dim}, group='avg': expected "
                             f"the D={d} of queries")
        if self.norm:
            one = nn.initializers.ones
            found |= {f"norm_{side}": self.param(f"norm_{side}", one, (self.gate_dim,))
                      for side in "qk"}
        return found

    def _of_keys(self: Any, weights, pools, pos) -> jax.Array:
        """Pools [B,N,K,c D] of blocks that begin at pos [B|1,N] -> [B,N,K,Dg]."""
        # [B,N,K,c D] x [K,c D,Dg] -> [B,N,K,Dg]
        gate = jnp.einsum("bnkc,kcd->bnkd", pools, weights["k"])
        return self._turned(self._normed(gate, weights.get("norm_k")), pos)

    def _of_queries(self: Any, weights, q, pos, heads: int) -> jax.Array:
        """Unturned q [B,T,H,D] at pos [B|1,T] -> [B,T,K,Dg]."""
        b, t, h, d = q.shape
        q = q.astype(jnp.float32).reshape(b, t, heads, h // heads, d)
        q = q.reshape(b, t, heads, -1) if self.group == "proj" else q.mean(3)
        # [B,T,K,G D|D] x [K,G D|D,Dg] -> [B,T,K,Dg]
        gate = q if self.group == "avg" else jnp.einsum(
            "btkc,kcd->btkd", q, weights["q"])
        return self._turned(self._normed(gate, weights.get("norm_q")), pos)

    def _normed(self: Any, a, scale):
        if scale is None:
            return a
        return a * jax.lax.rsqrt((a * a).mean(-1, keepdims=True) + 1e-6) * scale[
            None, None, None]

    def _turned(self: Any, a, pos):
        return a if self.rope is None else self.rope.rotate(a, pos)

    def logits(self: Any, q, k) -> jax.Array:
        """The gate's logits [B,K,T,n] of unturned q [B,T,H,D] and k [B,T,K,D]; -1e20
        for the own block and later ones."""
        return self._logits(self._weights(q, k), q, k)

    def _logits(self: Any, weights, q, k):
        t, heads, block = q.shape[1], k.shape[2], self.block
        n = -(-t // block)
        pos = jnp.arange(n * block, dtype=jnp.int32)
        k = jnp.pad(k, ((0, 0), (0, n * block - t), (0, 0), (0, 0)))
        pools = block_gate.pooled(k, (pos < t).reshape(1, n, block), self.pool_k)
        of_k = self._of_keys(weights, pools, pos[None, ::block])
        of_q = self._of_queries(weights, q, pos[None, :t], heads)
        # [B,T,K,Dg] x [B,n,K,Dg] -> [B,K,T,n]
        s = jnp.einsum("btkd,bnkd->bktn", of_q, of_k) * self.gate_dim**-0.5
        past = jnp.arange(n)[None] < (pos[:t] // block)[:, None]
        return jnp.where(past[None, None], s, HIDDEN)

    def target(self: Any, q, k) -> jax.Array:
        """What the gate should say [B,K,T,n]: the largest weight that a token and a
        group give in each earlier block, as a share of the row's, 0 in the first block;
        of unturned q and k, without gradient. Time T^2."""
        pos = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        q, k = (jax.lax.stop_gradient(self._turned(a, pos)) for a in (q, k))
        # [B,K,T,n]: a group's largest weight in each block
        p = block_gate.token_maxima(q, k, self.block, self.scale)
        past = jnp.arange(p.shape[3])[None] < (pos[0] // self.block)[:, None]
        p = jnp.where(past[None, None], p, 0)
        return p / (p.sum(-1, keepdims=True) + 1e-9)

    def loss(self: Any, q, k) -> jax.Array:
        """The divergence of the gate from `target`, a number: the mean over all tokens
        and blocks, the first `skip` of the rows left out."""
        return self._loss(self._weights(q, k), q, k)

    def _loss(self: Any, weights, q, k):
        # the network around the gate stays as it is
        q, k = (jax.lax.stop_gradient(a) for a in (q, k))
        rows = slice(int(self.skip * q.shape[1]), None)
        target, s = self.target(q, k), self._logits(weights, q, k)
        return block_gate.divergence(target[:, :, rows], s[:, :, rows])
