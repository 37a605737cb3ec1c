"""KIVI (Liu et al., 2024) arXiv:2402.02750: a cache of 2 bits, keys by channel.

Keys have a few channels that are large in all tokens, values have not. So keys share a
scale over `group` tokens of one channel, values over `group` channels of one token, and
two bits are enough. The last tokens stay as they are: of keys those that fill no block
of `residual` tokens yet, of values the last `residual`. Prompts are read exactly, and
nothing is dropped or learned.

    code = round((x - min) / scale),  scale = (max - min) / (2^bits - 1)

Of fp16, two bits with groups of 32 are 0.19 of the bytes. A step unpacks the codes of
its layer, which XLA holds while that layer is read.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn.cache import kv as caches, quantised
from attn.cache.coded import Coded
from attn.cache.kv import Cache
from attn.cache.quantised import Codes
from attn.contract.attention import MASKED, TemplateRow
from attn.contract.fields import check_fields
from attn.contract.segments import TokenPositions
from attn.softmax import Softmax


class KIVIState(NamedTuple):
    """keys: codes of [B,C,K,D], of complete blocks; values: codes of [B,C,K,V], of all
    tokens; rest_k [B,R,K,D] the keys behind the last block, rest_v [B,R,K,V] the last
    values, by turns. Where C is 0, R slots hold all. end, segment [B] as in `Cache`."""

    keys: Codes
    values: Codes
    rest_k: jax.Array
    rest_v: jax.Array
    end: jax.Array
    segment: jax.Array

    @property
    def k(self) -> jax.Array:
        """The keys that are stored as they are [B,R,K,D]."""
        return self.rest_k

    @property
    def room(self) -> int:
        """Tokens that it has room for."""
        return self.values.code.shape[1] or self.rest_k.shape[1]


@dataclasses.dataclass(frozen=True)
class KIVI(Coded, Softmax):
    """KIVI (Liu et al., 2024) arXiv:2402.02750: a cache of codes of a few bits.

    bits: of a code, 1, 2, 4, 8 or 16; group: tokens of a channel of keys, or channels
    of a token of values, that share a scale; residual: tokens that stay as they are, a
    multiple of `group`. The other fields are those of `Softmax`. Groups must divide the
    widths of values.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    row = TemplateRow(MASKED, "L^2 D, then L D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"group": 1, "residual": 1})
        quantised.check_bits("KIVI", self.bits, self.group)
        if self.residual % self.group:
            raise ValueError(
                f"KIVI: residual={self.residual}: expected a multiple of "
                f"group={self.group}"
            )

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, up to a whole block."""
        caches.check_size(size)
        b, _, heads, d = k.shape
        short = size < self.residual
        slots = 0 if short else -(-size // self.residual) * self.residual
        rest = size if short else self.residual
        if slots and v.shape[3] % self.group:
            raise ValueError(
                f"v is {v.shape[3]} wide: expected a multiple of group={self.group}"
            )
        keys, vals = (
            quantised.empty(jax.ShapeDtypeStruct((b, slots, *a.shape[2:]), a.dtype),
                            self.bits, *where) for a, where in zip((k, v), self._axes))
        cache = caches.empty(k, v, rest)
        return KIVIState(keys, vals, *cache[:2], *cache[3:])

    @property
    def _axes(self) -> tuple:
        """Group and axis of keys, of values."""
        return (self.group, 1), (self.group, 3)  # along tokens, along channels

    def stored(self, state: KIVIState, k, v, now: TokenPositions) -> KIVIState:
        """The state with tokens k [B,T,K,D], v [B,T,K,V]."""
        slots, size = state.values.code.shape[1], state.rest_k.shape[1]
        row = jnp.arange(k.shape[0])[:, None]
        mine = caches.current(now)
        # the last of each slot's tokens stays
        stays = mine & (now.pos >= now.next_pos[:, None] - size)
        at = jnp.where(stays, now.pos % size, size)
        rest_v = state.rest_v.at[row, at].set(
            v.astype(state.rest_v.dtype), mode="drop")
        if not slots:
            rest_k = state.rest_k.at[row, at].set(
                k.astype(state.rest_k.dtype), mode="drop")
            return state._replace(
                rest_k=rest_k, rest_v=rest_v, end=now.next_pos,
                segment=now.last_segment)
        # keys become codes block by block, as a channel's scale is of `group` tokens
        blocks = quantised.blocks_of((state.rest_k,), (k,), state.end, now, size)
        new = quantised.quantise(blocks.rows[0], self.bits, *self._axes[0])
        per = blocks.rows[0].shape[1] // size  # blocks of the piece

        def put(a, new):  # [B,C/n,K,D], [B,per size/n,K,D]
            n = new.shape[1] // per  # entries of a block
            number = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
            there = number // n < blocks.done[:, None]  # in complete blocks
            at = (blocks.first // size * n)[:, None] + number
            return a.at[row, jnp.where(there, at, a.shape[1])].set(new, mode="drop")

        keys = jax.tree.map(put, state.keys, new)
        # a value's scales are its own, of `group` channels: coded at once
        new = quantised.quantise(v.astype(rest_v.dtype), self.bits, *self._axes[1])
        own = jnp.where(mine, now.pos, slots)
        values = jax.tree.map(
            lambda a, new: a.at[row, own].set(new, mode="drop"), state.values, new)
        rest_k, = quantised.rest_of(blocks, size)
        return KIVIState(keys, values, rest_k, rest_v, now.next_pos, now.last_segment)

    def cache(self, state: KIVIState) -> Cache:
        """What is stored, as keys and values [B,C+R,K,.]; pos -1 where nothing is."""
        b, size = state.rest_k.shape[:2]
        slots, end = state.values.code.shape[1], state.end[:, None]
        tail = jnp.arange(size, dtype=jnp.int32)[None]
        if not slots:
            pos = jnp.where(tail < end, tail, -1)
            return Cache(state.rest_k, state.rest_v, pos[..., None], *state[4:])
        keys, vals = (quantised.dequantise(codes, self.bits, *where) for codes, where
                      in zip((state.keys, state.values), self._axes))
        done = end // size * size  # keys before it are codes
        at = jnp.arange(slots, dtype=jnp.int32)[None]
        # values of the last tokens as they are, by turns
        turns = jnp.tile(state.rest_v, (1, slots // size, 1, 1))  # [B,C,K,V]
        vals = jnp.where((at >= end - size)[..., None, None], turns, vals)
        pos = jnp.concatenate([  # [B,C+R]
            jnp.where(at < done, at, -1), jnp.where(tail < end - done, done + tail, -1)
        ], 1)
        return Cache(jnp.concatenate([keys, state.rest_k], 1),
                     jnp.concatenate([vals, state.rest_v], 1), pos[..., None],
                     *state[4:])
