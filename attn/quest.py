"""Quest (Tang et al., 2024) arXiv:2406.10774: a token reads the pages that may matter.

What matters depends on the query: so nothing is dropped, but few keys are read. They
lie in pages, of each of which the least and greatest value of every channel are kept:
they bound what any key of the page can give to a query. A query head reads the pages
with the greatest bounds, exactly. Prompts are read whole. Nothing is learned.

    U_P = sum_d max(q_d min_(P,d), q_d max_(P,d)) >= max_(j in P) q . k_j
    read: the max(3, budget / page) pages with the greatest U

The paper reads the first two layers whole: give these `Softmax()`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache.few import at_slots
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.calls import refuse_keywords
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.masks import Causal
from attn.softmax import Softmax
from pallas_kernels.arrays import check_logits


@caches.of_cache
class QuestState(NamedTuple):
    """A cache of all tokens, and the least and greatest value of each page's keys, low
    and high [B,P,K,D] in their dtype."""

    cache: Cache
    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Quest(Softmax):
    """Quest (Tang et al., 2024) arXiv:2406.10774: query-aware choice of pages.

    page: keys of a page; budget: keys that a query head reads, of at least `least`
    pages. newest: the page that is being filled is read in any case (an option here;
    its bound is among the greatest anyway). The other fields are those of `Softmax`.
    All keys stay in memory.
    """

    page: int = 16
    budget: int = 1024
    least: int = 3
    newest: bool = False
    part = "reading"
    row = TemplateRow(MASKED, "L^2 D, then (L / b + r) D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"page": 1, "budget": 1, "least": 1})
        if self.mask is not None and self.mask != Causal():
            raise ValueError(
                f"Quest: mask={self.mask}: pages are chosen among all earlier ones, "
                "expected None"
            )

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: keys, values, and bounds of pages."""
        caches.check_size(size)
        return QuestState(caches.empty(k, v, size), *self.marks(size, k))

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None, **unknown
    ):
        """The next T tokens -> state, [B,T,H,V]: one reads some pages, a piece all."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        cache, slots = state.cache, state.cache.k.shape[1]
        caches.check_fits(cache, k, v)
        now = locate(segments, q.shape[0], q.shape[1], cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        after = QuestState(
            caches.append(cache, k, v, now, now.pos), *self._bounded(state, k, now))
        if q.shape[1] == 1:
            few = at_slots(after.cache, self.chosen_slots(after, q[:, 0]))
            few, wide = caches.of_one_type(few, q)
            segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
            o = reading.read(few, segment, wide, now, self._spec(), sink=sink,
                             implementation=self.implementation)[0]
        else:
            read = caches.concat(cache, k, v, now)
            o = self.read(*read, q, now, sink=sink)
        return after, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def _bounded(self, state: QuestState, k, now: TokenPositions) -> tuple:
        """low and high with new keys k [B,T,K,D]."""
        pages = state.low.shape[1]
        # tokens that are not kept name a page outside, and are dropped
        page = jnp.where(caches.current(now), now.pos // self.page, pages)
        row = jnp.arange(k.shape[0])[:, None]
        # pages that no token had before hold zeros, which bound nothing
        had = jnp.where((now.segment > 1).any(1), 0, state.cache.end)
        filled = jnp.arange(pages)[None] * self.page < had[:, None]
        filled, k = filled[..., None, None], k.astype(state.low.dtype)
        low = jnp.where(filled, state.low, jnp.inf)
        high = jnp.where(filled, state.high, -jnp.inf)
        low = low.at[row, page].min(k, mode="drop")
        high = high.at[row, page].max(k, mode="drop")
        return tuple(jnp.where(jnp.isinf(a), 0, a) for a in (low, high))

    def marks(self, slots: int, k) -> tuple:
        """Bounds of the empty pages of `slots` slots, for keys like k [B,.,K,D]."""
        b, _, heads, d = k.shape
        zeros = jnp.zeros((b, -(-slots // self.page), heads, d), k.dtype)
        return zeros, zeros

    def marked(self, marks: tuple, k, now: TokenPositions, end) -> tuple:
        """The bounds with new keys k [B,T,K,D] at slots `now`, behind `end` [B]."""
        return self._bounded(QuestState(_clock(end), *marks), k, now)

    def picked(self, marks: tuple, cache: Cache, q, now: TokenPositions) -> jax.Array:
        """The slots [B,N,H] that one token q [B,1,H,D] at slot `now` reads."""
        return self.chosen_slots(
            QuestState(cache._replace(end=now.next_pos), *marks), q[:, 0])

    def bounds(self, state: QuestState, q) -> jax.Array:
        """U [B,H,P] float32 of queries q [B,H,D]; -inf for a page without a token."""
        b, h, d = q.shape
        heads = state.cache.k.shape[2]
        q = q.astype(jnp.float32).reshape(b, heads, h // heads, d)  # [B,K,G,D]
        low, high = (a.astype(jnp.float32) for a in (state.low, state.high))
        # max(q l, q h) = q h where q > 0, else q l: [B,K,G,D] x [B,P,K,D] -> [B,K,G,P]
        u = jnp.einsum("bkgd,bpkd->bkgp", jnp.maximum(q, 0), high)
        u = u + jnp.einsum("bkgd,bpkd->bkgp", jnp.minimum(q, 0), low)
        number = jnp.arange(u.shape[3], dtype=jnp.int32)[None] * self.page
        there = number < state.cache.end[:, None]  # [B,P]
        if self.newest:
            last = there & (number + self.page >= state.cache.end[:, None])
            # above every bound, and so always among the greatest
            u = jnp.where(last[:, None, None], jnp.inf, u)
        return jnp.where(there[:, None, None], u, -jnp.inf).reshape(b, h, -1)

    def chosen_slots(self, state: QuestState, q) -> jax.Array:
        """The slots [B,N,H] that each query head q [B,H,D] reads, -1 for none."""
        u = jax.lax.stop_gradient(self.bounds(state, q))
        many = min(max(self.least, self.budget // self.page), u.shape[2])
        best, page = jax.lax.top_k(u, many)  # [B,H,N]
        page = jnp.where(best > -jnp.inf, page, -1)[..., None]
        inside = jnp.arange(self.page, dtype=jnp.int32)
        slot = page * self.page + inside.reshape(1, 1, 1, -1)  # [B,H,N,page]
        # the last page may reach past the memory
        there = (page >= 0) & (slot < state.cache.end[:, None, None, None])
        slot = jnp.where(there, slot, -1).reshape(*u.shape[:2], -1)
        return jnp.moveaxis(slot, 1, 2)  # [B,H,N page] -> [B,N page,H]


def _clock(end: jax.Array) -> Cache:
    """A cache of which only the next token's position [B] is asked."""
    return Cache(end, end, end, end, end)
