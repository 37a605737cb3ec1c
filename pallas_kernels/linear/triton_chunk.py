"""Chunks of linear attention on GPU: what a call is, and what a program reads of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.linear.chunk import (
    FLOOR, ChannelDecay, HeadDecay, NoDecay, TokenDecay
)
from pallas_kernels.machine.product import F32
from pallas_kernels.machine.triton import load, power
from pallas_kernels.tile import both


class Launch(NamedTuple):
    """How a program of one kernel runs."""

    num_warps: int
    num_stages: int


class Call(NamedTuple):
    """What is static: T tokens in chunks of c, `groups` query heads a key head; lanes
    of q and k; value channels of a program; widths of a tile of the state; key channels
    of a program that makes their gradients; each program's warps and stages; and
    whether pairs are made once a chunk, by `triton_pairs.py`."""

    t: int
    c: int
    groups: int
    scale: float
    lanes: int
    values: int
    state: tuple[int, int]
    keys: int
    launch: Launch
    state_launch: Launch
    keys_launch: Launch
    interpret: Any
    blocks: bool = False

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.t // self.c)


class Arrays(NamedTuple):
    """What a kernel reads where it lies; None for what there is not.

    q, do [B,T,H,D|V], k, v [B,T,K,D|V]; g [H], [B,T,H] or [B,T,H,D]; flags [B,T];
    state: one [B,H,V,D], or those of chunks [B,H,N,V,D], and d_state the same of their
    gradients; V and D are multiples of their tiles there; pairs [B,H,N,c,c].
    """

    q: Any
    k: Any
    v: Any
    g: Any
    flags: Any
    do: Any = None
    state: Any = None
    d_state: Any = None
    pairs: Any = None


class ChunkContext:
    """A chunk of one head of one row of the batch."""

    def __init__(self, call: Call, x: Arrays, b, h, n):
        self.call, self.x, self.b, self.h = call, x, b, h
        self.kv = h // call.groups
        self.start, c = n * call.c, call.c
        number = self.start + jax.lax.broadcasted_iota(jnp.int32, (c,), 0)
        self.inside = number < call.t if call.t % c else None
        self.real, self.flag = self.inside, None
        if x.flags is not None:
            self.flag = load(x.flags.at[b, pl.ds(self.start, c)], self.inside, 0)
            self.real = both(self.inside, self.flag > 0)

    def cut(self, ref, head, first, width: int, where):
        """Tokens and lanes of an array [B,T,H,X], and which of them are there."""
        zero = self.start * 0  # a traced 0, as in `machine/triton.py`
        at = ref.at[self.b, pl.ds(self.start, self.call.c), head,
                    pl.ds(zero + first, width)]
        found = None if where is None else where[:, None]  # [c,1]
        if ref.shape[3] != power(ref.shape[3]):  # tiles cover that many lanes
            lane = first + jax.lax.broadcasted_iota(
                jnp.int32, (self.call.c, width), 1)
            found = both(found, lane < ref.shape[3])
        size = (self.call.c, width)
        return at, None if found is None else jnp.broadcast_to(found, size)

    def rows(self, ref, head, first=0, width: int | None = None):
        """A tile of q, k, v or do [c,width], 0 at padding and beyond the end."""
        width = width or self.call.lanes
        at, inside = self.cut(ref, head, first, width, self.real)
        return load(at, inside, 0)

    def write(self, ref, value, head, first=0) -> None:
        """The reverse of `rows`; at padding too, where the value is 0."""
        at, inside = self.cut(ref, head, first, value.shape[1], self.inside)
        triton.store(at, value.astype(ref.dtype), mask=inside)

    def decay(self, first=0, width: int | None = None) -> NoDecay:
        """The decay inside the chunk, of some of the key channels."""
        call, g = self.call, self.x.g
        if g is None:
            return NoDecay(call.c, call.scale)
        if len(g.shape) == 1:
            count = jnp.minimum(call.t - self.start, call.c)
            return HeadDecay(call.c, call.scale, g[self.h], count)
        if len(g.shape) == 3:
            at = g.at[self.b, pl.ds(self.start, call.c), self.h]
            return TokenDecay(call.c, call.scale, load(at, self.inside, 0)[None, :])
        return ChannelDecay(
            call.c, call.scale, self.by_channel(first, width), rolled=True)

    def by_channel(self, first, width: int | None):
        """Log decays [c,width] of some of the key channels."""
        own = self.rows(self.x.g, self.h, first, width).astype(F32)  # [c,width]
        own = jnp.maximum(own, FLOOR)
        if self.flag is not None:
            # a segment begins: all that was is forgotten
            own = jnp.where(self.flag[:, None] > 1, FLOOR, own)
        return own
