"""Decoding: one or a few queries against a long cache, as a kernel.

Such a step is bound by the bytes of the cache, which are read once, in the order in
which they lie: all heads of a token together. The queries of all heads form one tile;
its logits against the keys of all key heads are one matrix product, in which a query
keeps the columns of its own key head. The products that are thrown away cost less than
rearranging the cache would. Tiles beyond a row's length are neither fetched nor
computed. Keys and values may be int8, or int4 in pairs, with a scale a token and head.
That is the form for TPU; on GPU a program reads the rows of one key head, and many
share one sequence (`triton.py`).

Sources: Dao et al., 2023, flash-decoding (split over keys); Kwon et al., 2023,
arXiv:2309.06180 (pages); the packing of grouped heads in Ainslie et al., 2023,
arXiv:2305.13245.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Refused, candidates
from pallas_kernels.arrays import FLOAT, INT, check_arrays, check_pairs
from pallas_kernels.decode.plain import Keys, Rows, Static, plain
from pallas_kernels.logits import LogitSpec, Where
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.refusals import DTYPES, WIDEST, check_device, check_elementwise
from pallas_kernels.tile import TileSpec, base_and_factor, lse_of, unit_of

F32 = jnp.float32


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec = LogitSpec(None),
    where: Where = Where(),
    *,
    lengths: jax.Array | None = None,
    bias: jax.Array | None = None,
    sink: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    bits: int = 16,
    table: jax.Array | None = None,
    statistics: bool = False,
    split_lse: bool = False,
    tile: int | None = None,
    splits: int | None = None,
    variant: tuple[str, ...] = (),
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Few queries, many keys -> o [B,T,H,V] in q's dtype and lse [B,H,T] float32.

    q [B,T,H,D]; k [B,S,K,D] and v [B,S,K,V], or, with `table` [B,n] int32, pages
    [P,page,K,.] of which row b has table[b] (-1: none). lengths [B] or [B,K]: how many
    slots are filled. spec, where: see `pallas_kernels.logits`; here kv_pos may be None
    (slots count from 0) where q_pos [B,T] is not (None: the last of S), nothing is
    shifted, and what `where` has of keys lies beside slots. bias [B,S,K]: added to
    every logit of a slot. sink [H]: a logit without value. bits: 8 for int8 k and v, 4
    for int8 [.., width/2] that holds two numbers a byte (low half: the first half of
    the width), with k_scale and v_scale [B,S,K] float32. statistics: also returns the
    sum over a key head's queries of each slot's weight, [B,S,K] float32.
    split_lse: m and l [B,H,T] instead of lse = m + log l, as in `pallas_kernels.flash`.
    Arrays beside slots are [P,page,K] with a table. Slots without a token may hold
    anything; steps of a TPU that have such slots take longer. tile: slots a step.
    backend: "tpu" or "triton"; with that, splits: how many programs share the slots of
    a row, and variant: names of candidates (`pallas_kernels/candidates.py`).
    interpret: run on a CPU, slowly.

    Raises Refused for what the kernel does not do.
    """
    b, t, h, d = q.shape
    page, heads = k.shape[1], k.shape[2]
    q_pos, q_segment, head = where.q_pos, where.q_segment, where.head
    _check(q, k, v, bits, spec, where)
    check_pairs(segment=(q_segment, where.kv_segment))
    _check_arrays(
        q, k, v, table, q_pos=(q_pos, INT, "B T"), q_segment=(q_segment, INT, "B|1 T"),
        head=(head, INT, "H"), lengths=(lengths, INT, "B", "B K|1"),
        sink=(sink, FLOAT, "H"), kv_pos=(where.kv_pos, INT, "B|1 S", "B|1 S K|1"),
        kv_segment=(where.kv_segment, INT, "B|1 S"), bias=(bias, FLOAT, "B|1 S K|1"),
        k_scale=(k_scale, FLOAT, "B S K"), v_scale=(v_scale, FLOAT, "B S K"))
    check_device(backend, (q, k, v), interpret)
    slots = page if table is None else table.shape[1] * page

    def count(n, first):
        return jnp.broadcast_to(first + jnp.arange(n, dtype=jnp.int32), (b, n))

    q_pos = count(t, slots - t) if q_pos is None else q_pos
    head = jnp.arange(h, dtype=jnp.int32) if head is None else head
    each = functools.partial(_each, k, backend == "tpu")
    beside = Keys(each(where.kv_pos), each(where.kv_segment),
                  each(bias), each(k_scale), each(v_scale))

    def per_row(a):
        return jnp.broadcast_to(a, (b, t, h)).reshape(b, t * h)  # [B,R]

    rows = Rows(
        per_row(head), per_row(q_pos[..., None]),
        per_row((jnp.ones_like(q_pos) if q_segment is None else q_segment)[..., None]),
        per_row(jnp.zeros(h, F32) if sink is None else sink.astype(F32)),
    )
    scale = d**-0.5 if spec.scale is None else spec.scale
    unit = unit_of(scale, spec.softcap, spec.score, bias)
    if lengths is None:
        lengths = jnp.asarray(np.full((b, 1), slots, np.int32))  # [B,1]
    lengths = lengths[:, None] if lengths.ndim == 1 else lengths  # [B,K|1]
    form = TileSpec(spec.mask, scale, spec.softcap, spec.score, unit=unit)
    static = Static(form, h, heads, t, slots, page, 1, bits, sink is not None, 0,
                    interpret, backend,
                    variant=candidates.checked(backend, "decode", variant))
    static = _kernels(static).sized(static, table is not None, tile, splits, q, k, v)
    o, m, l = _decode(static, lengths.astype(jnp.int32), table, rows, beside, q, k, v)
    m = jax.lax.stop_gradient(m)
    own = m * (1 / unit)
    found = (o, own, l) if split_lse else (o, lse_of(own, l))
    if not statistics:
        return found
    sums = _statistics(static, lengths, table, rows, beside, q, k, m, l)
    return *found, sums


def _each(k, every: bool, a):
    """What lies beside the slots of k, with an axis of heads: 1, or `every` head."""
    if a is None:
        return None
    a = a[..., None] if a.ndim == 2 else a
    return jnp.broadcast_to(a, k.shape[:3] if every else (*k.shape[:2], a.shape[2]))


def _check(q, k, v, bits, spec, where) -> None:
    """Raises Refused for what no kernel does."""
    if where.shift:
        raise Refused(f"shift={where.shift}: expected 0, or positions")
    if q.dtype not in DTYPES:
        raise Refused(f"q is {q.dtype}: bfloat16, float16 or float32")
    if bits not in (4, 8, 16):
        raise ValueError(f"bits={bits}: expected 4, 8 or 16 (not quantised)")
    for name, a in (("k", k), ("v", v)):
        if a.dtype != (jnp.int8 if bits < 16 else q.dtype):
            raise Refused(f"{name} is {a.dtype} at bits={bits}, q is {q.dtype}")
        if a.shape[3] > WIDEST:
            raise Refused(f"{name} is {a.shape[3]} wide: at most {WIDEST}")
    for name, f in (("mask", spec.mask), ("score", spec.score)):
        check_elementwise(name, f)


def _check_arrays(q, k, v, table, **given) -> None:
    """Raises ValueError for arrays of other shapes than their letters say."""
    (b, t, h, _), (rows, slots, heads) = q.shape, k.shape[:3]
    sizes = {"B": b, "T": t, "H": h, "K": heads, "S": slots}
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k {k.shape} and v {v.shape} differ in B, S or K")
    if table is None and rows != b:
        raise ValueError(f"q has batch {b} and k has batch {rows}: expected the same")
    if h % heads:
        raise ValueError(
            f"H={h} query heads: expected a multiple of K={heads} key heads")
    if table is not None:
        # what lies beside slots lies in pages
        sizes |= {"P": rows, "page": slots}
        given = {
            name: (a, kind, *(f.replace("B|1 S", "P S").replace("B S", "P S")
                              for f in forms))
            for name, (a, kind, *forms) in given.items()
        }
    check_arrays(sizes, table=(table, INT, "B n"), **given)


def _kernels(static: Static) -> Any:
    """The module with `sized`, `attend` and `weights` of the call's backend."""
    return importlib.import_module(f"pallas_kernels.decode.{static.backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _decode(static: Static, lengths, table, rows, beside, q, k, v):
    return _kernels(static).attend(static, lengths, table, rows, beside, q, k, v)


@in_32_bits
def _ahead(static: Static, *args):
    return _decode(static, *args), args


@in_32_bits
def _back(static: Static, args, cotangents):
    lengths, table, rows, beside, q, k, v = args
    floats = {n: a for n, a in (("bias", beside.bias), ("k_scale", beside.k_scale),
                                ("v_scale", beside.v_scale)) if a is not None}
    # integers have no gradient
    if static.bits == 16:
        floats |= {"k": k, "v": v}

    def f(q, sink, floats):
        own = dict(floats)
        ks, vs = own.pop("k", k), own.pop("v", v)
        return plain(static, lengths, table, rows._replace(sink=sink),
                     beside._replace(**own), q, ks, vs)

    dq, dsink, found = jax.vjp(f, q, rows.sink, floats)[1](cotangents)
    dbeside = Keys(None, None, found.get("bias"), found.get("k_scale"),
                   found.get("v_scale"))
    return (None, None, Rows(None, None, None, dsink), dbeside, dq, found.get("k"),
            found.get("v"))


_decode.defvjp(_ahead, _back)


def _statistics(static: Static, lengths, table, rows, beside, q, k, m, l):
    """Sums of weights [B,S,K] by a second pass over the keys; m, l [B,H,T], m in the
    unit of logits."""
    base, factor = (a.transpose(0, 2, 1).reshape(a.shape[0], -1)
                    for a in base_and_factor(m, l, static.form.unit))
    rows, beside, q, k, base, factor = jax.tree.map(
        jax.lax.stop_gradient, (rows, beside, q, k, base, factor))
    return _kernels(static).weights(
        static, lengths.astype(jnp.int32), table, rows, beside, q, k, base, factor)
