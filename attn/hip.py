"""HiP Attention (Lee et al., 2024) arXiv:2406.09827: a tree search finds the keys.

Near tokens get near weights. So for each block of queries the keys before it are cut
into M ranges, each range in two halves, and each half is judged by its first keys
alone; the best M halves are cut again, until they are single key blocks. That is log T
rounds of M products instead of T, and then exact attention to what was found, to a
window and to the first tokens. Nothing is learned.

    L = tokens up to the block's end, less the window;   n = ceil(L / block_k)
    M = ceil(keys / block_k) ranges of n / M blocks; ceil(log2(n / M)) rounds
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache.few import at_slots
from attn.cache.kv import Cache
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.online import join, output, state_of
from attn.masks import Causal, Mask, Sink, Window
from attn.parallel.query_blocks import over_rows
from attn.parallel.sharding import Axis
from attn.sparse import chosen_blocks
from attn.sparse.block_grid import Grid, grid
from attn.sparse.tree_search import Tree, search
from pallas_kernels.logits import LogitSpec, Where

REPRESENTATIVES = ("first", "center")


@caches.of_cache
class HiPState(NamedTuple):
    """A cache of all tokens, and what the last search of each row found: chosen [B,H,M]
    key blocks, -1 for none; reach [B]: how many tokens it looked at; age [B]: tokens
    since then, with which the next search is due."""

    cache: Cache
    chosen: jax.Array
    reach: jax.Array
    age: jax.Array


@dataclasses.dataclass(frozen=True)
class HiP(Attention):
    """HiP Attention (Lee et al., 2024) arXiv:2406.09827: keys found by halving ranges.

    keys: how many the search finds for a block of `block_q` queries, in blocks of
    `block_k`; window: tokens up to a query that it sees anyway; sink: first tokens too.
    representative: what stands for a range of blocks, its "first" one as in the
    authors' code, or the one in its "center", as the paper argues. refresh: in `step`,
    single tokens search again every so many tokens, and use what was found meanwhile;
    the window then reaches back to the end of what was searched (proposed, not
    published). T < S queries are the last ones. Every query head searches by itself.

    The search of a block is led by all of its queries (every second one): outputs
    depend on later queries of their own block, and on keys up to its end.

    As proposed here, not published: packed sequences, each on blocks of its own; over
    an `axis`, query blocks are split and keys are whole on every device.
    """

    keys: int = 512
    block_q: int = 32
    block_k: int = 2
    window: int = 128
    sink: int = 0
    representative: str = "first"
    refresh: int = 1
    scale: float | None = None
    axis: Axis | None = None
    implementation: str | None = None
    row = TemplateRow(MASKED, "(r + w) L D + r L D log(L/r)", 1)

    def __post_init__(self):
        least = {"keys": 1, "block_q": 1, "block_k": 1, "window": 0, "sink": 0,
                 "refresh": 1}
        check_fields(
            self, least=least, choices={"representative": REPRESENTATIVES})

    @property
    def ahead(self) -> int:
        """Queries up to the end of the own block lead its search."""
        return self.block_q

    @property
    def found(self) -> int:
        """M, the key blocks that a search finds."""
        return -(-self.keys // self.block_k)

    @property
    def near(self) -> Mask | None:
        """What a query sees without a search, causality apart; None for nothing."""
        if not self.sink:
            return Window(self.window - 1) if self.window else None
        sink = Sink(self.sink)
        return Window(self.window - 1) | sink if self.window else sink

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V]; with
        S > T the queries are the last ones. ValueError for more queries than keys."""
        check(q, k, v, segments=segments, aligned=segments is not None)
        b, t, s = q.shape[0], q.shape[1], k.shape[1]
        if t > s:
            raise ValueError(f"{t} queries and {s} keys: expected S of T or more")
        now = locate(segments, b, t)
        packed = segments is not None
        if not packed:  # one row stands for all
            now = TokenPositions(*(a[:1] for a in now))
        rows = grid(now.pos + (s - t), now.segment, self.block_q, packed=packed)
        at = locate(None, 1, s) if s != t else now
        columns = grid(at.pos, at.segment, self.block_k, packed=packed)
        return self._read(q, k, v, rows, columns)

    def _read(self, q, k, v, rows: Grid, columns: Grid) -> jax.Array:
        """What tokens on the grid `rows` find among those on the grid `columns`."""
        first = columns.first_block(rows.owner)
        told = rows.pos, rows.segment, first, rows.last + 1
        at = columns.pos, columns.segment
        args = rows.put(q), told, None, columns.put(k), columns.put(v), at
        o = rows.take(over_rows(self._local, self.axis, *args), q.shape[1])
        return columns.poison(rows.poison(o)).astype(v.dtype)

    def _local(self, q, rows, _, k, v, columns, head) -> jax.Array:
        """q [B,N,I,H,D] of query blocks, k and v [B,S,K,.] -> [B,N,I,H,V]."""
        pos, segment, first, seen = rows
        b, n, size, h, _ = q.shape
        # what the window shows anyway is not searched
        tree = Tree(first, jnp.maximum(seen - self.window, 0), seen)
        chosen = search(
            self._asking(q, segment), k, tree, self.found, self.block_k,
            center=self.representative == "center")  # [B,N,H,M]
        # a block may be found twice, and counts once
        chosen = chosen_blocks.distinct(jnp.moveaxis(chosen, 2, 1))
        flat = lambda a: a.reshape(a.shape[0], -1)  # [B,N,I] -> [B,N I]
        where = Where(
            flat(pos), flat(columns[0]), flat(segment), flat(columns[1]), head)
        q = q.reshape(b, n * size, h, -1)

        def attend(chosen, mask):
            return state_of(*chosen_blocks.attend(
                q, k, v, chosen, LogitSpec(Causal() & mask, self.scale), where,
                block=self.block_k, implementation=self.implementation))

        near = self.near
        if near is None:
            state = attend(chosen, Causal())
        else:
            local = self._near_blocks(first, seen, k.shape[2], b)
            state = join(attend(chosen, ~near), attend(local, near))
        return output(state).reshape(b, n, size, h, -1).astype(v.dtype)

    def _asking(self, q, segment) -> jax.Array:
        """The queries that lead a block's search: rows 1, 3, 5, ... of it, those that
        are there; its only row where there is one. [B,N,I,H,D] -> [B,N,R,H,D]."""
        if q.shape[2] == 1:
            return q
        real = segment[..., 1::2, None, None] > 0
        # row 0 stands in for those that are not there: it changes no maximum but that
        # of a block without row 1, where it is the only one
        stand_in = jnp.where(
            segment[..., 1:2, None, None] > 0, q[:, :, 1:2], q[:, :, :1])
        return jnp.where(real, q[:, :, 1::2], stand_in)

    def _near_blocks(self, first, seen, heads: int, b: int) -> jax.Array:
        """The key blocks [B,K,N,n] of the window and of the first tokens."""
        sinks = jnp.arange(-(-self.sink // self.block_k), dtype=jnp.int32)
        # the window of the block's first query, which may be a later one's
        begin = jnp.maximum(seen - self.block_q - self.window + 1, 0) // self.block_k
        count = (self.block_q + self.window) // self.block_k + 2 if self.window else 0
        at = begin[..., None] + jnp.arange(count, dtype=jnp.int32)[None, None]
        at = jnp.where(at * self.block_k < seen[..., None], at, -1)
        sinks = jnp.broadcast_to(sinks[None, None], (*seen.shape, len(sinks)))
        there = sinks * self.block_k < seen[..., None]
        if self.window:
            there = there & (sinks < begin[..., None])
        at = jnp.concatenate([jnp.where(there, sinks, -1), at], -1)
        at = jnp.where(at < 0, -1, at + first[..., None])[:, None]
        return jnp.broadcast_to(at, (b, heads, *at.shape[2:]))

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens: all keys and values."""
        caches.check_size(size)
        b, h = q.shape[0], q.shape[2]
        return HiPState(
            caches.empty(k, v, size),
            jnp.full((b, h, self.found), -1, jnp.int32),
            jnp.zeros((b,), jnp.int32), jnp.full((b,), self.refresh, jnp.int32),
        )

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Blocks of queries begin with the
        piece. Past the state's size: ValueError, and NaN inside a trace."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        cache = state.cache
        caches.check_fits(cache, k, v)
        (b, t), slots = q.shape[:2], cache.k.shape[1]
        now = locate(segments, b, t, cache.end, cache.segment)
        caches.check_room(now.next_pos, slots)
        after = caches.append(cache, k, v, now, now.pos)
        if t == 1:
            state, o = self._decode(state, after, q, now)
        else:
            packed = segments is not None
            rows = grid(now.pos, now.segment, self.block_q, packed=packed)
            both, segment = after, (after.pos[..., 0] >= 0).astype(jnp.int32)
            if packed:
                both, segment = caches.concat(cache, k, v, now)
                segment = jnp.where(both.pos[..., 0] >= 0, segment, 0)
            columns = grid(both.pos[..., 0], segment, self.block_k, packed=packed,
                           spare=slots // self.block_k)
            read, wide = caches.of_one_type(both, q)
            o = self._read(wide, read.k, read.v, rows, columns)
            due = jnp.full_like(state.age, self.refresh)
            state = HiPState(after, state.chosen, state.reach, due)
        return state, caches.poison(o.astype(v.dtype), now.next_pos, slots)

    def _decode(self, state: HiPState, after: Cache, q, now: TokenPositions):
        """One token q [B,1,H,D] over the cache that holds it."""
        seen = now.pos[:, 0] + 1  # [B]
        reach = jnp.maximum(seen - self.window, 0)
        real = now.segment[:, 0] > 0
        due = real & ((state.age >= self.refresh) | (now.segment[:, 0] > 1))
        wide, asking = caches.of_one_type(after, q)

        def renewed(_):
            tree = Tree(*(a[:, None] for a in (jnp.zeros_like(reach), reach, seen)))
            return search(
                asking[:, None], wide.k, tree, self.found, self.block_k,
                center=self.representative == "center")[:, 0]  # [B,H,M]

        chosen = jax.lax.cond(due.any(), renewed, lambda old: old, state.chosen)
        chosen = jnp.where(due[:, None, None], chosen, state.chosen)
        reach = jnp.where(due, reach, state.reach)
        age = jnp.where(due, 1, state.age + real.astype(jnp.int32))
        few = self._gathered(after, chosen, reach, seen)
        segment = jnp.broadcast_to(now.segment, few.k.shape[:2])
        few, asking = caches.of_one_type(few, q)
        o = reading.read(few, segment, asking, now, LogitSpec(Causal(), self.scale),
                         implementation=self.implementation)[0]
        return HiPState(after, chosen, reach, age), o

    def _gathered(self, cache: Cache, chosen, reach, seen) -> Cache:
        """The slots that one token reads: chosen [B,H,M] blocks, the tokens from
        min(reach, seen - window) [B] on, and the first ones, each once."""
        b, h, m = chosen.shape
        # the window, and what came since the last search
        begin = jnp.maximum(jnp.minimum(reach, seen - self.window), 0)[:, None, None]
        inside = jnp.arange(self.block_k, dtype=jnp.int32).reshape(1, 1, 1, -1)
        chosen = chosen_blocks.distinct(chosen)
        far = jnp.where(chosen < 0, -1, chosen * self.block_k)[..., None] + inside
        far = jnp.where((chosen >= 0)[..., None], far, -1).reshape(b, h, -1)
        # each slot once: what the window or the first tokens have is no far one
        far = jnp.where((far < begin) & (far >= self.sink), far, -1)
        sinks = jnp.arange(self.sink, dtype=jnp.int32)[None, None]
        sinks = jnp.where(sinks < begin, sinks, -1)  # [B,1,sink]
        back = jnp.arange(max(self.window + self.refresh - 1, 1), dtype=jnp.int32)
        near = seen[:, None, None] - 1 - back[None, None]
        near = jnp.where(near >= begin, near, -1)
        both = jnp.concatenate([sinks, near], -1)
        at = jnp.concatenate([far, jnp.broadcast_to(both, (b, h, both.shape[2]))], -1)
        return at_slots(cache, jnp.moveaxis(at, 1, 2))

    def share(self, length: int) -> float:
        """Which share of the visible pairs of `length` tokens is read, at most."""
        window = min(self.window + self.sink, length)
        each = min(self.keys + window, length)
        # the first `each` queries see less than that
        read = each * (each + 1) / 2 + (length - each) * each
        return read / (length * (length + 1) / 2)
