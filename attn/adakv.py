"""AdaKV (Feng et al., 2024) arXiv:2407.11550: heads share one budget by what they need.

Some heads look at a few keys, others at many. So the keys of all heads of a layer
compete for one budget: the K b pooled votes that are greatest say how many keys each
head gets, and a floor of `floor` b keys a head keeps any from starving. Then each head
keeps its own best keys and the window. The votes are SnapKV's. Nothing is learned.

    n_h = how many of the K b greatest scores s[h, j] are of head h,   b = C - W
    n_h <- round(n_h (1 - floor) + int(b floor)),   kept_h = top_(n_h)(s_h) and window

Heads hold different numbers of tokens, in one row of slots (`attn/cache/flat.py`), so
that a layer takes K C slots (and at most one a head more, as n_h are rounded), however
they are shared: nothing is padded to the largest head. What is generated is added.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attn.cache import flat, kv as caches, reading
from attn.cache.flat import Flat
from attn.cache.votes import Voting
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.calls import refuse_keywords
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.online import join, output, state_of, without_value
from attn.softmax import Softmax
from pallas_kernels.arrays import check_logits


@dataclasses.dataclass(frozen=True)
class AdaKV(Voting, Softmax):
    """AdaKV (Feng et al., 2024) arXiv:2407.11550: head-adaptive budgets in a layer.

    capacity C: tokens of the prompt that a key head keeps in the mean, `window` W of
    them the last ones; floor: the share of the mean that every head gets (1: the same
    for all). kernel, pool: see `SnapKV`; the votes of a group are averaged, then
    pooled. The other fields are those of `Softmax`. Not over a mesh axis `model`:
    heads share slots.
    """

    capacity: int = 320
    window: int = 32
    kernel: int = 7
    pool: str = "max"
    floor: float = 0.2
    refuses = {
        "storage": "heads share one row of slots, and codes of a group are of tokens "
                   "of one head",
        "reading": "heads share one row of slots, and marks of a block are of tokens "
                   "of one head",
    }
    row = TemplateRow(MASKED, "L^2 D, then r D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        self.check_voting()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"AdaKV: floor={self.floor}: expected in [0, 1]")

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for a prompt as long as q and the rest of `size` tokens."""
        caches.check_size(size)
        prompt = min(q.shape[1], size)
        # one slot a head more, as budgets are rounded
        kept = prompt if prompt <= self.capacity else self.capacity + 1
        return flat.empty(k, v, kept + size - prompt)

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None, **unknown
    ):
        """The next T tokens -> state, [B,T,H,V]: one token is appended, a piece is
        attended to exactly and then compressed."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        slots, heads = state.pos.shape[1:]
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        if q.shape[1] > 1:
            o = self._piece(state, q, k, v, now, sink).astype(v.dtype)
            mine = self._held(state, k, v, now)
            kept = self.chosen(q, mine, now, sink)
            return flat.keep(flat.flatten(mine), kept, slots), o
        after, used = flat.append(state, k, v, now)
        tokens = -(-used // heads)
        caches.check_room(tokens, slots)
        cache, wide = caches.of_one_type(caches.Cache(*after), q)
        o = flat.read(Flat(*cache), wide, now, self._spec(), sink=sink,
                      implementation=self.implementation)[0]
        return after, caches.poison(o.astype(v.dtype), tokens, slots)

    def _piece(self, state: Flat, q, k, v, now: TokenPositions, sink):
        """Exact attention of a piece: to what is held, and to its own tokens."""
        spec = self._spec()
        how: dict[str, Any] = {"implementation": self.implementation}
        cache, wide = caches.of_one_type(caches.Cache(*state), q)
        old = flat.read(Flat(*cache), wide, now, spec, split_lse=True, **how)
        own = caches.Cache(k, v, now.pos[..., None], *now[2:])
        new = reading.read(own, now.segment, q, now, spec, split_lse=True, **how)
        both = join(state_of(*old), state_of(*new))
        if sink is not None:
            both = join(both, without_value(sink, both))
        return output(both)

    def _held(self, state: Flat, k, v, now: TokenPositions) -> caches.Cache:
        """What is held and what comes, of the sequence that goes on, in order."""
        both, segments = caches.concat(flat.by_head(state), k, v, now)
        return caches.in_order(caches.only_current(both, segments))

    def chosen(
        self, q, cache: caches.Cache, now: TokenPositions, sink: Any = None
    ) -> jax.Array:
        """Which slots [B,C,K] each head keeps."""
        window = now.next_pos[:, None, None] - self.window  # its first position
        early = (cache.pos >= 0) & (cache.pos < window)
        score = self.head_scores(q, cache, now, early, sink)  # [B,K,C]
        early, many = jnp.moveaxis(early, 1, 2), self.budgets(score)
        rank = jnp.argsort(jnp.argsort(-score, axis=2, stable=True), axis=2)  # [B,K,C]
        # fewer than b tokens before the window: all are kept
        few = early.sum(2, keepdims=True) < self.capacity - self.window
        kept = (early & (few | (rank < many[..., None]))) | ~early
        return jnp.moveaxis(kept, 1, 2)

    def head_scores(self, q, cache, now, early, sink=None) -> jax.Array:
        """The votes for each key head [B,K,C], the mean over its group, pooled; -inf
        but for `early` slots [B,C,K]."""
        b, _, h, _ = q.shape
        heads, early = early.shape[2], jnp.moveaxis(early, 1, 2)
        vote = self.votes(q, cache.k, cache.pos, now, sink)  # [B,H,C]
        vote = vote.reshape(b, heads, h // heads, -1).mean(2) / self.window
        # pooled behind the mean of the group: a maximum does not commute with it
        return jnp.where(early, self.pooled(vote, early), -jnp.inf)

    def budgets(self, score) -> jax.Array:
        """How many keys before the window each head keeps [B,K], by scores [B,K,C]."""
        b, heads, slots = score.shape
        mean = self.capacity - self.window
        many = min(heads * mean, heads * slots)
        # all heads of the layer in one list [B,K C]
        best, at = jax.lax.top_k(score.reshape(b, -1), many)
        of = jnp.where(best > -jnp.inf, at // slots, heads)  # [B,K b]
        count = (of[:, None] == jnp.arange(heads)[None, :, None]).sum(2)  # n_h [B,K]
        least = int(mean * self.floor)
        # round half to even
        share = count.astype(jnp.float32) * (1 - self.floor)
        return jnp.round(share + least).astype(jnp.int32)
