"""ActQKV (Xiao et al., 2025) arXiv:2502.13542: a probe of unusual tokens finds blocks.

A long text is read in windows. Of what came before, each window sees the first tokens,
the last ones, and a few blocks of the rest. Which blocks, a probe query says: the mean
of the window's queries, in which a token counts by how far its query is from the usual,
channel by channel, for a few tokens carry what the window is about. A block is spoken
for by its keys that received most attention while they were near.

    w_i = mean_d (h_id - mu_d)^2 / (s2_d + mean(s2) / 100), normalised
    p = sum_i w_i h_i
    s_B = cos(z_B, p),  z_B = mean of the block's `represent` best keys, by head

Keys of the first tokens and of blocks are rotated as if all were `local` tokens away,
those nearer at their true distance. In a model the blocks of all layers come out of one
pool of `top_k` a layer, refilled for each window: once `samples` windows have been seen
by every layer and a token comes alone, a layer takes its share by how flat its scores
are, before that an even one (`shares` in `attn/cache/probes.py`). Statistics are those
of the window, our default; the authors' running ones, with the quirk with which they
begin, are `running` there. Nothing is learned. All keys stay in memory.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.cache.probes import (
    Pool, block_scores, entropy_of, pooled_share, probe, represented
)
from attn.cache.rolling import Turned
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.calls import refuse_keywords
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions, locate
from attn.contract.shapes import check
from attn.contract.varying import varying
from attn.exact.dense import logits, values, weights
from attn.positions import RoPE
from attn.softmax import Softmax
from pallas_kernels.arrays import check_logits


@caches.of_cache
class ActState(NamedTuple):
    """A cache of all tokens, before the rotation, and score [B,C,H] float32: what each
    token received from each query head while it was near. flat [B,n] float32, the
    normalised entropies of the last n windows that had blocks, by turns, and seen [B]
    int32, how many there were; shared: what the layers of a model share in a step."""

    cache: Cache
    score: jax.Array
    flat: jax.Array
    seen: jax.Array
    shared: Pool | None = None


@dataclasses.dataclass(frozen=True)
class ActQKV(Turned, Softmax):
    """ActQKV (Xiao et al., 2025) arXiv:2502.13542: blocks by an activation-aware probe.

    window: tokens that share a probe; sinks, local: first and last tokens that are
    always seen; block: tokens of a block, of which `top_k` are seen; represent: keys
    that stand for a block. pool: in a model, layers share their blocks, and one takes
    from `least` (or all there are) to 2 top_k; samples: windows whose entropies count.
    rope: the rotation, which `MultiHead` hands over. A call is exact; a stream is read
    by the rule, prompts too. Neither score, softcap nor a mask but `Causal()`, and in
    plain jnp.
    """

    window: int = 256
    sinks: int = 64
    local: int = 512
    block: int = 32
    top_k: int = 46
    represent: int = 4
    pool: bool = True
    least: int = 32
    samples: int = 100
    rope: RoPE | None = None
    part = "reading"
    refuses = {
        "selection": "it reads by position, and slots of a selection have gaps",
        "storage": "keys are turned anew for each window, and codes are of keys that "
                   "were turned",
    }
    row = TemplateRow(MASKED, "L^2 D, then (L + r) D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"window": 1, "sinks": 0, "local": 1, "block": 1,
                                  "top_k": 1, "represent": 1, "least": 0,
                                  "samples": 1})
        if self.represent > self.block:
            raise ValueError(
                f"ActQKV: represent={self.represent} of block={self.block} keys: "
                "expected at most as many"
            )
        for name in ("mask", "score", "softcap"):
            if getattr(self, name) is not None:
                raise ValueError(f"ActQKV: {name}={getattr(self, name)}: expected None")

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens."""
        caches.check_size(size)
        b = k.shape[0]
        return ActState(
            caches.empty(k, v, size), jnp.zeros((b, size, q.shape[2]), jnp.float32),
            jnp.zeros((b, self.samples), jnp.float32), jnp.zeros((b,), jnp.int32))

    def shared_by_layers(self, states: tuple, tokens: int) -> Pool | None:
        """The pool of a step of so many tokens; states: of all layers with it."""
        if not self.pool:
            return None
        windows, many = -(-tokens // self.window), len(states)
        seen = jnp.stack([state.seen for state in states], 1)  # [B,L]
        means = jnp.stack([_mean(state.flat, state.seen) for state in states], 1)
        # of a prompt, and of too few samples, every layer gets as much
        warm = (seen >= self.samples).all(1) & (tokens == 1)
        left = jnp.full((seen.shape[0], windows), self.top_k * many, jnp.float32)
        return Pool(left, means, warm, jnp.zeros((), jnp.int32))

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None, **unknown
    ):
        """The next T tokens -> state, [B,T,H,V], window by window."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        check_logits(q, k, sink=sink)
        caches.check_fits(state.cache, k, v)
        slots, size, pool = state.cache.k.shape[1], self.window, state.shared
        state = state._replace(shared=None)

        def window(state, piece):
            (q1, k1, v1, own), left = piece
            clock = state.cache.end, state.cache.segment
            now = locate(own, q1.shape[0], q1.shape[1], *clock)
            state, o, left = self._window(state, q1, k1, v1, now, sink, pool, left)
            o = caches.poison(o.astype(v1.dtype), now.next_pos, slots)
            return state, (o, now.next_pos, left)

        # whole windows in a loop, and what is left behind them
        parts, found = (q, k, v, segments), []
        whole = q.shape[1] // size * size if q.shape[1] > size else 0
        left = None if pool is None else pool.left.T  # [W,B]
        if whole:
            cut = jax.tree.map(lambda a: _windows(a[:, :whole], size), parts)
            some = None if left is None else left[:whole // size]
            state, (o, ends, some) = jax.lax.scan(
                window, *varying((state, (cut, some))))
            o = jnp.moveaxis(o, 0, 1)  # [N,B,W,H,V] -> [B,N,W,H,V]
            o = o.reshape(o.shape[0], whole, *o.shape[3:])
            found.append((o, ends.max(0), some))
            parts = jax.tree.map(lambda a: a[:, whole:], parts)
        if parts[0].shape[1]:
            state, (o, end, one) = window(
                state, (parts, None if left is None else left[-1]))
            found.append((o, end, None if one is None else one[None]))
        outs, last, rest = zip(*found)
        caches.check_room(jnp.stack(last), slots)
        if pool is not None:
            pool = pool._replace(
                left=jnp.concatenate(rest).T, layer=pool.layer + 1)
        return state._replace(shared=pool), jnp.concatenate(outs, 1)

    def _window(self, state: ActState, q, k, v, now: TokenPositions, sink, pool, left):
        """One window: what it sees is gathered, once for all of its tokens. pool, left
        [B]: what layers share, and what is left of it for this window, or None."""
        slots = state.cache.k.shape[1]
        both, segment = caches.concat(state.cache, k, v, now)
        near, many = self.split(state.cache.end)
        state, at, left = self._slots(state, q, now, near, many, pool, left)  # [B,N]
        at = jnp.concatenate([at, jnp.broadcast_to(
            slots + jnp.arange(q.shape[1], dtype=jnp.int32), now.pos.shape)], 1)
        there, at = at >= 0, jnp.maximum(at, 0)
        few = caches.taken(both, at[..., None])
        pos = jnp.where(there, few.pos[..., 0], -1)
        own = jnp.take_along_axis(segment, at, 1)
        few, wide = caches.of_one_type(few, q)
        # a sequence that begins in the window stands at its true distances
        close = (pos >= near[:, None]) | (own > 1)
        s = self._logits(wide, few.k, now, pos, close)
        seen = (pos[:, None] >= 0) & (pos[:, None] <= now.pos[..., None])
        seen = seen & (own[:, None] == now.segment[..., None])
        seen = seen & (now.segment > 0)[..., None]
        p = weights(s, seen[:, None], sink)
        # what is near receives; slots of the tokens that are stored
        got = jnp.moveaxis(jax.lax.stop_gradient(p).sum(2), 1, 2)  # [B,N,H]
        mine = there & (own == now.segment.max(1, keepdims=True)) & close
        slot = jnp.where(mine, pos, slots)
        began = (now.segment > 1).any(1)[:, None, None]
        score = jnp.where(began, 0, state.score)
        row = jnp.arange(q.shape[0])[:, None]
        score = score.at[row, slot].add(got, mode="drop")
        after = caches.append(state.cache, k, v, now, now.pos)
        seen = jnp.where(began[:, 0, 0], 0, state.seen)
        return ActState(after, score, state.flat, seen), values(p, few.v), left

    def split(self, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of `end` [B] tokens: where what is near begins, and how many whole blocks
        stand between it and the first `sinks`; 0 and 0 while all is near."""
        # the last `local` tokens, and what fills no whole block, are near
        older = end - self.local - self.sinks
        many = jnp.maximum(older, 0) // self.block
        return jnp.where(many > 0, self.sinks + many * self.block, 0), many

    def _slots(self, state: ActState, q, now: TokenPositions, near, many, pool, left):
        """The slots [B,N] of old tokens that the window sees, -1 for none, with the
        state that has noted its entropy before, and what is left of the pool behind."""
        size = state.cache.k.shape[1]
        first = jnp.arange(min(self.sinks, size), dtype=jnp.int32)[None]
        first = jnp.where(first < near[:, None], first, -1)
        back = min(self.local + self.block + self.sinks, size)
        late = near[:, None] + jnp.arange(back, dtype=jnp.int32)[None]
        late = jnp.where(late < state.cache.end[:, None], late, -1)
        blocks = max(size - self.local - self.sinks, 0) // self.block
        if not blocks:
            return state, jnp.concatenate([first, late], 1), left
        score = block_scores(
            self.representatives(state, blocks, q.shape[2]), self.probe(q, now))
        number = jnp.arange(blocks, dtype=jnp.int32)[None]
        score = jnp.where(number < many[:, None], score, -jnp.inf)
        most = self.top_k if pool is None else 2 * self.top_k
        # the blocks of the greatest cosine with the probe [B,n]
        best, top = jax.lax.top_k(score, min(most, blocks))
        there = best > -jnp.inf
        if pool is not None:
            # padding is no window: it notes nothing and takes nothing
            asked = jnp.where(caches.current(now).any(1), many, 0)
            state, own = self._own(state, score, asked, pool, left)
            there &= jnp.arange(top.shape[1])[None] < own[:, None]
            # of a window without blocks nothing is taken
            left = left - own.astype(jnp.float32)
        inside = jnp.arange(self.block, dtype=jnp.int32)[None, None]
        # all tokens of these blocks: [B,n,block]
        middle = self.sinks + top[..., None] * self.block + inside
        middle = jnp.where(there[..., None], middle, -1)
        middle = middle.reshape(len(middle), -1)
        return state, jnp.concatenate([first, middle, late], 1), left

    def _own(self, state: ActState, score, many, pool: Pool, left) -> tuple:
        """The state that has noted how flat the scores [B,N] of `many` [B] blocks are,
        and how many blocks [B] this layer takes of what is `left` [B]. `many` is 0
        where there are none, and of windows without a real token."""
        even = entropy_of(score, many)
        # by turns; outside, and so dropped, where there was nothing to note
        slot = jnp.where(many > 0, state.seen % self.samples, self.samples)
        row = jnp.arange(len(slot))
        flat = state.flat.at[row, slot].set(even, mode="drop")
        seen = state.seen + (many > 0)
        state = state._replace(flat=flat, seen=seen)
        own = pooled_share(
            pool, left, _mean(flat, seen), jnp.minimum(many, self.least),
            jnp.minimum(many, 2 * self.top_k))
        return state, own

    def probe(self, q, now: TokenPositions) -> jax.Array:
        """The probe [B,H D] of a window q [B,T,H,D]."""
        b, t = q.shape[:2]
        flat = q.astype(jnp.float32)
        if self.rope is not None:  # all at one angle: no phase inside the window
            flat = self.rope.rotate(flat, jnp.full((1, t), self.local, jnp.int32))
        mine = caches.current(now)
        return probe(flat.reshape(b, t, -1), mine)[1]

    def representatives(self, state: ActState, blocks: int, h: int) -> jax.Array:
        """z [B,N,H D] float32 of the first `blocks` blocks behind the first tokens."""
        part = slice(self.sinks, self.sinks + blocks * self.block)
        k = state.cache.k[:, part].astype(jnp.float32)
        b, _, heads, d = k.shape
        k = jnp.repeat(k, h // heads, 2).reshape(b, blocks, self.block, h, d)
        score = state.score[:, part].reshape(b, blocks, self.block, h)
        return represented(jnp.moveaxis(k, 3, 2), jnp.moveaxis(score, 3, 2),
                           self.represent)

    def _logits(self, q, k, now: TokenPositions, pos, close_by) -> jax.Array:
        """[B,H,T,N]: at true distances for keys that are `close_by` [B,N], else at
        `local`."""
        if self.rope is None:
            return logits(q, k, self.scale)
        at = jnp.maximum(pos, 0)
        # turned to their positions, of which q.k knows the difference alone
        true = logits(
            self.rope.rotate(q, now.pos), self.rope.rotate(k, at), self.scale)
        # a far key as if `local` tokens away: q at `local`, k at 0
        far = jnp.full_like(now.pos, self.local)
        away = logits(self.rope.rotate(q, far),
                      self.rope.rotate(k, jnp.zeros_like(at)), self.scale)
        return jnp.where(close_by[:, None, None], true, away)


def _mean(flat: jax.Array, seen: jax.Array) -> jax.Array:
    """The mean [B] of the entries of flat [B,n] that were noted; 0 before the first."""
    there = jnp.arange(flat.shape[1])[None] < seen[:, None]
    many = jnp.minimum(seen, flat.shape[1])
    return jnp.where(there, flat, 0).sum(1) / jnp.maximum(many, 1)


def _windows(a: jax.Array, size: int) -> jax.Array:
    """[B,N W,...] -> [N,B,W,...]"""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
