"""SnapKV (Li et al., 2024) arXiv:2404.14469: the end of a prompt votes for its keys.

What the last tokens of a prompt look at is what the answer will look at. So when the
prompt has been read, its last `window` queries vote: each key's weights are added up
over them, the votes are pooled along the sequence so that neighbours of a chosen token
come with it, and every head keeps the `capacity - window` keys with the most votes and
the window itself. The prompt's own attention is exact; only what is stored shrinks, and
tokens generated afterwards are added and never dropped. Nothing is learned.

    c_j = sum_(i in window) softmax_j(q_i k_j / sqrt D),   kept = top_(C-W) pool_P(c)

As computed here a piece of several tokens is taken for (a part of) a prompt, so a
prompt read in pieces is compressed after each one, which is proposed, not published;
read in one piece it is the authors' algorithm.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.cache.policy import Policy
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions
from attn.exact.dense import allowed, formed, logits, weights
from attn.exact.logits import Where
from attn.softmax import Softmax

POOLS = ("avg", "max")


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy, Softmax):
    """SnapKV (Li et al., 2024) arXiv:2404.14469: keep the prompt keys that its end
    votes for.

    capacity C: tokens of the prompt that each head keeps, `window` W of them the last
    ones; kernel P: odd width of the pooling, "avg" or "max". share_group: the query
    heads of a group vote together and the cache stays [B,C,K,D]; otherwise each query
    head keeps its own, as in the authors' code, and the cache grows to H heads. The
    other fields are those of `Softmax`.
    """

    capacity: int = 320
    window: int = 64
    kernel: int = 5
    pool: str = "avg"
    share_group: bool = True
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, choices={"pool": POOLS}, least={"kernel": 1})
        if not 0 < self.window < self.capacity:
            raise ValueError(
                f"SnapKV: window={self.window}, capacity={self.capacity}: "
                "expected 0 < window < capacity"
            )
        if self.kernel % 2 == 0:
            raise ValueError(f"SnapKV: kernel={self.kernel}: expected an odd width")

    def importance(
        self, q: jax.Array, cache: Cache, now: TokenPositions, sink: Any = None
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

    def votes(self, q, k, pos, now: TokenPositions, sink=None) -> jax.Array:
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

    def pooled(self, vote: jax.Array, early: jax.Array) -> jax.Array:
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
