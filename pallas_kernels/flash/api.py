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
from typing import Any, Callable

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, candidates, tables
from pallas_kernels.arrays import check_logits, check_pairs
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.padding import blank
from pallas_kernels.refusals import (
    CARDS, DTYPES, WIDEST, check_device, check_elementwise, check_mosaic
)
from pallas_kernels.schedule import Side, Static, Tiling
from pallas_kernels.tile import (
    LOG2E, LogitSpec, base_and_factor, lse_of, sink_logit, unit_of
)
from pallas_kernels.tile_patterns import shrink_to_fit

F32 = jnp.float32


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Any = None,
    head: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    kv_pos: jax.Array | None = None,
    q_segment: jax.Array | None = None,
    kv_segment: jax.Array | None = None,
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
    split_lse: bool = False,
    tile: tuple[int, ...] | None = None,
    variant: tuple[str, ...] = (),
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Exact attention -> o [B,T,H,V] in v's dtype and lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; query head h reads key head h // (H/K).
    mask: a predicate on (head, query position, key position) with `bounds`; positions
    count from 0, aligned at the last token when T != S, unless q_pos [B,T] and kv_pos
    [B,S] or [B,S,K] are given (-1: an empty slot). q_segment [B|1,T], kv_segment
    [B|1,S]: a token sees its own segment, and segment 0 is padding. A logit is scale *
    q.k, capped, plus score(h, i, j), plus bias [B|1,H|1,T|1,S|1]; sink [H] is a logit
    without value. dropout acts when there is a `key`, or by `keep` [B,H,T,S] bool.
    shift: how many tokens further on the queries stand, where positions count. given
    [B,H,T]: the lse that the queries have with all of their keys, if k and v are a part
    of those, for the part's gradients: nothing is computed, o is 0, and lse's cotangent
    is to hold what all parts share, d(lse) - sum(d(o) o) of the whole; a number near
    the lse will do, if both cotangents are multiplied by exp(given - lse). split_lse: m
    and l [B,H,T] instead of lse = m + log l, which a large m leaves nothing of l; no
    gradient flows through m, on which nothing depends. tile: queries and keys of a
    tile. Rows that see nothing give o = 0, lse = -inf and no gradient. backend: "tpu",
    "triton", "mosaic" (Hopper), or "blackwell" (there `tile` is of the forward pass):
    only compiled and interpreted, never run, so nobody gets it unasked. variant: names
    of candidates that no device has judged (`pallas_kernels/candidates.py`). interpret:
    run on a CPU, slowly.

    Raises Refused for what the kernel does not do. Sources: see the module.
    """
    b, t, h, d = q.shape
    s, width = k.shape[1], v.shape[3]
    _check(q, k, v)
    check_pairs(pos=(q_pos, kv_pos), segment=(q_segment, kv_segment))
    check_logits(q, k, bias=bias, sink=sink, head=head, q_pos=q_pos, kv_pos=kv_pos,
                 keep=keep, batch=batch, given=given, q_segment=q_segment,
                 kv_segment=kv_segment)
    if b > 1 and q_pos is not None and kv_pos is not None:
        # one row of positions for the whole batch
        q_pos = jnp.broadcast_to(q_pos, (b, t))
        kv_pos = jnp.broadcast_to(kv_pos, (b, *kv_pos.shape[1:]))
    random = dropout > 0 and key is not None
    check_device(backend, (q, k, v), interpret)
    q, (k, v) = *blank(q_segment, q), blank(kv_segment, k, v)
    if backend in CARDS:
        check_mosaic(backend, q, v, interpret)
        extra = {"bias": bias, "keep": keep, "key": key if random else None}
        for name, a in extra.items():
            if a is not None:
                raise Refused(f"{name}: not on {CARDS[backend][0]}, expected None")
    for name, f in (("mask", mask), ("score", score)):
        check_elementwise(name, f, backend)
    device = tables.device_kind()
    offset = s - t + shift if q_pos is None else None  # aligned at the last token
    shape = tables.Shape(t, s, d, width, q.dtype.itemsize,
                         bias is not None or keep is not None)

    def pick(which):
        return tables.tile(device, which, shape, tile, backend)

    ahead, back = pick("flash_forward"), pick("flash_backward")
    scale = d**-0.5 if scale is None else scale
    unit = LOG2E if backend in CARDS else unit_of(scale, softcap, score, bias)
    form = LogitSpec(mask, scale, softcap, score,
                     dropout if random or keep is not None else 0.0, unit)
    tilings = [Tiling(t, s, a.block_q, a.block_kv, offset) for a in (ahead, back)]
    if backend == "tpu" and tile is None:
        traced = q_pos is not None or q_segment is not None
        tilings = [
            shrink_to_fit(
                mask, tiling, a.block_kv_compute, max(d, width), traced, n == 1)
            for n, (tiling, a) in enumerate(zip(tilings, (ahead, back)))
        ]
    static = Static(
        form, tilings[0], tilings[1], (ahead, back),
        tables.vmem(device, backend), backend, interpret,
        candidates.checked(backend, "flash", variant),
    )
    if max(*static.tiling.grid, *static.backward.grid) > 2**15:
        raise Refused(f"T={t}, S={s}: the list of tiles is too long")
    if random and batch is None:
        batch = jnp.arange(b, dtype=jnp.int32)
    side = Side(
        jnp.arange(h, dtype=jnp.int32) if head is None else head, q_pos,
        kv_pos[..., None] if kv_pos is not None and kv_pos.ndim == 2 else kv_pos,
        q_segment, kv_segment, keep, _seed(key) if random else None,
        batch if random else None,
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


def _seed(key: Any) -> jax.Array:
    """Two words of a PRNG key."""
    return jax.random.key_data(key).astype(jnp.uint32)[-2:]


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
