"""Tile patterns: the parts of a tile that a mask leaves, of tiles that it cuts alike.

A causal mask, for one, has one shape on each tile that the diagonal crosses. A kernel
whose program has that shape in it computes those parts alone, without looking at the
mask where it leaves all; each such program is unrolled, which bounds how large tiles
may be.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.schedule import FULL, MASKED, Tiling, block_mask


class Part(NamedTuple):
    """What of a tile is computed at once: keys and queries, each from first to end."""

    first_key: int
    end_key: int
    first_query: int
    end_query: int

    @property
    def area(self) -> int:
        """How many logits it has."""
        return (self.end_key - self.first_key) * (self.end_query - self.first_query)

    @property
    def keys(self) -> slice:
        """Keys of the tile."""
        return slice(self.first_key, self.end_key)

    @property
    def queries(self) -> slice:
        """Queries of the tile."""
        return slice(self.first_query, self.end_query)


class TilePatterns(NamedTuple):
    """The ways in which a kernel may have to take a tile.

    whole: without a mask; masked: with one; partial: with one, in those parts alone
    that a mask of just this shape leaves. The n-th is asked for by MASKED + 1 + n.
    """

    chunk: int
    whole: bool = True
    masked: bool = True
    partial: tuple[tuple[Part, ...], ...] = ()

    def logits(self, tiling: Tiling) -> int:
        """How many logits the program of a step computes, all ways together."""
        whole = (self.whole + self.masked) * tiling.rows * tiling.columns
        return whole + sum(part.area for parts in self.partial for part in parts)

    def parts(self, tiling: Tiling) -> tuple[Part, ...]:
        """All of a tile, its keys in chunks."""
        n = self.chunk
        return tuple(Part(c, c + n, 0, tiling.rows)
                     for c in range(0, tiling.columns, n))


LANES = 128  # queries of a part come in multiples of it
MOST_PATTERNS, MOST_PARTS = 3, 2**22
WORTH = 1 / 16  # of a tile that a pattern has to spare
MOST_LOGITS = 9 * 2**20  # of a program, where heads are 128 wide


def tile_patterns(mask: Any, tiling: Tiling, chunk: int, static: np.ndarray,
                  ask: jax.Array | None):
    """The ways in which the tiles of `static` [N,M] are taken, and `static` and `ask`
    with the patterns in them. A causal mask, for one, has one shape on each tile that
    the diagonal crosses: what lies beyond it is not computed."""
    kinds, codes = _patterns(mask, tiling, chunk, static, ask is not None)
    if ask is None:
        return kinds, codes, None
    own = jnp.where(static == MASKED, codes, MASKED)
    return kinds, codes, jnp.where(ask == MASKED, own, ask)


def _patterns(mask, tiling: Tiling, chunk: int, static: np.ndarray, traced: bool):
    at = np.argwhere(static == MASKED)
    shape = len(at), tiling.rows // LANES, tiling.columns // chunk
    # positions that are data have no shape, and a part is whole lanes of queries
    useless = tiling.rows % LANES or mask is None or tiling.offset is None
    found: dict[tuple[Part, ...], list[int]] = {}
    if not useless and 0 < np.prod(shape) <= MOST_PARTS:
        for n, parts in enumerate(_parts(mask, tiling, chunk, at)):
            found.setdefault(parts, []).append(n)
    area = tiling.rows * tiling.columns

    def spared(parts):
        return 1 - sum(p.area for p in parts) / area

    # what a pattern spares on all tiles that have its shape
    gains = {parts: spared(parts) * len(own) for parts, own in found.items()
             if spared(parts) >= WORTH}
    best = tuple(sorted(gains, key=lambda parts: -gains[parts])[:MOST_PATTERNS])
    codes = static.copy()
    for n, parts in enumerate(best):
        codes[tuple(at[found[parts]].T)] = MASKED + 1 + n
    whole, masked = (traced or bool((codes == kind).any()) for kind in (FULL, MASKED))
    return TilePatterns(chunk, whole, masked, best), codes


def shrink_to_fit(mask: Any, tiling: Tiling, chunk: int, width: int, traced: bool,
                  by_column: bool) -> Tiling:
    """`tiling`, or one of smaller tiles, whose program is short enough to compile in
    seconds: every way of taking a tile is unrolled, and counts as heads are wide.
    traced: positions or segments decide; by_column: queries are halved before keys."""
    while True:
        patterns, _ = _patterns(mask, tiling, chunk, block_mask(mask, tiling), traced)
        if patterns.logits(tiling) * max(width, LANES) <= MOST_LOGITS * LANES:
            return tiling
        rows = _halved(tiling.t, tiling.rows, chunk)
        columns = _halved(tiling.s, tiling.columns, chunk)
        first = tiling.rows - tiling.columns + (1 if by_column else 0)
        if rows >= tiling.rows or columns >= tiling.columns:
            return tiling
        tiling = tiling._replace(rows=rows) if first > 0 else tiling._replace(
            columns=columns)


def _halved(n: int, size: int, step: int) -> int:
    """The size of twice as many tiles of n tokens, a multiple of `step`."""
    count = 2 * -(-n // size)
    return -(-n // (count * step)) * step


def _parts(mask, tiling: Tiling, chunk: int, at: np.ndarray):
    """For each tile of `at` [P,2] the parts that the mask leaves: a chunk of keys, and
    from the first to the last query that sees any of them, in steps of LANES."""

    def step(first, size, each):
        return first[:, None] * size + np.arange(0, size, each)

    q = step(at[:, 0], tiling.rows, LANES)[:, :, None]  # [P,rows/LANES,1]
    k = step(at[:, 1], tiling.columns, chunk)[:, None]  # [P,1,columns/chunk]
    last_q = np.minimum(q + LANES, tiling.t) - 1
    last_k = np.minimum(k + chunk, tiling.s) - 1
    assert tiling.offset is not None
    some, _ = mask.bounds((q + tiling.offset, last_q + tiling.offset), (k, last_k))
    some = np.broadcast_to(some, (len(at), q.shape[1], k.shape[2]))
    some = some & (q < tiling.t) & (k < tiling.s)
    first = some.argmax(1) * LANES  # the first query that sees any
    end = (some.shape[1] - some[:, ::-1].argmax(1)) * LANES
    for any_, first_, end_ in zip(some.any(1), first, end):
        yield tuple(Part(c * chunk, (c + 1) * chunk, int(first_[c]), int(end_[c]))
                    for c in np.flatnonzero(any_).tolist())
