"""Distributed attention: a grid of devices, queries by rows, keys by columns.

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
from attn.exact.dense import allowed, logits, values
from attn.exact.online import EMPTY, Partial, merge, normalized, output
from attn.masks import Full, Mask
from attn.parallel.sharding import (
    Axis, devices_of, gather, mesh_of, names_of, spec, spread_heads
)


def partial(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask = Full(),
    *,
    q_pos: jax.Array | None = None,
    kv_pos: jax.Array | None = None,
    scale: float | None = None,
) -> Partial:
    """The triple of these keys in its plain form, whose logits are [B,H,T,S].

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]. q_pos [B|1,T], kv_pos [B|1,S]: positions, by
    default aligned at the last token; -1 is a key that is not there.
    """
    check(q, k, v)
    q_pos, kv_pos = _counted(q, k, q_pos, kv_pos)
    seen = allowed(mask, q_pos, kv_pos, head=jnp.arange(q.shape[2], dtype=jnp.int32))
    s = jnp.where(seen, logits(q, k, scale), EMPTY)
    m = jax.lax.stop_gradient(s.max(-1))  # o does not depend on it
    p = jnp.where(seen, jnp.exp(s - m[..., None]), 0)
    return Partial(m, p.sum(-1), values(p, v.astype(jnp.float32)))


def distributed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask = Full(),
    *,
    rows: Axis = (),
    columns: Axis = (),
    q_pos: jax.Array | None = None,
    kv_pos: jax.Array | None = None,
    q_run: jax.Array | None = None,
    kv_run: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Exact attention over a grid of mesh axes: o [B,T,H,V], T split over `rows`.

    q [B,T,H,D] is split over `rows`, k [B,S,K,D] and v [B,S,K,V] over (rows, columns)
    and gathered along `rows`; heads lie on the axis `model` and cost nothing. Either of
    the two may be (): rows alone is an all-gather of keys, columns alone what decoding
    over a sharded cache needs, one maximum and one sum of B H T (V+1) numbers.

    Positions and runs as in `attn.exact.chunked.attend`, in the global view. T and S
    need not be multiples of the devices: keys that are filled in have no place. On r x
    c devices a column's keys are every c-th of r c pieces of the sequence, so that
    columns share a causal mask's work; rows do not, nor do columns alone. In low
    precision o of a part is rounded before it is merged.
    """
    check(q, k, v)
    names = names_of(rows) + names_of(columns)
    if len(set(names)) < len(names):
        raise ValueError(
            f"rows={rows!r}, columns={columns!r}: expected different mesh axes"
        )
    mesh_of(names)
    t, h = q.shape[1:3]
    q_pos, kv_pos = _counted(q, k, q_pos, kv_pos)
    if q_run is None and kv_run is not None or q_run is not None and kv_run is None:
        raise ValueError("q_run and kv_run go together: expected both or neither")
    q, q_pos, q_run = (_filled(a, devices_of(rows), 0) for a in (q, q_pos, q_run))
    k, v, kv_run = (_filled(a, devices_of(names), 0) for a in (k, v, kv_run))
    kv_pos = _filled(kv_pos, devices_of(names), -1)
    k, v = (spread_heads(a, h, names) for a in (k, v))

    grid = devices_of(rows) > 1, devices_of(columns) > 1

    def local(q, k, v, head, q_pos, kv_pos, q_run, kv_run):
        k, v, kv_pos, kv_run = (
            gather(a, rows if grid[0] else None) for a in (k, v, kv_pos, kv_run)
        )
        part = normalized(*attend(
            q, k, v, mask=mask, head=head, q_pos=q_pos, kv_pos=kv_pos, q_run=q_run,
            kv_run=kv_run, scale=scale, implementation=implementation,
        ))
        return output(merge(part, columns) if grid[1] else part).astype(v.dtype)

    at = {"T": rows, "S": names}
    place = lambda word: spec(word, at["S" if "S" in word else "T"])
    words = "BTHD BSKD BSKV H BT BS BT BS".split()
    f = jax.shard_map(
        local, in_specs=tuple(map(place, words)), out_specs=place("BTHV"),
        check_vma=False,
    )
    heads = jnp.arange(h, dtype=jnp.int32)
    return f(q, k, v, heads, q_pos, kv_pos, q_run, kv_run)[:, :t]


def traffic(t: int, s: int, rows: int, columns: int, *, batch: int = 1, heads: int = 1,
            kv_heads: int | None = None, width: int = 64, itemsize: int = 4) -> dict:
    """Bytes of a device in `distributed`. gathered: k, v and positions that it receives
    along rows. reduced: m, l and a of its queries, which one maximum and one sum reduce
    along columns (a ring of n devices sends 2 (n-1)/n of that)."""
    keys = batch * math.ceil(s / (rows * columns))
    each = 2 * (kv_heads or heads) * width * itemsize + 4
    mine = batch * math.ceil(t / rows) * heads if columns > 1 else 0
    return {"gathered": (rows - 1) * keys * each, "reduced": mine * (width + 2) * 4}


def _counted(q, k, q_pos: Any, kv_pos: Any) -> tuple[jax.Array, jax.Array]:
    """Positions [B,T] and [B,S]: those that were given, or counted."""
    if (q_pos is None) != (kv_pos is None):
        raise ValueError("q_pos and kv_pos go together: expected both or neither")
    b, t, s = q.shape[0], q.shape[1], k.shape[1]
    if q_pos is None:
        q_pos = jnp.arange(s - t, s, dtype=jnp.int32)[None]
        kv_pos = jnp.arange(s, dtype=jnp.int32)[None]
    return jnp.broadcast_to(q_pos, (b, t)), jnp.broadcast_to(kv_pos, (b, s))


def _filled(a: Any, devices: int, value: int) -> Any:
    """`a` with `value` behind its tokens, up to a multiple of the devices."""
    if a is None or a.shape[1] % devices == 0:
        return a
    widths = [(0, -a.shape[1] % devices if n == 1 else 0) for n in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value)
