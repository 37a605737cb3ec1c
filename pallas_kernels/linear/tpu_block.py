"""Chunks of the linear attention kernels on TPU: what is read, how it is cut up, and
the decays, pairs and gradients of a block's chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear import tpu_channels as channels
from pallas_kernels.linear.chunk import FLOOR, HeadDecay, NoDecay, TokenDecay
from pallas_kernels.machine.product import F32
from pallas_kernels.machine.tpu import column


class Call(NamedTuple):
    """What is static: T tokens in blocks of chunks of c, `groups` query heads of a key
    head in one program; widths D and V as they were."""

    t: int
    block: int
    c: int
    groups: int
    scale: float
    vmem: int
    interpret: Any


class Arrays(NamedTuple):
    """What a kernel reads, T a multiple of a block; None for what there is not.

    q, do [B,H,T,D|V], k, v [B,K,T,D|V]; g [H], [B,H,1,T] or [B,H,T,D]; flags [B,1,T];
    state, d_state [B,H,V,D]; begun [B,H,N,V,D]: the state that each block begins with;
    sums: the two matrices of `tpu_channels.py`.
    """

    q: Any
    k: Any
    v: Any
    g: Any
    flags: Any
    state: Any = None
    do: Any = None
    begun: Any = None
    d_state: Any = None
    sums: Any = None


class ChunkContext:
    """A block of one head: its chunks, each with its decay."""

    def __init__(self, call: Call, x: Arrays, head, n):
        self.call, self.x, self.head, self.n = call, x, head, n
        self.chunks = [slice(m, m + call.c) for m in range(0, call.block, call.c)]

    def real(self, at: slice):
        """Which tokens are there [c,1]; None for all."""
        if self.x.flags is None:
            return None
        return column(self.x.flags[0, :, at].astype(F32)) > 0.5

    def rows(self, ref, at: slice):
        """Tokens of q, k, v or do [c,X], padding as zeros."""
        a, real = ref[0, 0, at], self.real(at)
        return a if real is None else jnp.where(real, a, jnp.zeros_like(a))

    @property
    def by_channel(self) -> bool:
        """Whether each channel has its decay."""
        return self.x.sums is not None

    def decays(self) -> list[Any]:
        """The decay inside each chunk."""
        call, g = self.call, self.x.g
        if self.by_channel:
            own = [self.channels(at) for at in self.chunks]
            return channels.joint(call.c, call.scale, own, self.x.sums[0])
        if g is None:
            return [NoDecay(call.c, call.scale)] * len(self.chunks)
        if len(g.shape) > 1:
            return [TokenDecay(call.c, call.scale, g[0, 0, :, at])
                    for at in self.chunks]
        left = call.t - self.n * call.block

        def count(at):
            return jnp.clip(left - at.start, 0, call.c)

        return [HeadDecay(call.c, call.scale, g[self.head], count(at))
                for at in self.chunks]

    def channels(self, at: slice):
        """Log decays [c,D]."""
        g = jnp.maximum(self.x.g[0, 0, at].astype(F32), FLOOR)
        if self.x.flags is None:
            return g
        flag = column(self.x.flags[0, :, at].astype(F32))
        # 2: a segment begins and all is forgotten; 0: padding, nothing decays
        return jnp.where(flag > 1.5, FLOOR, jnp.where(flag > 0.5, g, 0.0))

    def pairs(self, decays, qk) -> list[Any]:
        """Pairs of each chunk [c,c]; qk: its q and k."""
        if self.by_channel:
            return channels.pairs(decays, qk)
        return [decay.pairs(*own) for decay, own in zip(decays, qk)]

    def back(self, decays, qk, given) -> list[Any]:
        """Gradients of each chunk; given: what `NoDecay.back` takes but for q and k."""
        if self.by_channel:
            return channels.back(decays, qk, given, self.x.sums[1])
        return [decay.back(*own, *more) for decay, own, more in zip(decays, qk, given)]


def pad(a, axis: int, size: int):
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, -a.shape[axis] % size)
    return jnp.pad(a, widths)


def tokens(a, size: int):
    """[B,T,H,X] -> [B,H,T,X] with T a multiple of `size` and X one of 8."""
    return pad(pad(a, 1, size), 3, 8).transpose(0, 2, 1, 3)


def turned(a):
    """A state [B,H,V,D] with widths that are multiples of 8."""
    return pad(pad(a, 2, 8), 3, 8)


def arrays(call: Call, flags, q, k, v, g, state) -> Arrays:
    size, by_channel = call.block, g is not None and g.ndim == 4
    if g is not None and g.ndim == 3:
        g = pad(g.transpose(0, 2, 1)[:, :, None], 3, size)  # [B,H,1,T]
    elif by_channel:
        g = tokens(g, size)  # [B,H,T,D]
    flags = None if flags is None else pad(flags, 1, size)[:, None]  # [B,1,T]
    q, k, v = (tokens(a, size) for a in (q, k, v))  # [B,H|K,T,.]
    return Arrays(q, k, v, g, flags, None if state is None else turned(state),
                  sums=channels.matrices(call.c) if by_channel else None)


def specs(call: Call, x: Arrays, query, key, block) -> Arrays:
    """How each array is cut; query, key, block: of a grid step, after the batch's row.
    """
    size = call.block

    def tile(a, head):
        return pl.BlockSpec(
            (1, 1, size, a.shape[3]), lambda b, *at: (b, head(*at), block(*at), 0))

    def whole(a):
        return pl.BlockSpec((1, 1, *a.shape[2:]), lambda b, *at: (b, query(*at), 0, 0))

    g = None
    if x.g is not None and x.g.ndim == 1:
        g = pl.BlockSpec(memory_space=pltpu.SMEM)  # a number a head
    elif x.g is not None and x.g.shape[2] == 1:
        g = pl.BlockSpec((1, 1, 1, size),
                         lambda b, *at: (b, query(*at), 0, block(*at)))
    elif x.g is not None:
        g = tile(x.g, query)

    def some(a, spec):
        return None if a is None else spec(a)

    return Arrays(
        tile(x.q, query), tile(x.k, key), tile(x.v, key), g,
        some(x.flags, lambda a: pl.BlockSpec(
            (1, 1, size), lambda b, *at: (b, 0, block(*at)))),
        some(x.state, whole), some(x.do, lambda a: tile(a, query)),
        some(x.begun, lambda a: pl.BlockSpec(
            (1, 1, 1, *a.shape[3:]), lambda b, *at: (b, query(*at), block(*at), 0, 0))),
        some(x.d_state, whole),
        some(x.sums, lambda pair: tuple(
            pl.BlockSpec(a.shape, lambda *at: (0, 0)) for a in pair)),
    )
