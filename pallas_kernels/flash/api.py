"""Flash attention: exact softmax attention by tiles, forward and backward, as a kernel.

The T x S matrix never reaches main memory: a query tile keeps a running maximum, sum
and weighted value while key tiles pass by, and the backward pass makes each tile again
from q, k and the log-sum-exp. Tiles that the mask hides are never visited, and those
that it leaves whole are computed without mask arithmetic. Everything is deterministic:
no sum depends on which program came first.

Sources: Dao et al., 2022, arXiv:2205.14135; Dao, 2023, arXiv:2307.08691; Shah et al.,
2024, arXiv:2407.08608.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, candidates, tables
from pallas_kernels.arrays import check_logits
from pallas_kernels.logits import Dropout, LogitSpec, Where
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.padding import blank
from pallas_kernels.refusals import (
    CARDS, DTYPES, WIDEST, check_device, check_elementwise, check_mosaic
)
from pallas_kernels.schedule import Side, Static, Tiling
from pallas_kernels.tile import (
    LOG2E, TileSpec, base_and_factor, lse_of, sink_logit, unit_of
)
from pallas_kernels.tile_patterns import shrink_to_fit

F32 = jnp.float32


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(None),
    where: Where = Where(),
    *,
    bias: jax.Array | None = None,
    sink: jax.Array | None = None,
    dropout: Dropout | None = None,
    given: jax.Array | None = None,
    split_lse: bool = False,
    tile: tuple[int, ...] | None = None,
    variant: tuple[str, ...] = (),
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Exact attention -> o [B,T,H,V] in v's dtype and lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; query head h reads key head h // (H/K).
    spec, where, dropout: see `pallas_kernels.logits`. bias [B|1,H|1,T|1,S|1] is added
    to a logit; sink [H] is a logit without value. dropout acts when it has a key, or
    by its `keep`. given [B,H,T]: the lse that the queries have with all of their keys,
    if k and v are a part of those, for the part's gradients: nothing is computed, o is
    0, and lse's cotangent is to hold what all parts share, d(lse) - sum(d(o) o) of the
    whole; a number near the lse will do, if both cotangents are multiplied by
    exp(given - lse). split_lse: m and l [B,H,T] instead of lse = m + log l, which a
    large m leaves nothing of l; no gradient flows through m, on which nothing depends.
    tile: queries and keys of a tile. Rows that see nothing give o = 0, lse = -inf and
    no gradient. backend: "tpu", "triton", "mosaic" (Hopper), or "blackwell" (there
    `tile` is of the forward pass): only compiled and interpreted, never run, so nobody
    gets it unasked. variant: names of candidates that no device has judged
    (`pallas_kernels/candidates.py`). interpret: run on a CPU, slowly.

    Raises Refused for what the kernel does not do. Sources: see the module.
    """
    b, t, h, d = q.shape
    s, width = k.shape[1], v.shape[3]
    _check(q, k, v)
    counted = where.counted
    check_logits(q, k, where, bias=bias, sink=sink, dropout=dropout, given=given)
    q_pos, kv_pos = where.q_pos, where.kv_pos
    if b > 1 and not counted:
        # one row of positions for the whole batch
        q_pos = jnp.broadcast_to(q_pos, (b, t))
        kv_pos = jnp.broadcast_to(kv_pos, (b, *kv_pos.shape[1:]))
    drop = Dropout(0.0) if dropout is None else dropout
    check_device(backend, (q, k, v), interpret)
    q, (k, v) = *blank(where.q_segment, q), blank(where.kv_segment, k, v)
    if backend in CARDS:
        check_mosaic(backend, q, v, interpret)
        extra = {"bias": bias, "keep": drop.keep,
                 "key": drop.key if drop.hashed else None}
        for name, a in extra.items():
            if a is not None:
                raise Refused(f"{name}: not on {CARDS[backend][0]}, expected None")
    for name, f in (("mask", spec.mask), ("score", spec.score)):
        check_elementwise(name, f, backend)
    device = tables.device_kind()
    offset = s - t + where.shift if counted else None  # aligned at the last token
    shape = tables.Shape(t, s, d, width, q.dtype.itemsize,
                         bias is not None or drop.keep is not None)

    def pick(which):
        return tables.tile(device, which, shape, tile, backend)

    ahead, back = pick("flash_forward"), pick("flash_backward")
    scale = d**-0.5 if spec.scale is None else spec.scale
    unit = (LOG2E if backend in CARDS
            else unit_of(scale, spec.softcap, spec.score, bias))
    acts = drop.hashed or drop.keep is not None
    form = TileSpec(spec.mask, scale, spec.softcap, spec.score,
                    drop.rate if acts else 0.0, unit)
    tilings = [Tiling(t, s, a.block_q, a.block_kv, offset) for a in (ahead, back)]
    if backend == "tpu" and tile is None:
        traced = not counted or where.q_segment is not None
        tilings = [
            shrink_to_fit(
                spec.mask, tiling, a.block_kv_compute, max(d, width), traced, n == 1)
            for n, (tiling, a) in enumerate(zip(tilings, (ahead, back)))
        ]
    static = Static(
        form, tilings[0], tilings[1], (ahead, back),
        tables.vmem(device, backend), backend, interpret,
        candidates.checked(backend, "flash", variant),
    )
    if max(*static.tiling.grid, *static.backward.grid) > 2**15:
        raise Refused(f"T={t}, S={s}: the list of tiles is too long")
    seed = batch = None
    if drop.hashed:
        seed, batch = drop.words, drop.batch
        batch = jnp.arange(b, dtype=jnp.int32) if batch is None else batch
    side = Side(
        jnp.arange(h, dtype=jnp.int32) if where.head is None else where.head, q_pos,
        kv_pos[..., None] if kv_pos is not None and kv_pos.ndim == 2 else kv_pos,
        where.q_segment, where.kv_segment, drop.keep, seed, batch,
    )
    if given is not None:
        return _part(static, side, q, k, v, bias, sink, given)
    o, m, l = _flash(static, side, q, k, v, bias, sink)
    m = jax.lax.stop_gradient(m) * (1 / form.unit)
    return (o, m, l) if split_lse else (o, lse_of(m, l))


def _check(q, k, v) -> None:
    """Raises Refused for widths and types that no kernel takes."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise Refused(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of "
                      "bfloat16, float16, float32 for all three")
    for name, n in (("D", q.shape[3]), ("V", v.shape[3])):
        if n > WIDEST:
            raise Refused(f"{name}={n}: at most {WIDEST}")
    if min(q.shape[1], k.shape[1]) < 1:
        raise Refused(f"T={q.shape[1]}, S={k.shape[1]}: at least 1")


def _kernels(static: Static) -> Any:
    """The module with `forward` and `backward` of the call's backend."""
    return importlib.import_module(f"pallas_kernels.flash.{static.backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _flash(static: Static, side: Side, q, k, v, bias, sink):
    return _ahead(static, side, q, k, v, bias, sink)[0]


@in_32_bits
def _ahead(static: Static, side: Side, q, k, v, bias, sink):
    # m in the unit of logits: exactly what the backward pass finds again
    o, m, l = _kernels(static).forward(static, side, q, k, v, bias, sink)
    return (o, m, l), (side, q, k, v, bias, sink, o, m, l)


@in_32_bits
def _back(static: Static, saved, cotangents):
    *arrays, o, m, l = saved
    do, _, dl = cotangents
    # D = rowsum(dO O) [B,H,T]; d(log l) = l d(l) enters exactly where it leaves
    delta = (do.astype(F32) * o.astype(F32)).sum(-1).transpose(0, 2, 1) - l * dl
    base, factor = base_and_factor(m, l, static.form.unit)
    do = do.astype(F32) * factor.transpose(0, 2, 1)[..., None]
    return _gradients(static, arrays, base, delta * factor, do)


def _gradients(static: Static, arrays, base, delta, do):
    """The gradients, with weights exp(s - base): base, delta [B,H,T], do [B,T,H,V]."""
    side, q, k, v, bias, sink = arrays
    form = static.form
    dq, dk, dv, dbias = _kernels(static).backward(
        static, side, q, k, v, bias, sink, base, delta, do.astype(v.dtype)
    )
    dsink = None
    if sink is not None:
        # the sink's weight exp(sink - L) [B,H,T]; it has no value, so dS = -weight D
        own = sink_logit(sink, form.unit)[None, :, None]
        dsink = -(form.exp2(own - base) * delta).sum((0, 2)).astype(sink.dtype)
    return None, dq, dk, dv, dbias, dsink


_flash.defvjp(_ahead, _back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _part(static: Static, side: Side, q, k, v, bias, sink, lse):
    """`_flash` of a part of the keys, with the lse of them all, which it gives back."""
    return jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype), lse


@in_32_bits
def _back_part(static: Static, saved, cotangents):
    *arrays, lse = saved
    do, dlse = cotangents
    base = jnp.where(jnp.isfinite(lse), lse * static.form.unit, 0)
    # without o, delta is what lse's cotangent brings
    return *_gradients(static, arrays, base, -dlse, do), None


_part.defvjp(
    lambda static, *arrays: (_part(static, *arrays), arrays), _back_part
)
