"""Exact softmax attention by tiles, in memory linear in T: the XLA form.

The queries and keys are cut into tiles and the pairs of tiles that the mask leaves are
visited one after the other. While key tiles pass by, a row keeps its running maximum m,
the sum l of its exponentials and the weighted sum a of values:

    m' = max(m, max_j s_j);  l = exp(m - m') l + sum_j exp(s_j - m')
    a  = exp(m - m') a + sum_j exp(s_j - m') v_j;   o = a / l, lse = m + log l at last

The backward pass makes each tile again from q, k and lse:

    p = exp(s - lse);  ds = p (do.v - delta),  delta = sum(do * o) - d(lse)

Source: Dao et al., 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from attn.exact.chunked_vjp import Plan, Side, part, tiled
from attn.masks import Full, Mask
from pallas_kernels.schedule import SKIP, Tiling, block_mask, traced_block_mask
from pallas_kernels.tile import NEVER, LogitSpec


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = Full(),
    head: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    kv_pos: jax.Array | None = None,
    q_run: jax.Array | None = None,
    kv_run: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score: Callable | None = None,
    bias: jax.Array | None = None,
    sink: jax.Array | None = None,
    keep: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    batch: jax.Array | None = None,
    shift: int = 0,
    given: jax.Array | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Exact attention in memory linear in T: o [B,T,H,V] and lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]. A logit is scale * q.k (scale: D^-0.5), then
    softcap * tanh(s / softcap), plus `score(h, i, j)` (a function of positions, as
    `ALiBi`), plus `bias` [B|1,H|1,T|1,S|1]; then the mask. `sink` [H]: a logit without
    value that takes part in every row's sum. A row that sees nothing gives o = 0 and
    lse = -inf (with a sink: o = 0, lse = sink).

    Positions count from 0, aligned at the last token when T != S, unless q_pos [B,T]
    and kv_pos [B,S] or [B,S,K|1] are given (-1: an empty slot). q_run, kv_run: see
    `attn.segments`. head [H]: the global head numbers, for masks that read them.
    dropout: the share of weights set to 0, if `key` is given; the choice is a hash of
    (key, batch row, head, query index, key index), so no tile or pass can disagree on
    it. keep [B,H,T,S] bool gives the choice instead. shift: how many tokens further on
    the queries stand, where positions count. given [B,H,T]: the lse that these queries
    have with all of their keys, if k and v are a part of those, for the part's
    gradients: nothing is computed, o is 0, and lse's cotangent is to hold what all
    parts share, d(lse) - sum(d(o) o) of the whole. Source: see the module.
    """
    b, t, h, d = q.shape
    s, heads = k.shape[1], k.shape[2]
    bq, bk = tile or tile_for(t, s)
    tp, sp = -(-t // bq) * bq, -(-s // bk) * bk
    counted = q_pos is None and kv_pos is None
    offset = s - t + shift if counted else None
    if not counted and (q_pos is None or kv_pos is None):
        raise ValueError("q_pos and kv_pos go together: expected both or neither")
    scale = d**-0.5 if scale is None else scale
    tiling = Tiling(t, s, bq, bk, offset)
    table = block_mask(mask, tiling)
    plan = Plan(
        LogitSpec(None if mask == Full() else mask, scale, softcap, score, dropout),
        tiling,
        tuple((int(i), int(j)) for i, j in np.argwhere(table != SKIP)),
    )
    if kv_pos is not None and kv_pos.ndim == 2:
        kv_pos = kv_pos[..., None]
    if counted and (tp, sp) != (t, s) and q_run is None:
        # the tail of the last tile is nobody's key
        kv_run = jnp.ones((1, s), jnp.int32)
        q_run = jnp.ones((1, t), jnp.int32)
    head = jnp.arange(h, dtype=jnp.int32) if head is None else head
    random = dropout > 0 and key is not None
    if random and batch is None:
        batch = jnp.arange(b, dtype=jnp.int32)
    side = Side(
        q_pos=_pad(q_pos, 1, tp), kv_pos=_pad(kv_pos, 1, sp, -1),
        q_run=_pad(q_run, 1, tp), kv_run=_pad(kv_run, 1, sp),
        head=head.reshape(heads, h // heads),
        keep=_pad(_pad(_grouped(keep, heads), 3, tp), 4, sp),
        seed=_seed(key) if random else None,
        batch=batch if random else None,
    )
    if len(plan.pairs) > 1 and not (counted and q_run is None):
        at = np.asarray(plan.pairs, np.int32).T
        seen = traced_block_mask(
            plan.form.mask, tiling, table, q_pos, kv_pos, q_run, kv_run)
        side = side._replace(busy=(seen[:, at[0], at[1]] != SKIP).any(0))
    grouped = q.reshape(b, t, heads, h // heads, d).transpose(0, 2, 3, 1, 4)
    grouped = _pad(grouped, 3, tp)
    keys, vals = (_pad(a.transpose(0, 2, 1, 3), 2, sp) for a in (k, v))
    bias = _grouped(bias, heads)
    if bias is not None:
        bias = bias if bias.shape[3] == 1 else _pad(bias, 3, tp)
        bias = bias if bias.shape[4] == 1 else _pad(bias, 4, sp)
    if sink is not None:
        sink = sink.astype(jnp.float32).reshape(heads, h // heads)
    arrays = grouped, keys, vals, bias, sink
    if given is None:
        o, lse = tiled(plan, side, *arrays)
    else:
        lse = given.reshape(b, heads, h // heads, t)
        o, lse = part(plan, side, *arrays, _pad(lse, 3, tp, NEVER))
    o = o.transpose(0, 3, 1, 2, 4).reshape(b, tp, h, -1)[:, :t]
    return o.astype(v.dtype), lse.reshape(b, h, tp)[:, :, :t]


def _seed(key: Any) -> jax.Array:
    return jax.random.key_data(key).astype(jnp.uint32)[-2:]


def tile_for(t: int, s: int) -> tuple[int, int]:
    """Tile (queries, keys) of the XLA path: its logits fit in a core's cache."""
    return min(t, 256), min(s, 512)


def _pad(a, axis: int, size: int, value=0):
    """`a` filled up with `value` to `size` along `axis`; None stays None."""
    if a is None or a.shape[axis] == size:
        return a
    widths = [(0, size - a.shape[axis] if n == axis else 0) for n in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value)


def _grouped(a, heads: int):
    """[B|1,H|1,T,S] -> [B|1,K|1,G|1,T,S]."""
    if a is None:
        return None
    b, h, t, s = a.shape
    return a.reshape(b, 1, 1, t, s) if h == 1 else a.reshape(b, heads, -1, t, s)
