"""Distances: a learned vector for each distance of query and key, tile by tile.

Beside q_i.k_j a logit has q_i.e_(i-j), and beside v_j a value has w_(i-j). Rows of e
are ordered from the farthest key to the nearest, so a tile of queries and keys next to
each other needs a run of bq + bk rows: the product of its queries with these is skewed
into place (Huang et al., 2018, arXiv:1809.04281), and nothing of size T x T or
T x T x D is ever there.

    R = q E^T [bq,bq+bk],   S_ab = R_(a, bq - 1 - a + b):   each row one further left

Tokens in no such order (slots of a ring) take their products by distance instead.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp


class Distances(NamedTuple):
    """keys [H|1,R,D]: row zero - d is e_d, and e_d is 0 for what has no row; d < 0 are
    keys behind the query. values [H|1,R,V]: w in the same order, or None. first:
    the distance of query 0 from key 0, int32, of queries and keys that count on from
    there side by side in one sequence; None: distances are those of positions."""

    keys: jax.Array
    values: Any
    zero: int
    first: Any = None


class Tables(NamedTuple):
    """Both tables by key head, [K|1,G|1,R,.]."""

    keys: jax.Array
    values: Any


def grouped(distances: Distances | None, heads: int) -> Tables | None:
    """The tables of H = K G query heads in their groups."""
    if distances is None:
        return None

    def group(a):
        if a is None:
            return None
        return a[None] if a.shape[0] == 1 else a.reshape(heads, -1, *a.shape[1:])

    return Tables(group(distances.keys), group(distances.values))


def check_distances(distances: Distances, q: Any, k: Any, v: Any) -> None:
    """Raises ValueError unless the tables fit q [B,T,H,D] and v [B,S,K,V]."""
    for name, a, width in (("keys", distances.keys, q.shape[3]),
                           ("values", distances.values, v.shape[3])):
        heads = (1, q.shape[2])
        if a is not None and (a.ndim != 3 or a.shape[0] not in heads
                              or a.shape[2] != width):
            raise ValueError(
                f"distances: {name} has shape {a.shape}: expected [H|1,R,{width}] "
                f"with H={q.shape[2]}")


def term(zero: int, first, tile, at, positions) -> Callable:
    """(x [B,K,G,bq,D], table [K|1,G|1,R,D]) -> x_i.e_(i-j) [B,K,G,bq,bk] float32 of one
    tile. tile: (bq, bk); at: its numbers (i, j); positions: those of its queries
    [B,1,1,bq,1] and keys [B,K|1,1,1,bk], which are read where there is no `first`."""
    if first is None:
        return functools.partial(_by_position, zero, *positions)
    (bq, bk), (i, j) = tile, at
    # the greatest distance, of the last query and the first key
    return functools.partial(_skewed, zero, first + i * bq + bq - 1 - j * bk, tile)


def _skewed(zero: int, most, tile, x, table) -> jax.Array:
    (bq, bk), rows, many = tile, table.shape[2], sum(tile)
    # zeros on both sides: what is out of reach has no vector
    wide = jnp.pad(table, ((0, 0), (0, 0), (many, many), (0, 0)))
    # row zero - most of the table, behind `many` rows of zeros
    start = jnp.clip(zero - most, -many, rows) + many
    # e of the distances most, most - 1, ...: [K|1,G|1,bq+bk,D]
    part = jax.lax.dynamic_slice_in_dim(wide, start, many, 2)
    r = _product(x, part)  # [B,K,G,bq,bq+bk]
    flat = r.reshape(*r.shape[:3], bq * many)
    # row a is read from bq - 1 - a on: a stride of one column less
    flat = flat[..., bq - 1:bq * many - 1]
    return flat.reshape(*r.shape[:3], bq, many - 1)[..., :bk]


def _by_position(zero: int, q_pos, kv_pos, x, table) -> jax.Array:
    r = _product(x, table)  # [B,K,G,bq,R]
    at = zero - (q_pos - kv_pos)  # [B,K|1,1,bq,bk]
    there = (at >= 0) & (at < table.shape[2])
    at = jnp.broadcast_to(jnp.where(there, at, 0), (*r.shape[:4], at.shape[4]))
    return jnp.where(there, jnp.take_along_axis(r, at, 4), 0)


def _product(x, table) -> jax.Array:
    """x [B,K,G,bq,D] times rows [K|1,G|1,r,D] -> [B,K,G,bq,r]."""
    # [B,K,G,bq,D] [1,K|1,G|1,D,r]
    return jnp.matmul(
        x, table.swapaxes(2, 3)[None].astype(x.dtype),
        preferred_element_type=jnp.float32)


def weighted(term: Callable, p, table) -> jax.Array:
    """sum_j p_ij w_(i-j) [B,K,G,bq,V] of weights p [B,K,G,bq,bk]: the way back of a
    term, which is linear in x."""
    x = jax.ShapeDtypeStruct((*p.shape[:4], table.shape[3]), jnp.float32)
    return jax.linear_transpose(lambda x: term(x, table), x)(p)[0]


def pulled(term: Callable, x, table, ds) -> tuple[jax.Array, jax.Array]:
    """What ds [B,K,G,bq,bk] gives to x and to the table."""
    return jax.vjp(term, x, table)[1](ds)
