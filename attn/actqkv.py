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
those nearer at their true distance. Blocks of all layers come out of one pool, more for
layers whose scores are flat (`entropy` and `shares` in `attn/cache/probes.py`; here a
layer has `top_k`). Statistics are those of the window, our default; the authors'
running ones, with the quirk with which they begin, are `running` there. Nothing is
learned. All keys stay in memory.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches
from attn.cache.kv import Cache
from attn.cache.probes import block_scores, probe, represented
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
    token received from each query head while it was near."""

    cache: Cache
    score: jax.Array


@dataclasses.dataclass(frozen=True)
class ActQKV(Turned, Softmax):
    """ActQKV (Xiao et al., 2025) arXiv:2502.13542: blocks by an activation-aware probe.

    window: tokens that share a probe; sinks, local: first and last tokens that are
    always seen; block: tokens of a block, of which `top_k` are seen; represent: keys
    that stand for a block. rope: the rotation, which `MultiHead` hands over. A call is
    exact; a stream is read by the rule, prompts too. Neither score, softcap nor a mask
    but `Causal()`, and in plain jnp.
    """

    window: int = 256
    sinks: int = 64
    local: int = 512
    block: int = 32
    top_k: int = 46
    represent: int = 4
    rope: RoPE | None = None
    row = TemplateRow(MASKED, "L^2 D, then (L + r) D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"window": 1, "sinks": 0, "local": 1, "block": 1,
                                  "top_k": 1, "represent": 1})
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
        return ActState(caches.empty(k, v, size),
                        jnp.zeros((k.shape[0], size, q.shape[2]), jnp.float32))

    def step(
        self, state, q, k, v, *, x=None, segments=None, bias=None, sink=None, **unknown
    ):
        """The next T tokens -> state, [B,T,H,V], window by window."""
        refuse_keywords(self, unknown)
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_stream(bias)
        check_logits(q, k, sink=sink)
        caches.check_fits(state.cache, k, v)
        slots, size = state.cache.k.shape[1], self.window

        def window(state, piece):
            q1, k1, v1, own = piece
            clock = state.cache.end, state.cache.segment
            now = locate(own, q1.shape[0], q1.shape[1], *clock)
            state, o = self._window(state, q1, k1, v1, now, sink)
            o = caches.poison(o.astype(v1.dtype), now.next_pos, slots)
            return state, (o, now.next_pos)

        # whole windows in a loop, and what is left behind them
        parts, found = (q, k, v, segments), []
        whole = q.shape[1] // size * size
        if whole > size:
            cut = jax.tree.map(lambda a: _windows(a[:, :whole], size), parts)
            state, (o, ends) = jax.lax.scan(window, *varying((state, cut)))
            o = jnp.moveaxis(o, 0, 1)  # [N,B,W,H,V] -> [B,N,W,H,V]
            found.append((o.reshape(o.shape[0], whole, *o.shape[3:]), ends.max(0)))
            parts = jax.tree.map(lambda a: a[:, whole:], parts)
        if parts[0].shape[1]:
            state, last = window(state, parts)
            found.append(last)
        caches.check_room(jnp.stack([end for _, end in found]), slots)
        return state, jnp.concatenate([o for o, _ in found], 1)

    def _window(self, state: ActState, q, k, v, now: TokenPositions, sink):
        """One window: what it sees is gathered, once for all of its tokens."""
        slots = state.cache.k.shape[1]
        both, segment = caches.concat(state.cache, k, v, now)
        near, many = self.split(state.cache.end)
        at = self._slots(state, q, now, near, many)  # [B,N]
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
        return ActState(after, score), values(p, few.v)

    def split(self, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of `end` [B] tokens: where what is near begins, and how many whole blocks
        stand between it and the first `sinks`; 0 and 0 while all is near."""
        older = end - self.local - self.sinks
        many = jnp.maximum(older, 0) // self.block
        return jnp.where(many > 0, self.sinks + many * self.block, 0), many

    def _slots(self, state: ActState, q, now: TokenPositions, near, many) -> jax.Array:
        """The slots [B,N] of old tokens that the window sees, -1 for none."""
        size = state.cache.k.shape[1]
        first = jnp.arange(min(self.sinks, size), dtype=jnp.int32)[None]
        first = jnp.where(first < near[:, None], first, -1)
        back = min(self.local + self.block + self.sinks, size)
        late = near[:, None] + jnp.arange(back, dtype=jnp.int32)[None]
        late = jnp.where(late < state.cache.end[:, None], late, -1)
        blocks = max(size - self.local - self.sinks, 0) // self.block
        if not blocks:
            return jnp.concatenate([first, late], 1)
        score = block_scores(
            self.representatives(state, blocks, q.shape[2]), self.probe(q, now))
        number = jnp.arange(blocks, dtype=jnp.int32)[None]
        score = jnp.where(number < many[:, None], score, -jnp.inf)
        best, top = jax.lax.top_k(score, min(self.top_k, blocks))
        inside = jnp.arange(self.block, dtype=jnp.int32)[None, None]
        middle = self.sinks + top[..., None] * self.block + inside
        middle = jnp.where((best > -jnp.inf)[..., None], middle, -1)
        return jnp.concatenate([first, middle.reshape(len(middle), -1), late], 1)

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
        true = logits(
            self.rope.rotate(q, now.pos), self.rope.rotate(k, at), self.scale)
        far = jnp.full_like(now.pos, self.local)
        away = logits(self.rope.rotate(q, far),
                      self.rope.rotate(k, jnp.zeros_like(at)), self.scale)
        return jnp.where(close_by[:, None, None], true, away)


def _windows(a: jax.Array, size: int) -> jax.Array:
    """[B,N W,...] -> [N,B,W,...]"""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
