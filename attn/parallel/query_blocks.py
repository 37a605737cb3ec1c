"""Query blocks over the mesh: methods that choose blocks split those of queries.

Every device answers its own query blocks, from keys that are whole on each of them.
Where a block stands in its sequence is known in the global view and handed in, so that
blocks are the same however many devices there are.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from attn.parallel.sharding import (
    Axis, devices_of, mesh_of, over_mesh, spread_heads
)


def over_rows(
    f: Callable, axis: Axis | None, q: jax.Array, rows: Any, heads: Any, k: jax.Array,
    v: jax.Array, columns: Any,
) -> jax.Array:
    """f(q, rows, heads, k, v, columns, head) of query blocks, which the mesh splits
    over `axis`; keys are whole on every device -> [B,N I,H,V].

    q [B,N I,H,D]; rows: arrays [B|1,N,...], heads: arrays [B|1,N,H,...] of them; k, v
    [B,S,K,.]; columns: arrays [B|1,...] of keys. f is given q [B,N',I,H,D] and the
    global numbers of its heads, and gives [B,N',I,H,V].
    """
    b, _, h, d = q.shape
    n = jax.tree.leaves(rows)[0].shape[1]
    size = q.shape[1] // n
    q = q.reshape(b, n, size, h, d)
    more = -n % devices_of(axis)  # blocks of nothing, so that devices have as many

    def whole(a):
        a = jnp.broadcast_to(a, (b, *a.shape[1:])) if axis is not None else a
        return jnp.pad(a, [(0, 0), (0, more)] + [(0, 0)] * (a.ndim - 2))

    q, rows, heads = jax.tree.map(whole, (q, rows, heads))
    k, v = (spread_heads(a, h, axis) for a in (k, v))
    if axis is not None:
        columns = jax.tree.map(
            lambda a: jnp.broadcast_to(a, (b, *a.shape[1:])), columns)
    letters = "BT.H. BT BTH B.K. B.K. B H -> BT.H."
    o = over_mesh(f, letters, axis)(
        q, rows, heads, k, v, columns, jnp.arange(h, dtype=jnp.int32))
    if axis is not None and AxisType.Explicit in mesh_of(axis).axis_types:
        # arrays that came whole go whole: what is laid out comes in automatic axes
        o = jax.sharding.reshard(o, PartitionSpec())
    return o.reshape(b, (n + more) * size, h, o.shape[-1])[:, :n * size]
