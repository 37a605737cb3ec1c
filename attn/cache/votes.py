"""Votes: the last queries of a prompt say which of its keys will be looked at.

Each key's weights are added up over the queries of a window, and pooled along the
sequence, so that neighbours of a chosen token come with it (SnapKV's rule, Li et al.,
2024, arXiv:2404.14469, which later policies share and give other budgets).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.cache.policy import Policy
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions
from attn.exact.dense import allowed, formed, logits, weights
from pallas_kernels.logits import Where

POOLS = ("avg", "max")


class Voting(Policy):
    """What stands before `Softmax` among the bases of a policy with fields `capacity`,
    `window`, `kernel` (odd) and `pool`, "avg" or "max"."""

    window: Any
    kernel: Any
    pool: Any

    def check_voting(self: Any) -> None:
        """Raises ValueError for fields that are out of range."""
        name = type(self).__name__
        check_fields(self, choices={"pool": POOLS}, least={"kernel": 1})
        if not 0 < self.window < self.capacity:
            raise ValueError(
                f"{name}: window={self.window}, capacity={self.capacity}: "
                "expected 0 < window < capacity"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"{name}: kernel={self.kernel}: expected an odd width")

    def importance(
        self: Any, q: jax.Array, cache: Cache, now: TokenPositions, sink: Any = None
    ) -> jax.Array:
        """The pooled votes for each slot [B,C,K], and infinity for the window."""
        b, _, h, _ = q.shape
        window = now.next_pos[:, None, None] - self.window  # its first position
        early = (cache.pos >= 0) & (cache.pos < window)
        heads = early.shape[2]  # that keep tokens of their own
        by_query = jnp.repeat(jnp.moveaxis(early, 1, 2), h // heads, 1)  # [B,H,C]
        # c_j, pooled [B,H,C]
        votes = self.votes(q, cache.k, cache.pos, now, sink)
        pooled = self.pooled(votes, by_query)
        pooled = pooled.reshape(b, heads, h // heads, -1).mean(2)  # [B,K,C]
        return jnp.where(early, jnp.moveaxis(pooled, 1, 2), jnp.inf)

    def votes(self: Any, q, k, pos, now: TokenPositions, sink=None) -> jax.Array:
        """What each key gets from the last `window` real queries: [B,H,S].

        q [B,T,H,D] at `now`, k [B,S,K,D] at positions pos [B,S,K]; sink [H]. Weights
        are those of the attention, with its softcap and score.
        """
        t, h = q.shape[1:3]
        mine = caches.current(now)
        last, index = jax.lax.top_k(
            jnp.where(mine, jnp.arange(t), -1), min(self.window, t))
        asked = jnp.take_along_axis(q, index[..., None, None], 1)  # [B,W,H,D]
        q_pos = jnp.take_along_axis(now.pos, index, 1)
        kv_pos = jnp.repeat(pos, h // pos.shape[2], 2)
        where = Where(q_pos, kv_pos, head=jnp.arange(h, dtype=jnp.int32))
        if k.dtype != q.dtype:  # of the state
            asked, k = asked.astype(jnp.float32), k.astype(jnp.float32)
        s = formed(logits(asked, k, self.scale), self._spec(), where)
        p = weights(s, allowed(self.visible, where), sink).astype(q.dtype)  # [B,H,W,S]
        # c_j = sum over the window [B,H,S]
        p = jnp.where((last >= 0)[:, None, :, None], p, 0)
        return p.sum(2, dtype=jnp.float32)

    def pooled(self: Any, vote: jax.Array, early: jax.Array) -> jax.Array:
        """Votes [B,H,S] pooled along the sequence, of the tokens before the window
        (early [B,H,S]) only. The average counts what lies outside as zero votes."""
        if self.pool == "avg":
            start, add, over = 0.0, jax.lax.add, self.kernel
        else:
            start, add, over = -jnp.inf, jax.lax.max, 1
        return jax.lax.reduce_window(
            jnp.where(early, vote, start), start, add,
            (1, 1, self.kernel), (1, 1, 1), "SAME",
        ) / over
