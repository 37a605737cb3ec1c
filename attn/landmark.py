"""Landmark Attention (Mohtashami and Jaggi, 2023) arXiv:2305.16300: a token per block
stands for it, and attending to that token is retrieving the block.

After every `block` tokens of text the sequence holds a landmark. A query gives weight
to the text of its own block and to the landmarks of earlier ones; what a landmark gets
is dealt out among its block's tokens (`attn/sparse/grouped_softmax.py`). So the model
learns to point at blocks while it learns to read, and at inference it needs only the
`top_k` blocks whose landmarks a query likes best, at positions that stay small however
long the text. Rows of one sequence pass by in chunks as in exact attention
(`attn/exact/gated_groups.py`).

`interleave` puts the landmarks into a text; `models.lm.LM` does that by itself.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.blocks import SELECTIONS, Blocks
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact import chunked
from attn.masks import Causal
from attn.parallel.sharding import Axis, gather, over_mesh, spread_heads
from attn.positions import RoPE
from attn.sparse.grouped_softmax import grouped
from attn.sparse.groups import Row, compact, irregular, regular
from attn.sparse.interleaved import interleave
from pallas_kernels.logits import Dropout, LogitSpec, Where


@dataclasses.dataclass(frozen=True)
class Landmark(Attention):
    """Landmark Attention (Mohtashami and Jaggi, 2023) arXiv:2305.16300: landmark tokens
    gate their blocks.

    block: tokens of text before each landmark, so that token t of a sequence is a
    landmark where t % (block + 1) == block. top_k: blocks that a query retrieves in
    `step`; None attends to all of them, which equals `__call__`. cache_blocks: how many
    complete blocks are remembered (None: all). selection: whether every query and head
    retrieves its own blocks, all heads the same, or all tokens of a piece the same.

    rope: the rotation, which `MultiHead` hands over: with `top_k`, keys are cached
    unrotated and given positions in a short virtual sequence: slot 0 for all far blocks
    (whose landmarks are compared there), the next `top_k` for the retrieved ones, then
    the text at hand. dropout: of the block gates, when called with a `key`; jump (the
    authors' `pos_jump_on_mem`): each landmark moves later positions on by a random
    number below it, with a `key`. implementation: "dense" has forward-mode derivatives
    too, where the default has a backward pass of its own.

    As proposed here, not published: fewer than `top_k` cached blocks stand at their
    true positions; packed segments; grouped heads retrieve a query head each.
    """

    block: int = 50
    top_k: int | None = None
    cache_blocks: int | None = None
    selection: str = "per_token_and_head"
    rope: RoPE | None = None
    scale: float | None = None
    dropout: float = 0.0
    jump: int = 0
    axis: Axis | None = None
    implementation: str | None = None
    noise = "dropout", "jump"
    row = TemplateRow(MASKED, "L^2 D, or L^2 D / b + L r b D for r blocks", 2)

    def __post_init__(self):
        least = {"block": 1, "top_k": 1, "cache_blocks": 1, "jump": 0}
        check_fields(self, least=least, choices={"selection": SELECTIONS})
        most = 2**30 if self.top_k is None else self.top_k
        if self.cache_blocks is not None and self.cache_blocks < most:
            raise ValueError(
                f"Landmark: cache_blocks={self.cache_blocks}, top_k={self.top_k}: "
                "expected top_k of at most cache_blocks"
            )

    @property
    def text_block(self) -> int:
        """Tokens of text before each landmark."""
        return self.block

    def interleave(self, tokens, segments, end, last, own: int):
        """The text with its landmarks, whose id is `own`: see `interleave` below."""
        return interleave(
            tokens, segments, end, last, block=self.block, landmark=own
        )

    @property
    def size(self) -> int:
        """Tokens of a block with its landmark."""
        return self.block + 1

    def __call__(self, q, k, v, *, x=None, segments=None, landmark=None, key=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V].

        landmark [B,T] bool: where landmarks are, if not after every `block` tokens.
        key: a PRNG key, for dropout and jumps.
        """
        check(q, k, v, segments=segments, aligned=True)
        now = locate(segments, q.shape[0], q.shape[1])
        queries = keys = self._row(now, segments is not None, landmark)
        jumps, gates = (None, None) if key is None else jax.random.split(key)
        q, k = self._rotated(q, k, self._jumped(now.pos, queries.mark, jumps))
        if landmark is None and segments is not None:
            # padding goes behind: groups then follow each other without gaps
            segment, pos, k, v = compact(now.segment, now.pos, k, v)
            keys = regular(segment, pos, self.size)
        k, v = (spread_heads(a, q.shape[2], self.axis) for a in (k, v))
        size = self.size if landmark is None else None
        local = functools.partial(self._local, size=size, key=gates)
        letters = "BTHD BSKD BSKV BT BS -> BTHV"
        return over_mesh(local, letters, self.axis)(q, k, v, queries, keys)

    def _local(self, q, k, v, queries: Row, keys: Row, *, size, key=None):
        if self.axis is not None and key is not None and self.dropout:
            raise NotImplementedError("dropout over a mesh axis is not there yet")
        k, v, keys = jax.tree.map(lambda a: gather(a, self.axis), (k, v, keys))
        form = functools.partial(
            grouped, q, k, v, queries, keys, size=size, scale=self._scale(q),
            ordered=self.axis is None, dropout=Dropout(self.dropout, key),
        )

        def best():
            dropped = key is not None and self.dropout > 0
            if size is None or keys.spills is not None or dropped:
                return form()
            counted = self.axis is None
            where = Where() if counted else Where(q_pos=queries.pos, kv_pos=keys.pos)
            return self._by_gates(q, k, v, where)

        return pick(self.implementation, xla=best,
                    dense=functools.partial(form, by_hand=False))

    def _by_gates(self, q, k, v, where: Where):
        """Attention to keys whose groups begin where they would in a row of their own:
        that is exact attention but for its gates."""
        spec = LogitSpec(Causal(), self._scale(q))
        return chunked.attend(q, k, v, spec, where, group=self.size)[0]

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, landmarks included, rounded up to blocks:
        a `Cache` in whose slots the blocks follow each other as a ring."""
        caches.check_size(size)
        if self.top_k is None:
            return caches.empty(k, v, size)
        # one block more than is held: the one that is being filled
        held = -(-size // self.size)
        held = held if self.cache_blocks is None else min(held, self.cache_blocks)
        return caches.empty(k, v, (held + 1) * self.size)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens, landmarks included -> state, [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        caches.check_fits(state, k, v)
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        dtype = v.dtype
        # tokens of another type are read as the state holds them
        q, k, v = (a.astype(state.k.dtype) for a in (q, k, v))
        if self.top_k is not None:
            state, o = self._retrieving(state, q, k, v, now)
        else:
            state, o = pick(
                self.implementation,
                xla=lambda: self._exact(state, q, k, v, now, segments is not None))
        return state, o.astype(dtype)

    def _exact(self, state, q, k, v, now: TokenPositions, packed: bool):
        """The cache holds all tokens, rotated, and a query sees every block."""
        slots = state.k.shape[1]
        caches.check_room(now.next_pos, slots)
        q, k = self._rotated(q, k, now.pos)
        after = caches.append(state, k, v, now, now.pos)
        if not packed:
            where = Where(q_pos=now.pos, kv_pos=after.pos[..., 0])
            o = self._by_gates(q, after.k, after.v, where)
            return after, caches.poison(o, now.next_pos, slots)
        both, segment = caches.concat(state, k, v, now)
        if q.shape[1] == 1:
            # the token's own sequence is all that is left in the cache
            both, segment = after, jnp.broadcast_to(now.segment, (q.shape[0], slots))
        pos = both.pos[..., 0]
        row = jnp.where(pos >= 0, segment, 0), pos, both.k, both.v
        o = self._read(q, row if q.shape[1] == 1 else compact(*row), now)
        return after, caches.poison(o, now.next_pos, slots)

    def _read(self, q, row, now: TokenPositions, retrieve=None):
        """Attention of q at `now` to a row (segment, pos, k, v) without gaps."""
        segment, pos, k, v = row
        return grouped(
            q, k, v, self._row(now), regular(segment, pos, self.size), size=self.size,
            scale=self._scale(q), retrieve=retrieve,
        )

    def _retrieving(self, state, q, k, v, now: TokenPositions):
        """The own block, the piece itself, and `top_k` blocks of the cache a query."""
        ring = Blocks(state, self.size, self.top_k or 0)
        if ring.many != self.cache_blocks:
            caches.check_room(now.next_pos, state.k.shape[1])
        # only the sequence that goes on has blocks in the cache
        shift = jnp.where(now.segment == 1, ring.shift[:, None], 0)
        after = caches.append(state, k, v, now, ring.slot(now))
        tail = ring.tail()

        def join(a, b):
            return jnp.concatenate([a, b.astype(a.dtype)], 1)  # in the state's type

        at = join(tail.pos - ring.shift[:, None], now.pos - shift)
        keys = join(tail.k, k)
        plain, q = q, self._turned(q, now.pos - shift)
        keys = self._turned(keys, at)  # cached before their rotation
        row = compact(
            join(tail.segment, now.segment), join(tail.pos, now.pos), keys,
            join(tail.v, v),
        )
        retrieve = None
        if self.top_k:
            found = ring.retrieved(
                plain, now.pos - shift, self._chosen(q, ring, now), self._turned,
                scale=self._scale(q), implementation=self.implementation)
            retrieve = lambda index: jax.tree.map(lambda a: a[:, :, :, index], found)
        o = self._read(q, row, now, retrieve)
        forgets = ring.many == self.cache_blocks  # so it is never full
        full = jnp.zeros_like(now.next_pos) if forgets else now.next_pos
        return after, caches.poison(o, full, state.k.shape[1])

    def _chosen(self, q, ring: Blocks, now: TokenPositions) -> jax.Array:
        """The cached blocks that each query retrieves, as ages [B,H,T,n] in order, -1
        for none behind them."""
        # the last token of its place; all far blocks share place 0
        k = self._turned(ring.landmarks(), ring.place() * self.size + self.block)
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])  # [B,T,K,G,D]
        # [B,T,K,G,D] x [B,N,K,D] -> [B,K,G,T,N]: what queries think of landmarks
        s = jnp.einsum("btkgd,bnkd->bkgtn", q, k, preferred_element_type=jnp.float32)
        s = s.reshape(s.shape[0], -1, *s.shape[3:]) * self._scale(q)  # [B,H,T,N]
        return ring.best(s, now.segment == 1, self.selection)

    def _row(self, now: TokenPositions, packed: bool = True, landmark=None) -> Row:
        if landmark is None:
            return regular(now.segment, now.pos, self.size, packed=packed)
        if landmark.shape != now.segment.shape:
            raise ValueError(
                f"landmark has shape {landmark.shape}: expected {now.segment.shape}"
            )
        return irregular(now.segment, now.pos, landmark)

    def _jumped(self, pos, mark, key):
        """Positions, moved on behind each landmark by what the key says."""
        if key is None or not self.jump:
            return pos
        steps = jax.random.randint(key, pos.shape, 0, self.jump)
        # a landmark moves those behind it, not itself: an exclusive sum
        steps = jnp.where(mark, steps, 0)
        return pos + jnp.cumsum(steps, 1) - steps

    def _scale(self, q) -> float:
        return q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def _turned(self, a, pos):
        return a if self.rope is None else self.rope.rotate(a, pos)

    def _rotated(self, q, k, pos):
        return self._turned(q, pos), self._turned(k, pos)
