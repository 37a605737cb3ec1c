"""SAQ (Li, 2024) arXiv:2410.18441: a cache whose older tokens have fewer bits.

Staircase adaptive quantisation: the last tokens stay as they are. When they fill a
segment they become codes of the first of `bits`, and every segment before goes one
step down the stairs, until it has the last and fewest bits, with which it stays. Old
tokens, which receive little attention, cost little. Codes are KIVI's (`attn/kivi.py`):
keys by channel over groups of tokens, values by token over groups of channels. A
segment that goes down is quantised from what its codes stood for: errors add up.

    bits of a segment of age a (1 the newest) = bits[min(a, n) - 1]

The pseudo-code of the paper's table was read, its text was not: the rest is proposed
here, not published. Prompts are read exactly. Nothing is dropped or learned.
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
from attn.contract.varying import varying
from attn.softmax import Softmax

Pair = tuple[Codes, Codes]
WORD = 8  # bits, which codes of a group fill


class SAQState(NamedTuple):
    """steps: of each number of bits but the last, codes of one segment, newest first;
    old: codes of all older segments [B,C,K,.], in order; each a pair, of keys and of
    values. rest_k [B,R,K,D], rest_v [B,R,K,V]: the last tokens, of no whole segment. In
    a memory shorter than a segment codes have no slots. end, segment [B] as in `Cache`.
    """

    steps: tuple[Pair, ...]
    old: Pair
    rest_k: jax.Array
    rest_v: jax.Array
    end: jax.Array
    segment: jax.Array

    @property
    def k(self) -> jax.Array:
        """The keys that are stored as they are [B,R,K,D]."""
        return self.rest_k

    @property
    def short(self) -> bool:
        """Whether it is shorter than a segment."""
        return self.old[1].code.shape[1] == 0

    @property
    def room(self) -> int:
        """Tokens that it has room for."""
        if self.short:
            return self.rest_k.shape[1]
        segment = self.rest_k.shape[1]
        return self.old[1].code.shape[1] + segment * (len(self.steps) + 1) - 1


@dataclasses.dataclass(frozen=True)
class SAQ(Coded, Softmax):
    """SAQ (Li, 2024) arXiv:2410.18441: staircase adaptive quantisation of the cache.

    bits: of a code, for the newest segment first, the last for all that are older;
    tokens: of a segment; group: tokens of a channel of keys, or channels of a token of
    values, that share a scale. The other fields are those of `Softmax`.
    """

    bits: tuple[int, ...] = (8, 4, 2)
    tokens: int = 128
    group: int = 32
    row = TemplateRow(MASKED, "L^2 D, then L D a token", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, least={"tokens": 1, "group": 1})
        if not isinstance(self.bits, tuple) or not self.bits or (
                list(self.bits) != sorted(self.bits, reverse=True)):
            raise ValueError(
                f"SAQ: bits={self.bits!r}: expected a tuple that falls, as (8, 4, 2)")
        for bits in self.bits:
            quantised.check_bits("SAQ", bits, self.group, WORD)
        if self.tokens % self.group:
            raise ValueError(
                f"SAQ: tokens={self.tokens}: expected a multiple of group={self.group}")

    def init_state(self, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens, up to a whole segment."""
        caches.check_size(size)
        n = self.tokens
        cache = caches.empty(k, v, min(size, n))
        short = size < n
        if not short and v.shape[3] % self.group:
            raise ValueError(
                f"v is {v.shape[3]} wide: expected a multiple of group={self.group}")

        def of(slots: int, bits: int) -> Pair:
            keys, vals = (
                quantised.empty(jax.ShapeDtypeStruct(
                    (a.shape[0], slots, *a.shape[2:]), a.dtype), bits, self.group, axis,
                    WORD) for a, axis in ((k, 1), (v, 3)))
            return keys, vals

        # old segments: all whole ones but those on the steps; one at least
        old = 0 if short else max(size // n - len(self.bits) + 1, 1) * n
        steps = tuple(of(0 if short else n, bits) for bits in self.bits[:-1])
        return SAQState(steps, of(old, self.bits[-1]), *cache[:2], *cache[3:])

    def stored(self, state: SAQState, k, v, now: TokenPositions) -> SAQState:
        """The state with tokens k [B,T,K,D], v [B,T,K,V]."""
        n, rest = state.rest_k.shape[1], (state.rest_k, state.rest_v)
        if state.short:
            cache = Cache(*rest, jnp.zeros((k.shape[0], n, 1), jnp.int32), *state[4:])
            rest_k, rest_v = caches.append(cache, k, v, now, now.pos)[:2]
            return SAQState(state.steps, state.old, rest_k, rest_v, now.next_pos,
                            now.last_segment)
        blocks = quantised.blocks_of(rest, (k, v), state.end, now, n)
        # [B,N n,K,.] -> [N,B,n,K,.], segment by segment
        whole = tuple(jnp.moveaxis(
            a.reshape(a.shape[0], -1, n, *a.shape[2:]), 1, 0) for a in blocks.rows)

        def push(carry, given):
            rows, number = given  # of one segment [B,n,K,.], its number here
            segment = blocks.first // n + number
            new = self._pushed(carry[0], carry[1], rows, segment)
            full = number < blocks.done
            return jax.tree.map(
                lambda a, b: jnp.where(full.reshape(-1, *(1,) * (a.ndim - 1)), a, b),
                new, carry), None

        number = jnp.arange(whole[0].shape[0], dtype=jnp.int32)
        carry = varying((state.steps, state.old), whole, blocks.done)
        (steps, old), _ = jax.lax.scan(push, carry, (whole, number))
        rest_k, rest_v = quantised.rest_of(blocks, n)  # [B,n,K,.]
        return SAQState(steps, old, rest_k, rest_v, now.next_pos, now.last_segment)

    def _pushed(self, steps, old: Pair, rows, segment) -> tuple:
        """Steps and old codes after a segment of rows [B,n,K,.], of the number
        `segment` [B]: every step hands what its codes stand for to the next one."""
        falls = rows
        after = []
        for bits, held in zip(self.bits, steps):
            after.append(self._coded(falls, bits))
            # read back from its codes, and coded anew with fewer bits
            falls = self._rows(held, bits)
        last = self._coded(falls, self.bits[-1])
        # the segment that reaches the last step is as much older
        slot = segment - len(steps)

        def put(a, new):
            many = a.shape[1] // new.shape[1]
            wide = a.reshape(a.shape[0], many, -1, *a.shape[2:])  # by segment
            row = jnp.arange(a.shape[0])
            at = jnp.where(slot >= 0, slot, many)  # outside: dropped
            return wide.at[row, at].set(new, mode="drop").reshape(a.shape)

        return tuple(after), jax.tree.map(put, old, last)

    def _coded(self, rows, bits: int) -> Pair:
        keys, vals = (quantised.quantise(a, bits, self.group, axis, WORD)
                      for a, axis in zip(rows, (1, 3)))
        return keys, vals

    def _rows(self, pair: Pair, bits: int) -> tuple:
        return tuple(quantised.dequantise(codes, bits, self.group, axis)
                     for codes, axis in zip(pair, (1, 3)))

    def cache(self, state: SAQState) -> Cache:
        """What is stored, as keys and values [B,C,K,.]; pos is -1 where nothing is."""
        n, end = state.rest_k.shape[1], state.end[:, None]
        at = jnp.arange(n, dtype=jnp.int32)[None]
        done = jnp.zeros_like(end) if state.short else end // n
        # the last tokens, of no whole segment, begin where whole ones end
        rest = jnp.where(at < end - done * n, done * n + at, -1)
        if state.short:
            return Cache(state.rest_k, state.rest_v, rest[..., None], *state[4:])
        parts = [(state.rest_k, state.rest_v)]
        where = [rest]
        for age, (bits, held) in enumerate(zip(self.bits, state.steps), 1):
            parts.append(self._rows(held, bits))
            # the segment of age a begins at (done - a) n
            where.append(jnp.where(done >= age, (done - age) * n + at, -1))
        parts.append(self._rows(state.old, self.bits[-1]))
        long = jnp.arange(parts[-1][0].shape[1], dtype=jnp.int32)[None]
        first = (done - len(state.steps)) * n  # tokens that are older
        where.append(jnp.where(long < first, long, -1))
        k, v = (jnp.concatenate(a, 1) for a in zip(*parts))
        return Cache(k, v, jnp.concatenate(where, 1)[..., None], *state[4:])
