"""ACT (Yu et al., 2024) arXiv:2406.15765: attention sinks are found and turned down.

Some tokens in the middle of a text, often punctuation, receive much attention and say
little. The attention that key t receives in head h is the mean over the rows that see
it,

    a_h(t) = 1 / (N - t) sum_(i >= t) A_h[i,t],      a sink: a_h(t) > alpha / N,

N tokens of the text. The first sink of a head, which is the beginning of the text and
of use, is left alone. Of the others, S_h, in chosen heads a share beta stays, and what
is freed goes to all other keys in proportion:

    A'[i,t] = beta A[i,t]                                       t in S_h
    A'[i,t] = A[i,t] (1 + (1 - beta) m_i / (1 - m_i))           else,  m_i = A[i,S_h]

so that rows sum to what they did and (1 - beta) m_i is what moves. A' is never made:
with o_S what a row gets from its sinks alone and o_N from the other keys, each of which
is exact attention under a bias that hides the rest,

    o' = beta m o_S + (1 - beta m) o_N.

A row that sees nothing but sinks loses what is freed, as in the authors' code.

Which tokens are sinks is known when the text is: a call lets all its rows vote, early
queries see a choice that followed later tokens, and a stream lets all vote that have
come, the piece at hand among them (proposed; the authors' decoding divides by one row).
Which heads are calibrated is found by trying: `experiments/calibrate.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches, reading
from attn.cache.rolling_slots import rolling_slots
from attn.contract.attention import EXACT, TemplateRow
from attn.contract.calls import refuse_keywords
from attn.contract.heads import check_rows, chosen as chosen_heads
from attn.contract.segments import locate
from attn.contract.shapes import check
from attn.contract.varying import varying
from attn.exact.attend import attend, with_mask
from attn.exact.online import EMPTY
from attn.parallel.sharding import devices_of
from attn.softmax import Softmax
from pallas_kernels.arrays import check_logits
from pallas_kernels.logits import Where
from pallas_kernels.tile import NEVER

FIRST = ("first_detected", "token0", "none")


@caches.of_cache
class ACTState(NamedTuple):
    """cache: of all tokens; sums [B,H,P], rows [B,H,P]: what the key at each position
    has received, and from how many rows; chosen [B,H]: the heads that are calibrated,
    0 or 1."""

    cache: caches.Cache
    sums: jax.Array
    rows: jax.Array
    chosen: jax.Array


class Keys(NamedTuple):
    """Of the keys that are read, [B,S] int32: position and segment index, 0 or below
    for none; runs: how many segments there can be."""

    pos: jax.Array
    segment: jax.Array
    runs: int


@dataclasses.dataclass(frozen=True)
class ACT(Softmax):
    """ACT (Yu et al., 2024) arXiv:2406.15765: exact attention with sinks turned down.

    heads: which are calibrated, None for all. beta: the share of a sink's attention
    that stays; factor: a sink receives more than factor / N (alpha in the paper, of 3,
    5 and 7); threshold: a number instead (the authors' code has 0.1). first:
    "first_detected", the first sink that was found is left alone, as in the code;
    "token0", the first token is, found or not; "none" is, which the paper finds to
    harm. min_rows: a key that fewer rows see is no sink (the code has no such bound:
    the last tokens are seen by few). tile: rows of weights that are made at a time.

    Over a mesh axis XLA shards the passes as it can. Not for windows in a stream.
    """

    heads: tuple[int, ...] | None = None
    beta: float = 0.4
    factor: float = 5.0
    threshold: float | None = None
    first: str = "first_detected"
    min_rows: int = 1
    tile: int = 128
    ahead = None
    mixes = True  # all queries together say which keys are sinks
    row = TemplateRow(EXACT, "3 L^2 D", 2)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}: expected in [0, 1]")
        if self.first not in FIRST:
            raise ValueError(f"first={self.first!r}: expected one of {FIRST}")
        if self.dropout:
            raise NotImplementedError("dropout: calibrated weights have none")
        for name in ("factor", "threshold"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: expected above 0")
        for name in ("min_rows", "tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")

    def __call__(
        self, q, k, v, *, x=None, segments=None, bias=None, sink=None, mask=None,
        **unknown,
    ):
        """All tokens at once, as `Softmax`."""
        unknown.pop("key", None)  # of dropout, which there is none of
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments)
        check_logits(q, k, bias=bias, sink=sink)
        self._check_heads(q)
        where, keys = self._where(q, k, segments), _keys(k, segments)
        bias = with_mask(q, k, bias, mask)
        o, *_ = self._calibrated(q, k, v, where, keys, bias, sink, 0.0, 0,
                                 chosen_heads(self.heads, q.shape[2])[None])
        return o.astype(v.dtype)

    def found(self, q, k, *, segments=None, bias=None, sink=None) -> tuple:
        """received [B,H,S], what each key receives, and sinks [B,H,S], those that are
        turned down where a head is calibrated."""
        where, keys = self._where(q, k, segments), _keys(k, segments)
        sums, rows = self._received(q, k, where, bias, sink)
        share = sums / jnp.maximum(rows, 1).astype(jnp.float32)
        return share, self._sinks(sums, rows, keys)

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens; q, k, v give shapes and dtypes."""
        cache = super().init_state(size, q, k, v)
        self._check_whole(cache.k.shape[1])
        b, h = q.shape[0], q.shape[2]
        empty = jnp.zeros((b, h, size), jnp.float32)
        chosen = jnp.broadcast_to(chosen_heads(self.heads, q.shape[2]), (b, h))
        return ACTState(cache, empty, jnp.zeros((b, h, size), jnp.int32), chosen)

    def _step(self, state, q, k, v, *, segments, bias, sink, key_bias):
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        self._check_heads(q)
        check_logits(q, k, sink=sink)
        caches.check_fits(state.cache, k, v)
        (b, t, h), slots = q.shape[:3], state.k.shape[1]
        now = locate(segments, b, t, state.end, state.segment)
        self._check_whole(slots)
        caches.check_room(now.next_pos, slots)
        after = caches.append(state.cache, k, v, now, now.pos)
        read, segment = caches.concat(state.cache, k, v, now)
        read, q = caches.of_one_type(read, q)
        pos = read.pos[..., 0]
        keys = Keys(pos, jnp.where(pos >= 0, segment, 0),
                    1 if segments is None else t + 2)
        # what the sequence that the cache held has received so far
        held = (keys.segment == 1)[:, None]
        sums, rows = (jnp.where(held, reading.of_slots(a, read, h)[:, :, 0], 0)
                      for a in (state.sums, state.rows))
        where = Where(now.pos, pos, now.segment, segment)
        more = None if key_bias is None else reading.of_slots(key_bias, read, h)
        o, sums, rows = self._calibrated(
            q, read.k, read.v, where, keys, more, sink, sums, rows, state.chosen)
        newest = now.segment.max(1, keepdims=True)
        at = jnp.where((keys.segment == newest) & (pos >= 0), pos, slots)
        sums, rows = (_by_position(a, at, state.sums.shape[2]) for a in (sums, rows))
        o = caches.poison(o.astype(v.dtype), now.next_pos, slots)
        return ACTState(after, sums, rows, state.chosen), o

    def _calibrated(self, q, k, v, where, keys, bias, sink, sums, rows, chosen):
        """o [B,T,H,V], and sums and rows [B,H,S] with these queries' added to them."""
        implementation = self.implementation
        if self.axis is not None:
            devices_of(self.axis)  # ValueError without a mesh
            implementation = "xla"
        more, count = self._received(q, k, where, bias, sink)
        # all rows vote that have come, these among them
        sums, rows = sums + more, rows + count
        sinks = self._sinks(sums, rows, keys) & (chosen[:, :, None] > 0)
        plain = jnp.zeros((1, 1, 1, 1), jnp.float32) if bias is None else bias

        def only(seen):
            """o [B,T,H,V] and lse [B,T,H,1] of these keys [B,H,S] alone."""
            own = jnp.where(seen[:, :, None], plain, NEVER)
            o, lse = attend(q, k, v, self._spec(), where, bias=own,
                            implementation=implementation)
            # where nothing is seen a finite one, so that differences are no NaN
            lse = jnp.maximum(lse, EMPTY).swapaxes(1, 2)[..., None]
            return o.astype(jnp.float32), lse

        # o_S and o_N, each the answer of exact attention to some of the keys alone
        (o_s, lse_s), (o_n, lse_n) = only(sinks), only(~sinks)
        lse = jnp.logaddexp(lse_s, lse_n)
        if sink is not None:
            lse = jnp.logaddexp(lse, sink[None, None, :, None].astype(jnp.float32))
        # the share of a row that its sinks have, and that of its other keys [B,T,H,1]
        m, rest = jnp.exp(lse_s - lse), jnp.exp(lse_n - lse)
        # what a row gives its keys, without a logit that has no value: m + rest
        return self.beta * m * o_s + ((1 - self.beta) * m + rest) * o_n, sums, rows

    def _received(self, q, k, where, bias, sink):
        """What each key gets from all rows together, and how many rows see it
        [B,H,S]; tile by tile."""
        (b, t, h), s = q.shape[:3], k.shape[1]
        tile, heads = min(self.tile, t), jnp.arange(h)
        q, k = jax.lax.stop_gradient((q, k))
        count = -(-t // tile)
        rows = jnp.pad(jnp.arange(t), (0, count * tile - t), constant_values=-1)

        def one(carry, own):
            at = jnp.maximum(own, 0)
            # the weights of these rows [B,H,tile,S]
            p, seen = self._few_rows(q, k, where, heads, at, bias, sink)
            real = (own >= 0)[None, None, :, None]
            seen = jnp.broadcast_to(seen & real, p.shape)
            p = jnp.where(seen, p, 0)
            return (carry[0] + p.sum(2), carry[1] + seen.sum(2, dtype=jnp.int32)), None

        zero = jnp.zeros((b, h, s), jnp.float32), jnp.zeros((b, h, s), jnp.int32)
        zero = varying(zero, q, k, *jax.tree.leaves(where))
        found, _ = jax.lax.scan(one, zero, rows.reshape(count, tile))
        return jax.lax.stop_gradient(found)

    def _sinks(self, sums, rows, keys: Keys):
        """Which keys are turned down [B,H,S], from what they have received."""
        bound: Any = self.threshold
        if bound is None:
            size = _per_run("max", keys.pos + 1, keys)  # N of each key's
            bound = self.factor / jnp.maximum(size, 1).astype(jnp.float32)[:, None]
        # the mean that a key received, sums / rows, is above the bound
        detected = (sums > bound * rows.astype(jnp.float32)) & (rows >= self.min_rows)
        detected = detected & (keys.segment > 0)[:, None]
        if self.first == "none":
            return detected
        if self.first == "token0":
            return detected & (keys.pos > 0)[:, None]
        # "first_detected": the first sink of each segment is left alone
        late = jnp.iinfo(jnp.int32).max
        pos = jnp.where(detected, keys.pos[:, None], late)
        first = jax.vmap(lambda a: _per_run("min", a, keys), 1, 1)(pos)
        return detected & (pos != first)

    def _check_whole(self, slots: int) -> None:
        if rolling_slots(self.visible, slots).endless:
            raise NotImplementedError(
                f"step: {self.visible} forgets keys, whose attention is no longer "
                "known: expected a mask that keeps all"
            )


def calibrated(states: tuple, heads: jax.Array) -> tuple:
    """A model's states, one a layer, in which the heads [L,H], 0 or 1, of `ACTState`s
    are those that are calibrated; they may be traced. ValueError for other heads, and
    for states without an `ACTState`."""
    heads = jnp.asarray(heads)
    check_rows("heads", heads, len(states))
    leaves = jax.tree.leaves(states, is_leaf=lambda s: isinstance(s, ACTState))
    if not any(isinstance(state, ACTState) for state in leaves):
        raise ValueError("states hold no ACTState: expected a model with "
                         "attention=(ACT(),) * layers")

    def one(n, state):
        if isinstance(state, ACTState):
            chosen = jnp.asarray(heads[n], jnp.float32)
            return state._replace(chosen=jnp.broadcast_to(chosen, state.chosen.shape))
        inner = getattr(state, "cache", None)  # of one that holds another
        held = isinstance(inner, ACTState)
        return state._replace(cache=one(n, inner)) if held else state

    return tuple(one(n, state) for n, state in enumerate(states))


def _keys(k, segments) -> Keys:
    b, s = k.shape[:2]
    own = segments[1] if isinstance(segments, tuple) else segments
    now = locate(own, b, s)
    shape = b, s
    return Keys(jnp.broadcast_to(now.pos, shape), jnp.broadcast_to(now.segment, shape),
                1 if segments is None else s + 1)


def _per_run(of: str, a: jax.Array, keys: Keys) -> jax.Array:
    """The "max" or "min" of a [B,S] int32 over each segment, at each of its keys."""
    if keys.runs == 1:  # nothing to sort out
        bound = jnp.iinfo(jnp.int32)
        none = bound.min if of == "max" else bound.max
        real = jnp.where(keys.segment > 0, a, none)
        return jnp.broadcast_to(getattr(real, of)(-1, keepdims=True), a.shape)

    def one(a, segment):
        reduced = getattr(jax.ops, f"segment_{of}")(
            a, segment, num_segments=keys.runs + 1)
        return reduced[segment]

    return jax.vmap(one)(a, jnp.maximum(keys.segment, 0))


def _by_position(a: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """a [B,H,S] of keys at positions `at` [B,S], as [B,H,size]."""
    def one(a, at):
        return jnp.zeros((a.shape[0], size), a.dtype).at[:, at].set(a, mode="drop")

    return jax.vmap(one)(a, at)
