"""Shards: patterns of blocks in which every head keeps another part of the past.

The masks of S2-Attention (Lin et al., 2024, arXiv:2407.17678) and what can be said of
any pattern of blocks: whether its heads together see everything, whether a cache may
forget what it hides, and its columns, in the form in which chosen blocks are read.
"""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks import Mask


@dataclasses.dataclass(frozen=True)
class Sharding(Mask):
    """What the heads of S2-Attention see. block, local, stride, offset: as in `S2`.

    step: g, blocks by which the shards of two key heads differ. group: H/K query heads
    of a key head. dense_from: the first key head that sees everything.
    """

    block: int
    local: int
    stride: int
    step: int = 1
    offset: int = 0
    group: int = 1
    dense_from: int | None = None

    def __call__(self, h, i, j):
        # the window: the query's own block and local - 1 before it
        near = i // self.block - j // self.block < self.local
        head = h // self.group
        # the shard: blocks r, r + stride, ... with r = -(head g + offset) mod stride
        mine = (j // self.block + head * self.step + self.offset) % self.stride == 0
        seen = near | mine
        if self.dense_from is not None:
            seen = seen | (head >= self.dense_from)
        return seen & (j <= i)

    def bounds(self, i, j):
        near = i[1] // self.block - j[0] // self.block < self.local
        return j[0] <= i[1], (j[1] <= i[0]) & near


@dataclasses.dataclass(frozen=True)
class Behind(Mask):
    """A head's shard, its blocks side by side, behind the window: key x of a shard is
    token x % block of its block x // block, which is block r + stride (x // block) of
    the text; r is of the head."""

    shards: Sharding

    def __call__(self, h, i, x):
        s = self.shards
        first = -(h // s.group * s.step + s.offset) % s.stride
        # at least `local` blocks before the query's
        return x // s.block * s.stride + first + s.local <= i // s.block

    def bounds(self, i, x):
        s = self.shards
        old, new = (a // s.block * s.stride + s.local for a in x)
        # r is 0 for some head and stride - 1 for another
        return old <= i[1] // s.block, new + s.stride - 1 <= i[0] // s.block


@dataclasses.dataclass(frozen=True)
class BothWays(Mask):
    """The pattern without an order: a window of `local` blocks back and `ahead` blocks
    on, and behind both every `stride`-th block, counted from the window's end."""

    block: int
    local: int
    ahead: int
    stride: int
    group: int = 1
    dense_from: int | None = None

    def __call__(self, h, i, j):
        gap = i // self.block - j // self.block
        # max(0, a), of any array: positive on one side of the window, 0 inside
        back, on = gap - self.local + 1, -gap - self.ahead + 1
        away = (back + abs(back) + on + abs(on)) // 2
        # 0 in the window, and every stride-th block away from it
        seen = away % self.stride == 0
        if self.dense_from is not None:
            seen = seen | (h // self.group >= self.dense_from)
        return seen


def coverage(blocks: np.ndarray) -> float:
    """The share of the pairs of blocks, no later than the query's own, that some head
    of a causal pattern [H,M,N] sees; below 1 it is warned."""
    past = np.tril(np.ones(blocks.shape[1:], bool), blocks.shape[2] - blocks.shape[1])
    share = float((blocks.any(0) & past).sum() / past.sum())
    if share < 1:
        warnings.warn(
            f"the heads together see {share:.0%} of the past: expected as many key "
            "heads as stride or more, or a smaller stride", stacklevel=2
        )
    return share


def forgets(blocks: np.ndarray) -> bool:
    """Whether a cache may drop blocks: what a query block of a causal pattern [H,M,N]
    does not see behind its own, no later one does."""
    below = np.tril(np.ones(blocks.shape[1:], bool), -1)[:-1]
    # below the diagonal: seen(m + 1, n) <= seen(m, n)
    return not (blocks[:, 1:] & ~blocks[:, :-1] & below).any()


def columns(blocks: np.ndarray) -> np.ndarray:
    """Any pattern of blocks [H,M,N] as the block numbers [H,M,n] of each row, -1 behind
    them: `chosen` of `attn.sparse.chosen_blocks.attend`, for one batch row."""
    order = np.argsort(~blocks, axis=-1, kind="stable")
    most = int(blocks.sum(-1).max())
    there = np.take_along_axis(blocks, order, -1)
    return np.where(there, order, -1)[..., :most].astype(np.int32)


def first_blocks(mask: Sharding, heads: int) -> np.ndarray:
    """r [K]: the first block of each key head's shard."""
    return -(np.arange(heads) * mask.step + mask.offset) % mask.stride


def compact(mask: Sharding, a: jax.Array) -> jax.Array:
    """The shards of a [B,T,K,X], their blocks side by side: [B,F,K,X]."""
    b, t, heads, width = a.shape
    span = mask.block * mask.stride
    a = jnp.pad(a, ((0, 0), (0, -t % span), (0, 0), (0, 0)))
    # [B,T/span,stride,block,K,X]
    a = a.reshape(b, -1, mask.stride, mask.block, heads, width)
    own = [a[:, :, r, :, h] for h, r in enumerate(first_blocks(mask, heads))]
    # K times [B,T/span,block,X] -> [B,T/span,block,K,X] -> [B,F,K,X]
    return jnp.stack(own, 3).reshape(b, -1, heads, width)


def heads_of(mask: Sharding, q, k, v, *, dense: bool) -> tuple:
    """q, k and v of the heads with a shard, or of the dense ones."""
    first = k.shape[2] if mask.dense_from is None else mask.dense_from

    def take(a, first: int):
        return a[:, :, first:] if dense else a[:, :, :first]

    return take(q, first * mask.group), take(k, first), take(v, first)
