"""Block grid: tokens laid out so that each block holds tokens of one sequence only.

Methods that choose blocks cut a sequence into blocks from its first token on. In a row
of packed sequences those cuts fall anywhere, so the tokens are laid on a grid first:
every sequence begins with a block of its own, and what is left of its last block stays
empty. A row of one sequence without padding lies on the grid as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.eager import refuse

SEQUENCES = 8  # short ones for which there is room in any row


class Grid(NamedTuple):
    """A row on its grid of N blocks of I tokens.

    at [B,T]: the slot of each token, N I for padding; None where slot t holds token t.
    pos [B|1,N,I] int32, -1 in an empty slot; segment [B|1,N,I], 0 there. full [B|1]:
    there were more blocks than fit, and some tokens have no slot.
    """

    at: Any
    pos: jax.Array
    segment: jax.Array
    full: jax.Array

    @property
    def slots(self) -> int:
        """How many there are, N I."""
        return self.pos.shape[1] * self.pos.shape[2]

    @property
    def owner(self) -> jax.Array:
        """The segment index [B|1,N] of each block, 0 if it is empty; they rise."""
        return self.segment.max(2)

    @property
    def last(self) -> jax.Array:
        """The position [B|1,N] of each block's last token, -1 if it is empty."""
        return self.pos.max(2)

    def put(self, a: jax.Array) -> jax.Array:
        """[B,T,...] -> [B,N I,...] with 0 in empty slots."""
        return _put(self.at, self.slots, a)

    def take(self, a: jax.Array, t: int) -> jax.Array:
        """[B,N I,...] -> [B,T,...] of T = t tokens, 0 for those without a slot."""
        if self.at is None:
            return a[:, :t]
        return jax.vmap(lambda a, at: a.at[at].get(mode="fill", fill_value=0))(
            a, self.at)

    def first_block(self, segment: jax.Array) -> jax.Array:
        """The first block [B,M] of each of the segment indices [B,M]."""
        # empty blocks stand behind all others
        owner = jnp.where(self.owner > 0, self.owner, 2**31 - 1)
        find = lambda owner, segment: jnp.searchsorted(owner, segment)
        owner, segment = _rows_alike(owner, segment)
        return jax.vmap(find)(owner, segment).astype(jnp.int32)

    def blocks_of(self, rows: Grid) -> tuple[jax.Array, jax.Array]:
        """Of the tokens on another grid, of the same sequences: the first block of each
        one's sequence, and the block that holds its position, -1 for what is no token;
        [B|1,N,I] as they lie there."""
        first = self.first_block(rows.owner)[..., None]
        own = jnp.where(rows.pos < 0, -1, first + rows.pos // self.pos.shape[2])
        return jnp.broadcast_to(first, own.shape), own

    def poison(self, o: jax.Array) -> jax.Array:
        """o [B,...] with NaN in rows whose tokens do not all have a slot; ValueError
        where that can be read."""
        if self.at is None:
            return o
        blocks, size = self.pos.shape[1:3]

        def too_many(_) -> ValueError:
            return ValueError(
                f"segments: a row holds more sequences than fit on {blocks} blocks of "
                f"{size} tokens: expected fewer, longer ones"
            )

        refuse(self.full.any(), None, too_many)
        full = self.full.reshape((-1,) + (1,) * (o.ndim - 1))
        return jnp.where(full, jnp.nan, o).astype(o.dtype)


def grid(
    pos: jax.Array, segment: jax.Array, size: int, *, packed: bool, spare: int = 0,
    lead: int = 0,
) -> Grid:
    """The grid of blocks of `size` tokens of a row: pos and segment [B|1,T] as
    `attn.contract.segments` has them, segment 0 for what is no token.

    packed: it may hold padding and several sequences; if not, token t is in slot t.
    spare: blocks that are added, of a memory that is partly empty. lead: slots that are
    left empty in front of each sequence.
    """
    t = pos.shape[1]
    blocks = -(-(t + lead) // size)
    if not packed and not lead:
        cut = lambda a, empty: _pad(a, blocks * size, empty).reshape(-1, blocks, size)
        return Grid(None, cut(pos, -1), cut(segment, 0), jnp.zeros((1,), bool))
    if packed:
        # every sequence may leave one block half empty
        blocks += min(t, max(blocks - spare, SEQUENCES)) * (-(-(lead + 1) // size))
    at, need = jax.vmap(lambda s: _slots(s, size, lead))(segment)  # [B,T], [B]
    full = need > blocks
    at = jnp.where((segment > 0) & (at < blocks * size), at, blocks * size)
    # `_put` leaves 0 where nothing is put: pos is shifted, so that this is -1
    pos, segment = (
        _put(at, blocks * size, a + shift) - shift
        for a, shift in ((pos, 1), (segment, 0)))
    return Grid(
        at, pos.reshape(-1, blocks, size), segment.reshape(-1, blocks, size), full)


def _slots(segment: jax.Array, size: int, lead: int) -> tuple[jax.Array, jax.Array]:
    """The slot of each token of one row, segment [T], and how many blocks there are."""
    real = segment > 0
    time = jnp.cumsum(real.astype(jnp.int32)) - 1  # of tokens; padding stops it
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jax.lax.cummax(
        jnp.where(real, segment, 0))[:-1]])
    begins = real & (segment != before)
    start = jax.lax.cummax(jnp.where(begins, time, 0))  # of the token's sequence
    earlier = jnp.concatenate([jnp.zeros(1, jnp.int32), start[:-1]])
    # at the first token of a sequence: the blocks of the one before it
    closed = jnp.where(begins & (time > 0), -(-(time - earlier + lead) // size), 0)
    first = jnp.cumsum(closed)  # the block in which its sequence begins [T]
    slot = first * size + lead + time - start
    return slot, jnp.where(real, slot // size + 1, 0).max()


def _put(at, slots: int, a: jax.Array) -> jax.Array:
    if at is None:
        return _pad(a, slots, 0)

    def row(at, a):
        return jnp.zeros((slots, *a.shape[1:]), a.dtype).at[at].set(a, mode="drop")

    return jax.vmap(row)(*_rows_alike(at, a))


def _pad(a: jax.Array, length: int, value) -> jax.Array:
    widths = [(0, 0), (0, length - a.shape[1])] + [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, widths, constant_values=value)


def _rows_alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both with as many rows as the one that has more than 1."""
    rows = b.shape[0] if a.shape[0] == 1 else a.shape[0]
    wide = lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:]))
    return wide(a), wide(b)
