"""The schedule: which tiles a kernel visits, in which order, and which need a mask.

What a static mask hides never enters the list. What positions and segments of packed
sequences hide is known only when the data is: then the list holds every tile that the
mask leaves, and a word per row of the batch says what each of them asks for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tile import TileSpec

SKIP, FULL, MASKED = 0, 1, 2  # what a tile asks for
FAR = 2**29


class Tiling(NamedTuple):
    """Sizes of one call: T and S tokens in tiles of `rows` queries and `columns` keys.

    offset: position of query 0 when positions count, None when they are arrays.
    """

    t: int
    s: int
    rows: int
    columns: int
    offset: int | None

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles there are of queries and of keys."""
        return -(-self.t // self.rows), -(-self.s // self.columns)


class Static(NamedTuple):
    """What is known of one call before it runs.

    tiling, backward: the tiles of the two passes; tiles: what the tile table says of
    each, one of `pallas_kernels.tiles`; vmem: bytes of fast memory for a kernel,
    on TPU; variant: candidates that the call asks for.
    """

    form: TileSpec
    tiling: Tiling
    backward: Tiling
    tiles: tuple[Any, Any]
    vmem: int
    backend: str
    interpret: Any
    variant: tuple[str, ...] = ()

    def block_masks(self, tiling: Tiling, side: Side):
        """What is asked of each tile: a table [N,M], and a traced [B,N,M] or None."""
        table = block_mask(self.form.mask, tiling)
        if side.q_pos is None and side.q_segment is None:
            return table, None
        where = side.q_pos, side.kv_pos, side.q_segment, side.kv_segment
        return table, traced_block_mask(self.form.mask, tiling, table, *where)


class Side(NamedTuple):
    """Arrays of a call without a gradient; None for what it does not use.

    head [H]: global head numbers; q_pos [B,T], kv_pos [B,S,K|1]; q_segment [B|1,T],
    kv_segment [B|1,S]; keep [B,H,T,S]; seed: two uint32 words and batch [B], for
    dropout.
    """

    head: Any
    q_pos: Any = None
    kv_pos: Any = None
    q_segment: Any = None
    kv_segment: Any = None
    keep: Any = None
    seed: Any = None
    batch: Any = None


def block_mask(mask: Any, tiling: Tiling) -> np.ndarray:
    """What the mask asks of each tile, [query tiles, key tiles]: SKIP, FULL, MASKED."""
    nq, nk = tiling.grid
    if tiling.offset is None:  # positions are data
        return np.full((nq, nk), MASKED, np.int32)
    first_q, first_k = np.arange(nq) * tiling.rows, np.arange(nk) * tiling.columns
    last_q = np.minimum(first_q + tiling.rows, tiling.t) - 1
    last_k = np.minimum(first_k + tiling.columns, tiling.s) - 1
    queries = [(a + tiling.offset)[:, None] for a in (first_q, last_q)]  # [N,1]
    keys = [a[None] for a in (first_k, last_k)]  # [1,M]
    some = every = np.ones((nq, nk), bool)
    if mask is not None:
        some, every = (
            np.broadcast_to(x, (nq, nk)) for x in mask.bounds(queries, keys)
        )
    # the tail of the last tile is nobody's key
    short = (np.arange(nk) == nk - 1)[None] & (nk * tiling.columns > tiling.s)
    return np.where(some, np.where(every & ~short, FULL, MASKED), SKIP).astype(np.int32)


def traced_block_mask(mask, tiling: Tiling, static: np.ndarray, q_pos, kv_pos,
                      q_segment, kv_segment):
    """What positions and segments leave of `static` [N,M]: int32 [B,N,M], traced.

    q_pos [B,T], kv_pos [B,S,heads] or None; q_segment [B|1,T] and kv_segment [B|1,S],
    or None.
    """
    nq, nk = tiling.grid
    some = jnp.asarray(static != SKIP)[None]  # [1,N,M]
    every = jnp.asarray(static == FULL)[None]  # [1,N,M]
    if q_pos is not None:
        q_at = _extent(q_pos[..., None], None if q_segment is None else q_segment > 0,
                       tiling.rows, nq)
        kv_at = _extent(kv_pos, None, tiling.columns, nk)
        i, j = [a[:, :, None] for a in q_at], [a[:, None] for a in kv_at]
        seen, whole = (True, True) if mask is None else mask.bounds(i, j)
        some = some & seen & (j[1] >= 0)  # some slot is filled
        tail = nk * tiling.columns > tiling.s
        short = (jnp.arange(nk) == nk - 1)[None, None] & tail
        every = some & whole & (j[0] >= 0) & ~short  # no slot is empty
    if q_segment is not None:
        mine = _extent(q_segment[..., None], None, tiling.rows, nq)
        other = _extent(kv_segment[..., None], None, tiling.columns, nk)
        i, j = [a[:, :, None] for a in mine], [a[:, None] for a in other]
        # ranges of segments meet, and neither is all padding
        some = some & (i[0] <= j[1]) & (j[0] <= i[1]) & (i[1] > 0) & (j[1] > 0)
        # one segment on both sides, the same
        every = every & (i[0] == i[1]) & (j[0] == j[1]) & (i[0] == j[0])
    return jnp.where(some, jnp.where(every, FULL, MASKED), SKIP).astype(jnp.int32)


def _extent(a, real, size: int, count: int):
    """The least and the greatest of a [B,T,heads] in each of `count` tiles: [B,count].
    """
    ends = []
    # ends of nothing, so that a tile without a token meets no other
    for value, reduce in ((FAR, jnp.min), (-FAR, jnp.max)):
        x = a if real is None else jnp.where(real[..., None], a, value)
        x = jnp.pad(x, ((0, 0), (0, count * size - a.shape[1]), (0, 0)),
                    constant_values=value)
        ends.append(reduce(x.reshape(a.shape[0], count, -1), -1))
    return ends


class GridOrder(NamedTuple):
    """A list of tiles for a sequential grid, one entry a step.

    order [P]: row << 16 | column of a tile. ask [B|1,P]: what is asked there; hold
    [B|1,P]: the tile of the inner axis to have at hand, that of the last tile that
    asked for something, so that nothing is fetched for a skipped one. first, last [P]:
    whether the entry opens and closes its line.
    """

    order: np.ndarray
    first: np.ndarray
    last: np.ndarray
    ask: jax.Array
    hold: jax.Array


def grid_order(static: np.ndarray, ask: jax.Array | None, by_column: bool = False):
    """The tiles of `static` [N,M] that ask for something, row by row or column by
    column; a line without any keeps one entry, so that its result is written."""
    table = static.T if by_column else static
    wanted = table != SKIP
    wanted[:, 0] |= ~wanted.any(1)  # no line is empty
    line, inner = (a.astype(np.int32) for a in np.nonzero(wanted))
    row, column = (inner, line) if by_column else (line, inner)
    edge = np.ones(1, bool)
    change = line[1:] != line[:-1]  # where a line ends
    first, last = np.append(edge, change), np.append(change, edge)
    ask = jnp.asarray(static)[None] if ask is None else ask
    ask = ask[:, row, column]
    at = jnp.arange(len(line), dtype=jnp.int32)[None]
    # the latest step up to here that asks for something
    latest = jax.lax.cummax(jnp.where(ask != SKIP, at, 0), axis=1)
    hold = jnp.asarray(inner)[latest]
    return GridOrder(row << 16 | column, first, last, ask, hold)


def all_tiles(static: np.ndarray, ask: jax.Array | None, rows: bool, columns: bool):
    """Every tile of the grid, skipped or not, for a result that has one entry a row
    (`rows`), a column, both, or neither: lines are what one entry gathers."""
    n, m = static.shape
    row, column = (a.reshape(-1).astype(np.int32) for a in np.indices((n, m)))
    if columns and not rows:
        turned = np.lexsort((row, column))  # column by column
        row, column = row[turned], column[turned]
    line = row * rows * m + column * columns
    change = (line[1:] != line[:-1]) | (rows and columns)
    edge = np.ones(1, bool)
    first, last = np.append(edge, change), np.append(change, edge)
    ask = jnp.asarray(static)[None] if ask is None else ask
    ask = ask[:, row, column]
    return GridOrder(row << 16 | column, first, last, ask, jnp.zeros_like(ask))
