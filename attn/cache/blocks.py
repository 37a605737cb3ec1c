"""Block cache: a cache whose tokens lie in blocks of one size, on rolling slots.

Methods that retrieve blocks remember the last complete ones and the one that is being
filled. Blocks are numbered by age; slots of a `Cache` are used again block by block.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache.kv import Cache
from attn.contract.segments import TokenPositions
from attn.sparse import by_block
from attn.sparse.chosen_blocks import gather
from attn.sparse.grouped_softmax import Retrieved

# whose blocks are retrieved: each query's and head's own, all heads' or all queries'
SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


class Tail(NamedTuple):
    """The tokens of the block that is not complete: segment [B,size] is 1, 0 where none
    is; pos [B,size]; k [B,size,K,D]; v [B,size,K,V]."""

    segment: jax.Array
    pos: jax.Array
    k: jax.Array
    v: jax.Array


class Blocks:
    """The blocks of a cache: complete ones by age, 0 the oldest, and the present one.

    many: how many fit; cached [B]: how many there are; full [B]: `top_k` or more
    have been; shift [B]: how far stingy positions lie behind the true ones.
    """

    def __init__(self, cache: Cache, size: int, top_k: int):
        self.cache, self.size, self.top_k = cache, size, top_k
        self.many = cache.k.shape[1] // size - 1  # and one is being filled
        self.total = cache.end // size
        self.cached = jnp.minimum(self.total, self.many)
        self.full = self.total >= top_k
        # the present block stands at place top_k + 1, behind those that are retrieved
        self.shift = (self.total - jnp.minimum(self.total, top_k + 1)) * size

    def slot_of(self, age: jax.Array) -> jax.Array:
        """Which block of the cache's slots holds the block of this age [B,...]."""
        lead = (-1,) + (1,) * (age.ndim - 1)
        number = (self.total - self.cached).reshape(lead) + age  # since the beginning
        return number % (self.many + 1)

    def place(self) -> jax.Array:
        """The place [B,many] in the virtual sequence at which landmarks are compared:
        1..top_k for the youngest, 0 for all others; true ones until there are top_k."""
        age = jnp.arange(self.many)[None]
        young = jnp.maximum(age - (self.cached - self.top_k)[:, None] + 1, 0)
        return jnp.where(self.full[:, None], young, age)

    def landmarks(self) -> jax.Array:
        """The keys [B,many,K,D] of landmarks by age."""
        ages = jnp.arange(self.many)[None]
        ages = jnp.broadcast_to(ages, (len(self.total), self.many))
        slot = self.slot_of(ages) * self.size + self.size - 1  # last of its block
        # [B,many,K,D]
        return jnp.take_along_axis(self.cache.k, slot[..., None, None], 1)

    def best(self, s: jax.Array, asks: jax.Array, selection: str) -> jax.Array:
        """The ages [B,H,T,n] of the blocks with the best landmarks, in order, -1 for
        none behind them. s [B,H,T,many]: what queries think of landmarks; asks [B,T]:
        which queries retrieve; selection: one of SELECTIONS."""
        there = (jnp.arange(self.many)[None] < self.cached[:, None])[:, None, None]
        asks = asks[:, None, :, None]
        # -1e30 and not -inf: a row without any block is no NaN
        p = jax.nn.softmax(jnp.where(there, s, -1e30))
        if selection == "max_over_heads":
            p = jnp.broadcast_to(p.max(1, keepdims=True), p.shape)
        if selection == "max_over_tokens":
            best = jnp.where(asks, p, 0).max(2, keepdims=True)
            p = jnp.broadcast_to(best, p.shape)
        # -1: of blocks that are not there, below every probability
        _, chosen = jax.lax.top_k(jnp.where(there, p, -1), min(self.top_k, self.many))
        chosen = jnp.sort(chosen, -1)
        known = (chosen < self.cached[:, None, None, None]) & asks
        return jnp.where(known, chosen, -1)

    def places(self, chosen: jax.Array) -> jax.Array:
        """The place [B,H,T,n] at which chosen blocks [B,H,T,n] stand: the i-th one at
        place i, or at i + 1 if it is one of the youngest."""
        b, n = len(chosen), chosen.shape[3]
        near = jnp.take_along_axis(self.place(), chosen.reshape(b, -1), 1) > 0
        near = (near & self.full[:, None]).reshape(chosen.shape)
        return jnp.arange(n, dtype=jnp.int32)[None, None, None] + near.astype(jnp.int32)

    def retrieved(
        self, q: jax.Array, pos: jax.Array, chosen: jax.Array, turned: Callable,
        **how: Any,
    ) -> Retrieved:
        """What unturned queries q [B,T,H,D] at pos [B,T] find in chosen blocks
        [B,H,T,n]; turned(a, pos) turns tokens, how: of `by_block.each`.

        Only differences of positions count: so it is the query that is turned, back by
        the place of each block, and a block's keys are the same for all of them.
        """
        (b, t, h, d), n, size = q.shape, chosen.shape[3], self.size
        back = pos[:, None, :, None] - self.places(chosen) * size
        # [B,T,H,D] -> [B,H,T,n,D]: a copy of the query for each of its blocks
        rows = jnp.broadcast_to(q.swapaxes(1, 2)[:, :, :, None], (b, h, t, n, d))
        rows = turned(rows.reshape(b, -1, 1, d), back.reshape(b, -1))
        rows = rows.reshape(b, h, t, n, d)
        where, k, v = self._held(chosen)
        inside = jnp.arange(k.shape[1], dtype=jnp.int32)[None] % size
        k = turned(k, inside)
        # the landmark, a block's last token, takes no part inside of it
        values = by_block.each(
            rows, k, v, where, jnp.where(inside < size - 1, 0, -1), block=size, **how)
        # [B,M,K,D] of the landmarks -> [B,H,T n,D]
        marks = jnp.repeat(k[:, size - 1::size], h // k.shape[2], 2).swapaxes(1, 2)
        at = jnp.maximum(where, 0).reshape(b, h, -1, 1)
        marks = jnp.take_along_axis(marks, at, 2).reshape(b, h, t, n, d)
        # [B,H,T,n,D] x [B,H,T,n,D] -> [B,H,T,n]: each query and its block's landmark
        s = how["scale"] * jnp.einsum(
            "bhtnd,bhtnd->bhtn", rows, marks, preferred_element_type=jnp.float32)
        s = jnp.where(chosen >= 0, s, -jnp.inf)
        # query heads in their groups: [B,K,G,...]
        heads = self.cache.k.shape[2]
        s, values = (a.reshape(b, heads, -1, *a.shape[2:]) for a in (s, values))
        return Retrieved(s, values)

    def _held(self, chosen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Where chosen blocks [B,H,T,n] are in keys and values [B,S,K|H,.]: those of
        the cache, or for one token the n blocks of each head alone."""
        b, h, t, n = chosen.shape
        where = jnp.where(chosen < 0, -1, self.slot_of(chosen))
        k, v = self.cache.k, self.cache.v
        if t > 1:
            return where, k, v
        # [B,H,1,n,size,X] -> [B,n size,H,X]
        k, v = (gather(a, where, self.size).reshape(b, h, n * self.size, -1).swapaxes(
            1, 2) for a in (k, v))
        number = jnp.arange(n, dtype=jnp.int32)[None, None, None]
        return jnp.where(chosen < 0, -1, number), k, v

    def slot(self, now: TokenPositions) -> jax.Array:
        """Where new tokens go [B,T]; -1 for those that later tokens replace."""
        slots = (self.many + 1) * self.size
        return jnp.where(now.pos >= now.next_pos[:, None] - slots, now.pos % slots, -1)

    def tail(self) -> Tail:
        """The tokens of the block that is not complete."""
        inside = jnp.arange(self.size)[None]
        first = self.total[:, None] % (self.many + 1) * self.size
        segment = (inside < (self.cache.end % self.size)[:, None]).astype(jnp.int32)
        at = (first + inside)[..., None, None]  # [B,size,1,1]
        k, v = (jnp.take_along_axis(a, at, 1) for a in (self.cache.k, self.cache.v))
        return Tail(segment, self.total[:, None] * self.size + inside, k, v)
