"""FlashAttention (Dao et al., 2022) arXiv:2205.14135: exact attention, tile by tile.

Softmax attention looks at all pairs of tokens, but the T x S matrix never exists: tiles
of keys pass by while each row keeps a running maximum, sum and weighted value, and the
backward pass computes the tiles again. Tiles that the mask hides are never visited.

`Softmax` is the attention, `attn/exact/attend.py` the mechanism under it.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, Callable

import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache import sharded as shardcache
from attn.cache.rolling_slots import rolling_slots
from attn.contract.attention import EXACT, Attention, TemplateRow
from attn.contract.calls import refuse_keywords
from attn.contract.effective import by_derivative
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, align_last, locate
from attn.contract.shapes import check
from attn.exact import dense
from attn.exact.attend import attend, with_mask
from attn.masks import Causal, Full, Mask
from attn.parallel.exchange import EXCHANGES, GATHER, exchanged, split_axis
from attn.parallel.sharding import Axis, devices_of, over_mesh, spread_heads
from pallas_kernels.arrays import check_logits
from pallas_kernels.logits import Dropout, LogitSpec, Where

FEW = 8  # queries for which a step is bound by the bytes of the cache


@dataclasses.dataclass(frozen=True)
class Softmax(Attention):
    """FlashAttention (Dao et al., 2022) arXiv:2205.14135: exact softmax attention.

    softmax(scale q.k + score(h, i, j)) v over the keys that `mask` lets a query see,
    by `attn.exact.attend`. mask: None is `Causal()`, and in a layer that is given a
    context, whose tokens are no earlier or later ones, `Full()`. Its memory is a
    `Cache`: of every token, or, where the mask forgets (a window, a window with sinks),
    a ring of just those that can be seen.

    `score` is a function of positions such as `ALiBi(heads)`; `dropout` acts when the
    call is given a `key`. axis: the mesh axis that tokens are split over; exchange: how
    its shards meet, "all_gather" ("gather"), "ring", "zigzag" or "ulysses" ("swap"; see
    `attn/parallel/exchange.py`). implementation: also "dense", the matrix in plain jnp,
    the only form with forward-mode derivatives (jvp, linearize, hessian).
    """

    mask: Mask | None = None
    scale: float | None = None
    softcap: float | None = None
    score: Callable | None = None
    dropout: float = 0.0
    axis: Axis | None = None
    exchange: str = "gather"
    implementation: str | None = None
    row = TemplateRow(EXACT, "L^2 D", 2)

    def __post_init__(self):
        check_fields(self, above={"softcap": 0}, choices={"exchange": EXCHANGES})
        name = type(self).__name__
        if self.visible.empty:
            raise ValueError(
                f"{name}: mask={self.mask} hides every key from every query: "
                "expected one that leaves some visible"
            )
        if self.score is not None and not callable(self.score):
            raise ValueError(
                f"{name}: score={self.score!r}: expected a function of head, query and "
                "key position, such as ALiBi(heads=8)"
            )

    @property
    def visible(self) -> Mask:
        """The mask, with its default."""
        return Causal() if self.mask is None else self.mask

    def of_context(self) -> Softmax:
        """This attention for keys of a context: seen whole, unless a mask is given."""
        return self if self.mask is not None else dataclasses.replace(self, mask=Full())

    def __call__(
        self, q, k, v, *, x=None, segments=None, bias=None, sink=None, key=None,
        mask=None, **unknown,
    ):
        """All tokens at once. q [B,T,H,D], k [B,S,K,D], v [B,S,K,V] -> [B,T,H,V].

        bias [B|1,H|1,T|1,S|1] is added to the logits, mask of the same form, booleans,
        hides where it is False, beside the mask of the attention; sink [H] is a logit
        without value, key a PRNG key for dropout. T != S aligns the last tokens: of
        T > S queries in causal order the first T - S see nothing, and give 0.
        """
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=not self.crosses)
        if self.axis is None and self.exchange not in GATHER:
            warnings.warn(
                f"exchange={self.exchange!r} without an axis exchanges nothing: "
                "expected the mesh axis whose shards meet, axis='seq'", stacklevel=2
            )
        check_logits(q, k, bias=bias, sink=sink)
        self._check_heads(q)
        bias = with_mask(q, k, bias, mask)
        # of a ring's shards it is known before anything runs how far apart they stand
        counted = segments is None and q.shape[1] == k.shape[1]
        where = self._where(q, k, segments)
        return self._attend(q, k, v, where, bias, sink, key, counted)

    def weights(
        self, q, k, v, heads, rows, *, x=None, segments=None, bias=None, sink=None,
        **options,
    ):
        """What a call gives each key, [B,n,m,S] float32, of n query heads [n] and m
        rows [m] alone: made again from q and k, whatever implementation attends.
        Arguments are those of a call."""
        if type(self).__call__ is not Softmax.__call__:
            more = {"segments": segments, "x": x}
            more |= {name: a for name, a in (("bias", bias), ("sink", sink))
                     if a is not None}
            return by_derivative(self, q, k, v, heads, rows, **more, **options)
        where = self._where(q, k, segments)
        return self._few_rows(q, k, where, heads, rows, bias, sink)[0]

    def _few_rows(self, q, k, where: Where, heads, rows, bias=None, sink=None):
        """Weights [B,n,m,S] of n heads and m rows, and which keys are seen, booleans
        that broadcast to them."""
        here = dense.everywhere(where, q, k)
        own = here.q_segment
        kv_pos = here.kv_pos
        few = Where(
            here.q_pos[:, rows], kv_pos if kv_pos.ndim == 2 or kv_pos.shape[2] == 1
            else kv_pos[:, :, heads], own if own is None else own[:, rows],
            here.kv_segment, here.head[heads],
        )
        keys = k[:, :, heads // (q.shape[2] // k.shape[2])]  # [B,S,n,D]
        # of [B,m,n,D] and [B,S,n,D]
        s = dense.logits(q[:, rows][:, :, heads], keys, self.scale)
        s = dense.formed(s, self._spec(), few)
        if bias is not None:
            wide = (*bias.shape[:1], q.shape[2], q.shape[1], bias.shape[3])
            s = s + jnp.broadcast_to(bias, wide)[:, heads][:, :, rows]
        seen = dense.allowed(self.visible, few)
        return dense.weights(s, seen, None if sink is None else sink[heads]), seen

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens; q, k, v give shapes and dtypes."""
        caches.check_size(size)
        # a window never needs more slots than it is long
        need = rolling_slots(self.visible, max(size, 1)).slots
        return caches.empty(k, v, need)

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None,
        key_bias=None, **unknown,
    ):
        """The next T tokens -> state, [B,T,H,V]. Past the state's size: ValueError, and
        NaN inside a trace, unless the mask is a window. key_bias [B|1,H|1,P]: added to
        the logits of the key at each position of the sequence, 0 behind the last."""
        refuse_keywords(self, unknown)
        if key_bias is not None and (
            key_bias.ndim != 3 or key_bias.shape[0] not in (1, q.shape[0])
            or key_bias.shape[1] not in (1, q.shape[2])
        ):
            raise ValueError(f"key_bias has shape {key_bias.shape}: expected "
                             f"[B={q.shape[0]}|1,H={q.shape[2]}|1,P]")
        return self._step(state, q, k, v, segments=segments, bias=bias, sink=sink,
                          key_bias=key_bias)

    def _step(self, state, q, k, v, *, segments, bias, sink, key_bias):
        """`step`, for an attention whose state holds the state of another."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        caches.check_fits(state, k, v)
        b, t = q.shape[:2]
        slots = state.k.shape[1]
        now = locate(segments, b, t, state.end, state.segment)
        ring = rolling_slots(self.visible, slots)
        if not ring.endless:
            caches.check_room(now.next_pos, slots)
        after = self._append(state, k, v, now, ring.slot(now))
        if t == 1 or (segments is None and not ring.endless):
            # the token's own sequence is all that is left in the cache
            newest = now.segment.max(1, keepdims=True)
            read = after, jnp.broadcast_to(newest, (b, slots))
        else:
            # early tokens of the piece see what its late ones take the slots of
            read = caches.concat(state, k, v, now)
        more = {} if key_bias is None else {"key_bias": key_bias}
        o = self.read(*read, q, now, sink=sink, **more).astype(v.dtype)
        return after, o if ring.endless else caches.poison(o, now.next_pos, slots)

    def _check_stream(self, bias) -> None:
        if not self.visible.causal:
            raise NotImplementedError(
                f"step: {self.visible} lets tokens see later ones: no stream"
            )
        if bias is not None:
            raise NotImplementedError("step: a bias array has no place in a stream")

    def _check_heads(self, q) -> None:
        heads = getattr(self.score, "heads", None)
        if heads is not None and heads != q.shape[2]:
            raise ValueError(
                f"score={self.score}: q has H={q.shape[2]} heads, expected as many"
            )

    def read(
        self, cache, kv_segment, q, now: TokenPositions, *, sink=None, key_bias=None
    ):
        """q [B,T,H,D] at `now` over a cache whose slots have segment indices [B,C] ->
        [B,T,H,V] in the wider of their types."""
        cache, q = caches.of_one_type(cache, q)
        if key_bias is not None:
            return self._read_biased(cache, kv_segment, q, now, key_bias, sink)[0]
        if q.shape[1] <= FEW:
            # decoding: every device answers from the slots that it holds
            how: dict[str, Any] = {"sink": sink, "implementation": self.implementation}
            args = cache, kv_segment, q, now, self._spec()
            if shardcache.splits(cache, self.axis):
                return shardcache.read(*args, self.axis, **how)
            return reading.read(*args, **how)[0]
        # a prompt: keys are exchanged, as in `__call__`
        streamed = dataclasses.replace(self, axis=self._split(q, cache.k))
        where = Where(now.pos, cache.pos, now.segment, kv_segment)
        return streamed._attend(q, cache.k, cache.v, where, None, sink, None)

    def _read_biased(self, cache, kv_segment, q, now, key_bias, sink=None):
        """o [B,T,H,V] and lse [B,H,T], with a bias of each key position."""
        where = Where(now.pos, cache.pos, now.segment, kv_segment)
        bias = reading.of_slots(key_bias, cache, q.shape[2])  # [B,H,1,C]
        # a bias does not travel with its keys: over a mesh XLA says what moves
        implementation = self.implementation if self.axis is None else "xla"
        return attend(q, cache.k, cache.v, self._spec(), where, bias=bias, sink=sink,
                      implementation=implementation)

    def _append(self, cache, k, v, now, slot):
        if shardcache.splits(cache, self.axis):
            return shardcache.append(cache, k, v, now, slot, self.axis)
        return caches.append(cache, k, v, now, slot)

    def _split(self, q, k):
        """The axis if it can split these queries and keys; else None, and what there is
        to do is done in the global view."""
        # zigzag deals two pieces to each
        pieces = devices_of(self.axis) * (2 if self.exchange == "zigzag" else 1)
        fits = q.shape[1] % pieces == 0 and k.shape[1] % pieces == 0
        return self.axis if fits else None

    def _spec(self) -> LogitSpec:
        return LogitSpec(self.visible, self.scale, self.softcap, self.score)

    def _where(self, q, k, segments) -> Where:
        """Positions and segment indices; none where positions simply count."""
        b, t, s = q.shape[0], q.shape[1], k.shape[1]
        if segments is None:
            if self.axis is None:
                return Where()
            # aligned at the last token
            q_pos = jnp.arange(s - t, s, dtype=jnp.int32)[None]
            kv_pos = jnp.arange(s, dtype=jnp.int32)[None]
            return Where(
                jnp.broadcast_to(q_pos, (b, t)), jnp.broadcast_to(kv_pos, (b, s))
            )
        if not isinstance(segments, tuple):
            now = locate(segments, b, t)
            return Where(now.pos, now.pos, now.segment, now.segment)
        q_seg, kv_seg = (a.astype(jnp.int32) for a in segments)
        q_pos, kv_pos = locate(q_seg, b, t).pos, locate(kv_seg, b, s).pos
        if self.visible != Full() or self.score is not None:
            # aligned at the last token of each sequence, of its true lengths
            q_pos = q_pos + align_last(q_seg, kv_seg)
        return Where(q_pos, kv_pos, q_seg, kv_seg)

    def _attend(self, q, k, v, where: Where, bias, sink, key, counted=False):
        # made in the global view: inside `over_mesh` a shard sees only its own
        heads = jnp.arange(q.shape[2], dtype=jnp.int32)
        rows = jnp.arange(q.shape[0], dtype=jnp.int32)
        if self.axis is not None:
            self._check_exchange(bias, key)
            swapped = split_axis(self.axis, self.exchange)[1]
            k, v = (spread_heads(a, q.shape[2], self.axis, swapped) for a in (k, v))
        # q, k, v, positions, segments, heads, rows, bias, sink, key -> o
        letters = "BTHD BSKD BSKV BT BS BT BS H B " + _letters(bias) + " H . -> BTHV"
        local = functools.partial(self._local, counted)
        return over_mesh(local, letters, self.axis)(
            q, k, v, where.q_pos, where.kv_pos, where.q_segment, where.kv_segment,
            heads, rows, bias, sink, key,
        )

    def _check_exchange(self, bias, key) -> None:
        if key is not None and self.dropout:
            raise NotImplementedError("dropout over a mesh axis is not there yet")
        one = not isinstance(self.axis, tuple) or len(self.axis) == 1
        if bias is not None and not (self.exchange in GATHER and one):
            raise NotImplementedError(
                "a bias array over a mesh axis: its keys do not travel, expected "
                "exchange='gather' over one axis"
            )

    def _local(self, counted, q, k, v, *rest):
        *tokens, batch, bias, sink, key = rest
        where = Where(*tokens)
        how: dict[str, Any] = {
            "bias": bias, "sink": sink, "implementation": self.implementation
        }
        if self.axis is None:
            dropout = Dropout(self.dropout, key, batch)
            return attend(q, k, v, self._spec(), where, dropout=dropout, **how)[0]
        return exchanged(
            q, k, v, self._spec(), where, axis=self.axis, exchange=self.exchange,
            counted=counted, **how,
        )


def _letters(bias) -> str:
    """The letters of a bias array: axes of 1 are whole, and so are the keys."""
    if bias is None:
        return "."
    return "".join("." if n == 1 else c for c, n in zip("BHT.", bias.shape))
