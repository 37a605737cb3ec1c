"""Device grid: exact attention, queries split by rows, keys by columns.

The device in row r and column c of a grid reads the queries of its row and the keys of
its column, and one maximum and one sum along the row end the work
(`attn/exact/online.py`).

The grid is proposed here, after "A Unified View of Long-Sequence Models", whose own
schedule was not to be found.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attn.contract.shapes import check
from attn.exact.attend import attend
from attn.exact.online import merge, output, state_of
from attn.masks import Full
from attn.parallel.sharding import (
    Axis, devices_of, gather, mesh_of, names_of, spec as lies, spread_heads
)
from pallas_kernels.logits import LogitSpec, Where


def grid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(Full()),
    where: Where = Where(),
    *,
    rows: Axis = (),
    columns: Axis = (),
    implementation: str | None = None,
) -> jax.Array:
    """Exact attention over a grid of mesh axes: o [B,T,H,V], T split over `rows`.

    q [B,T,H,D] is split over `rows`, k [B,S,K,D] and v [B,S,K,V] over (rows, columns)
    and gathered along `rows`; heads lie on the axis `model` and cost nothing. Either of
    the two may be (): rows alone is an all-gather of keys, columns alone what decoding
    over a sharded cache needs, one maximum and one sum of B H T (V+1) numbers.

    Positions and segments of `where` in the global view; its heads and shift are not
    asked for. T and S need not be multiples of the devices: keys that are filled in
    have no position. On r x c devices a column's keys are every c-th of r c pieces of
    the sequence, so that columns share a causal mask's work; rows do not, nor do
    columns alone. In low precision o of a part is rounded before it is merged.
    """
    check(q, k, v)
    names = names_of(rows) + names_of(columns)
    if len(set(names)) < len(names):
        raise ValueError(
            f"rows={rows!r}, columns={columns!r}: expected different mesh axes"
        )
    mesh_of(names)
    t, h = q.shape[1:3]
    tokens = _filled_where(where, q, k, devices_of(rows), devices_of(names))
    q = _filled(q, devices_of(rows), 0)
    # spec lies (rows, columns): row r, column c holds piece r C + c of the keys
    k, v = (spread_heads(_filled(a, devices_of(names), 0), h, names) for a in (k, v))
    # along an axis of one device there is nothing to gather or to merge
    grid = devices_of(rows) > 1, devices_of(columns) > 1

    def local(q, k, v, head, q_pos, kv_pos, q_segment, kv_segment):
        # [B,S/(R C),K,.] -> [B,S/C,K,.]: all keys of this column
        k, v, kv_pos, kv_segment = (
            gather(a, rows if grid[0] else None) for a in (k, v, kv_pos, kv_segment)
        )
        here = Where(q_pos, kv_pos, q_segment, kv_segment, head)
        # o [B,T/R,H,V] of this column's keys; the columns' states make the whole
        part = state_of(*attend(
            q, k, v, spec, here, split_lse=True, implementation=implementation
        ))
        return output(merge(part, columns) if grid[1] else part).astype(v.dtype)

    words = "BTHD BSKD BSKV H BT BS BT BS".split()
    f = jax.shard_map(
        local,
        in_specs=tuple(lies(w, names if "S" in w else rows) for w in words),
        out_specs=lies("BTHV", rows),
        check_vma=False,
    )
    return f(q, k, v, jnp.arange(h, dtype=jnp.int32), *tokens)[:, :t]


def traffic(
    t: int, s: int, rows: int, columns: int, *, batch: int = 1, heads: int = 1,
    kv_heads: int | None = None, width: int = 64, itemsize: int = 4,
) -> dict:
    """Bytes of a device in `grid_attention`. gathered: k, v and positions that it
    receives along rows. reduced: m, l and acc of its queries, which one maximum and one
    sum reduce along columns (a ring of n devices sends 2 (n-1)/n of that)."""
    keys = batch * math.ceil(s / (rows * columns))
    # of a key: k, v and its int32 position
    each = 2 * (kv_heads or heads) * width * itemsize + 4
    mine = batch * math.ceil(t / rows) * heads if columns > 1 else 0
    # m, l and acc: V + 2 numbers of float32 a query and head
    return {"gathered": (rows - 1) * keys * each, "reduced": mine * (width + 2) * 4}


def _filled_where(where: Where, q, k, rows: int, devices: int) -> tuple[Any, ...]:
    """q_pos [B,T], kv_pos [B,S], counted if they are not given, and the segments, all
    filled up; a key that is filled in has no position."""
    b, t, s = q.shape[0], q.shape[1], k.shape[1]
    q_pos, kv_pos = where.q_pos, where.kv_pos
    if where.counted:
        q_pos = jnp.arange(s - t, s, dtype=jnp.int32)[None]  # queries are the last T
        kv_pos = jnp.arange(s, dtype=jnp.int32)[None]
    q_pos, kv_pos = jnp.broadcast_to(q_pos, (b, t)), jnp.broadcast_to(kv_pos, (b, s))
    return (
        _filled(q_pos, rows, 0), _filled(kv_pos, devices, -1),
        _filled(where.q_segment, rows, 0), _filled(where.kv_segment, devices, 0),
    )


def _filled(a: Any, devices: int, value: int) -> Any:
    """`a` with `value` behind its tokens, up to a multiple of the devices."""
    if a is None or a.shape[1] % devices == 0:
        return a
    widths = [(0, -a.shape[1] % devices if n == 1 else 0) for n in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value)
