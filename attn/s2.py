"""S2-Attention (Lin et al., 2024) arXiv:2407.17678: each head keeps another shard.

Heads need not all read the same context. Tokens are cut into blocks; a head sees the
`local` newest ones and of the rest every `stride`-th, beginning at a block of its own,
so that its neighbours see the others and `stride` heads together see everything:

    head h, block m: sees block n <= m if m - n < local or (n + h g + o) % stride = 0

A block of a head's shard is seen by all later queries, and one that is not is never
needed again once it has left the window: a stream keeps a window and a shard, about
1 / stride of all keys, for each key head. A few dense heads, or dense layers among the
sharded ones (`hybrid`), keep what no shard holds whole.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from attn.cache import kv as caches, reading
from attn.cache import shards
from attn.cache.kv import Cache
from attn.cache.shards import S2State
from attn.contract.attention import MASKED, Attention, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.exact.attend import attend
from attn.exact.online import OnlineSoftmax, join, output, state_of
from attn.masks import BlockCausal, Causal, Mask
from attn.parallel.exchange import EXCHANGES
from attn.parallel.sharding import Axis
from attn.softmax import FEW, Softmax
from attn.sparse.shards import Behind, BothWays, Sharding, compact, heads_of
from pallas_kernels.logits import LogitSpec, Where


@dataclasses.dataclass(frozen=True)
class S2(Attention):
    """S2-Attention (Lin et al., 2024) arXiv:2407.17678: a window, and a strided shard
    of the past that differs from head to head.

    block: tokens. local: blocks of the window, the query's own one counted. stride: of
    the shard, in blocks. offset: moves all shards. dense: the last so many key heads
    see everything. homogeneous: all heads have the first one's shard. ahead: blocks of
    the window behind the query's own, without an order (None: as `local`); all heads
    then have one pattern. Heads of a group share the shard of their key head; shards of
    key heads differ by g = max(1, stride // H) blocks, as in the authors' code, whose
    union leaves out blocks if K < stride: `coverage` says how many.

    Without packing and mesh the window and the shards are read apart, so that what no
    head sees costs nothing; packed rows and shards of a mesh read by the mask, with the
    same result, as exact attention does. Packing is proposed here, not published:
    blocks are counted from the beginning of each sequence. A stream reads piece after
    piece in causal order.
    """

    block: int = 64
    local: int = 16
    stride: int = 8
    offset: int = 0
    dense: int = 0
    homogeneous: bool = False
    causal: bool = True
    ahead: int | None = None
    scale: float | None = None
    axis: Axis | None = None
    exchange: str = "gather"
    implementation: str | None = None
    crosses = False
    row = TemplateRow(MASKED, "L w D + L^2 D / stride", 2)

    def __post_init__(self):
        least = {"block": 1, "local": 1, "stride": 1, "offset": 0, "dense": 0,
                 "ahead": 1}
        check_fields(self, least=least, choices={"exchange": EXCHANGES})
        if self.homogeneous and self.dense:
            raise ValueError(
                f"S2: homogeneous=True, dense={self.dense}: expected dense=0, heads "
                "that are all alike"
            )
        if self.causal and self.ahead is not None:
            raise ValueError(
                f"S2: ahead={self.ahead}: expected causal=False, as tokens see no "
                "later ones"
            )

    def pattern(self, heads: int, kv_heads: int) -> Mask:
        """What each of H query heads with K key heads sees."""
        dense_from = kv_heads - self.dense if self.dense else None
        group = heads // kv_heads
        if not self.causal:
            ahead = self.local if self.ahead is None else self.ahead
            return BothWays(
                self.block, self.local, ahead, self.stride, group, dense_from)
        if self.stride == 1 or self.dense >= kv_heads:
            return Causal()
        # shards of neighbouring key heads are g = max(1, stride // H) blocks apart
        step = 0 if self.homogeneous else max(1, self.stride // heads)
        return Sharding(
            self.block, self.local, self.stride, step, self.offset, group, dense_from)

    def blocks(
        self, heads: int, kv_heads: int, tokens: int, past: int = 0
    ) -> np.ndarray:
        """Which blocks [H,M,N] the query blocks of `tokens` tokens see, [1,M,N] if all
        heads are alike; of query blocks, those from token `past` on."""
        # a block of keys is seen where its first token is, by the last query of a block
        n = np.arange(-(-tokens // self.block)) * self.block
        rows = n[-(-past // self.block):] + self.block - 1  # the last token of each
        same = self.homogeneous or not (self.causal or self.dense)
        h = np.arange(1 if same else heads)
        mask = self.pattern(heads, kv_heads)
        return mask(h[:, None, None], rows[None, :, None], n[None, None])

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] -> [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        mask = self.pattern(q.shape[2], k.shape[2])
        long = q.shape[1] > self.local * self.block
        whole = segments is not None or self.axis is not None or not long
        if whole or not isinstance(mask, Sharding):
            exact = Softmax(
                mask, self.scale, axis=self.axis, exchange=self.exchange,
                implementation=self.implementation,
            )
            return exact(q, k, v, segments=segments)
        parts = [self._sharded(mask, *heads_of(mask, q, k, v, dense=False))]
        if self.dense:
            exact = Softmax(scale=self.scale, implementation=self.implementation)
            parts.append(exact(*heads_of(mask, q, k, v, dense=True)))
        return jnp.concatenate(parts, 2)  # dense heads are the last

    def _sharded(self, mask: Sharding, q, k, v):
        """The window and the shards, apart."""
        window = self._attend(q, k, v, self._near)
        far_k, far_v = (compact(mask, a) for a in (k, v))  # [B,F,K,.]
        # queries count from 0, as blocks of a shard do
        where = Where(shift=q.shape[1] - far_k.shape[1])
        shard = self._attend(q, far_k, far_v, Behind(mask), where)
        # no key is in both: one softmax over their union
        return output(join(window, shard)).astype(v.dtype)

    @property
    def _near(self) -> Mask:
        """The window."""
        return Causal() & BlockCausal(self.block, self.local - 1)

    def _attend(self, q, k, v, mask, where: Where = Where()) -> OnlineSoftmax:
        return state_of(*attend(
            q, k, v, LogitSpec(mask, self.scale), where, split_lse=True,
            implementation=self.implementation,
        ))

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, up to whole strides of blocks: for each
        key head the window and its shard; q, k, v give shapes and dtypes."""
        caches.check_size(size)
        self.check_stream()
        mask = self.pattern(q.shape[2], k.shape[2])
        if not isinstance(mask, Sharding):
            return S2State(caches.empty(k, v, size), None)
        return shards.empty(mask, size, q, k, v)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self.check_stream()
        now = locate(segments, q.shape[0], q.shape[1], state.end, state.segment)
        mask, room = self.pattern(q.shape[2], k.shape[2]), state.k.shape[1]
        dense = self.dense if isinstance(mask, Sharding) else 0
        if (state.whole is None) == bool(dense):
            raise ValueError(
                f"the state holds {'no' if dense else 'also'} dense heads: expected "
                f"{dense or 'none'} of K={k.shape[2]} apart"
            )
        if not isinstance(mask, Sharding):
            caches.check_room(now.next_pos, room)
            after, o = self._dense(state.sharded, q, k, v, now)
            return S2State(after, None), caches.poison(o, now.next_pos, room)
        room = shards.room(mask, state)
        caches.check_room(now.next_pos, room)
        few_q, few_k, few_v = heads_of(mask, q, k, v, dense=False)
        slot = shards.slots_of(mask, now, state.sharded)  # [B,T,K]
        after = shards.append(state.sharded, few_k, few_v, now, slot)
        # worth it for long pieces, and where the memory is shorter than the text
        apart = segments is None and q.shape[1] > FEW and room > state.k.shape[1]
        read = self._prompt if apart else self._read
        held, parts = None, [read(state.sharded, after, few_q, few_k, few_v, now, mask)]
        if self.dense:
            q, k, v = heads_of(mask, q, k, v, dense=True)
            held, o = self._dense(state.whole, q, k, v, now)
            parts.append(o)
        o = jnp.concatenate(parts, 2)
        return S2State(after, held), caches.poison(o, now.next_pos, room)

    def _dense(self, cache: Cache, q, k, v, now: TokenPositions):
        """Heads that see everything: the cache after the tokens, and o."""
        after = caches.append(cache, k, v, now, now.pos)
        return after, self._read(cache, after, q, k, v, now, Causal())

    def _read(self, cache, after, q, k, v, now: TokenPositions, mask: Mask):
        """What the tokens find in the cache and among themselves."""
        # early tokens of a piece see what later ones take the slots of
        both, kv_segment = caches.concat(cache, k, v, now)
        if q.shape[1] == 1:
            newest = now.segment.max(1, keepdims=True)
            both, kv_segment = after, jnp.broadcast_to(newest, after.k.shape[:2])
        both, q = caches.of_one_type(both, q)
        o, _ = reading.read(
            both, kv_segment, q, now, LogitSpec(mask, self.scale),
            implementation=self.implementation,
        )
        return o.astype(v.dtype)

    def _prompt(self, cache, after, q, k, v, now: TokenPositions, mask):
        """As `_read`, of a long piece of one sequence: the window, and the shards, all
        of which `after` holds, apart."""
        near, kv_segment = caches.concat(cache, k, v, now)
        where = Where(now.pos, near.pos, now.segment, kv_segment)
        near, asked = caches.of_one_type(near, q)
        found = self._attend(asked, near.k, near.v, self._near, where)
        # slots of the window come first, those of the shard behind them
        far_k, far_v, far_pos = (a[:, mask.block * mask.local:] for a in after[:3])
        far = after._replace(k=far_k, v=far_v, pos=far_pos)
        where = Where(now.pos, far.pos)
        far, asked = caches.of_one_type(far, q)
        # a block of the shard that is in the window too is read there, and not twice
        behind = Causal() & ~BlockCausal(self.block, self.local - 1)
        shard = self._attend(asked, far.k, far.v, behind, where)
        return output(join(found, shard)).astype(v.dtype)


def hybrid(layers: int, every: int = 4, sharded: S2 = S2()) -> tuple:
    """An attention for each of so many layers: dense in the first and every `every`-th
    one after it, sharded between. Proposed here: the paper interleaves dense layers,
    and which was not found in its repository; phi-3-small has `every=2`."""
    for name, value in (("layers", layers), ("every", every)):
        if value < 1:
            raise ValueError(f"hybrid: {name}={value}: expected 1 or more")
    dense = Softmax(scale=sharded.scale, axis=sharded.axis, exchange=sharded.exchange)
    return tuple(sharded if n % every else dense for n in range(layers))
