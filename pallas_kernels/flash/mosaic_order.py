"""The order of programs of flash kernels by Mosaic GPU: in sections, so that what many
programs read stays in the second-level cache.

The last axis of a grid passes fastest. With all heads of the batch inside and tiles
outside, the tiles that a head's programs pass over have left the cache before its next
program begins, and come from main memory again and again: counted, it is what short
sequences waited for. With one head after the other the cache holds them, but the long
lines of the last head end alone. A section is as many heads as fit into the cache
together; inside it the order is the first one.

Source: the sections of flash-attention's tile scheduler for Hopper (Shah et al., 2024,
arXiv:2407.08608, and its code).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

SECTION = 32 * 2**20  # bytes, of the 50 MB (H100, H200) that hold other things, too
MOST = 2**16  # programs along any axis of a grid but the last


class Order(NamedTuple):
    """tiles: of each head; batch, heads: rows, and heads of each; size: heads of a
    section, 0 for all heads of all rows inside."""

    tiles: int
    batch: int
    heads: int
    size: int

    @property
    def grid(self) -> dict[str, int]:
        """The axes of the grid."""
        if not self.size:
            return {"tile": self.tiles, "batch": self.batch, "head": self.heads}
        return {"section": self.batch * self.heads // self.size, "tile": self.tiles,
                "head": self.size}

    def here(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """tile, row of the batch and head of this program."""
        tile, head = jax.lax.axis_index("tile"), jax.lax.axis_index("head")
        if not self.size:
            return tile, jax.lax.axis_index("batch"), head
        flat = jax.lax.axis_index("section") * jnp.int32(self.size) + head
        heads = jnp.int32(self.heads)
        return tile, jax.lax.div(flat, heads), jax.lax.rem(flat, heads)


def order(tiles: int, batch: int, heads: int, shared: int, streamed: int,
          variant: tuple[str, ...] = ()) -> Order:
    """The order of a call. shared: how many heads pass over the same tiles; streamed:
    bytes of these. variant: "by_tile" is all heads inside, "half_sections" sections of
    half the size, one head after the other if that is all that fits."""
    limit = SECTION // (2 if "half_sections" in variant else 1)
    groups = batch * heads // shared
    most = max(limit // max(streamed, 1), 1)
    many = next(n for n in range(min(most, groups), 0, -1) if groups % n == 0)
    few = groups // many >= MOST  # sections of too many heads to count
    return Order(tiles, batch, heads, 0 if few or "by_tile" in variant else
                 many * shared)


def of_a_head(a: jax.Array) -> int:
    """Bytes of one head of an array [B,T,H,D] in one row of the batch."""
    return a.shape[1] * a.shape[3] * a.dtype.itemsize
