"""Decoding on TPU (Mosaic): see `pallas_kernels/decode/api.py` for the idea.

The rows of a tile are the queries of all heads, its columns the slots of all key heads
in the order of memory, column = slot * K + key head. Pages are blocks that the pipeline
fetches by the page table, several a step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import Refused, tables
from pallas_kernels.machine.product import F32, NN, NT, dot
from pallas_kernels.tile import LOW, NEVER, sink_logit

MOST_ROWS = 512


def sized(static, paged: bool, tile: int | None, splits, q, k, v):
    """`static` with the slots of a step. Raises Refused for what is not for TPU."""
    if static.queries * static.heads > MOST_ROWS:
        raise Refused(f"T={static.queries}, H={static.heads}: at most {MOST_ROWS} "
                      "queries over all heads")
    if splits is not None:
        raise Refused(f"splits={splits}: on TPU a row's slots pass by in one program")
    static = static._replace(vmem=tables.vmem(tables.device_kind()))
    if not paged:
        size = tile or tables.slots(static.page, static.key_heads)
        return static._replace(page=size)
    size = tile or tables.slots(static.slots, static.key_heads)
    return static._replace(pages=max(size // static.page, 1))


def _columns(static, page):
    """Slot and key head [1,columns] of the columns of a step's page."""
    n = static.page * static.key_heads
    at = jax.lax.broadcasted_iota(jnp.int32, (1, n), 1)
    heads = static.key_heads
    return page * static.page + at // heads, at % heads


def _limit(static, lengths, b, kv):
    """How many slots hold a token of a column's own key head, [1,columns]."""
    limit = jnp.zeros_like(kv)
    for n in range(static.key_heads):
        limit = jnp.where(kv == n, lengths[b * static.key_heads + n], limit)
    return jnp.minimum(limit, static.slots)


def _tokens(static, lengths, b, page, real, beside):
    """Which columns hold a token, [1,columns]."""
    slot, kv = _columns(static, page)
    there = (slot < _limit(static, lengths, b, kv)) & real
    if beside.pos is not None:
        there = there & (beside.pos[0] >= 0)
    return there if beside.segment is None else there & (beside.segment[0] > 0)


def _halves(a, bits: int, dtype):
    """A tile of k or v as one matrix, or two that hold the halves of its width."""
    if bits == 16:
        return [a]
    if bits == 8:
        return [a.astype(F32).astype(dtype)]
    wide = a.astype(jnp.int32)
    parts = (wide << 28) >> 28, wide >> 4  # low and high, with signs
    return [part.astype(F32).astype(dtype) for part in parts]


def _scores(static, lengths, b, page, real, q, k, rows, beside):
    """Logits times their unit [R,columns] of one page, and which are seen."""
    form = static.form
    slot, kv = _columns(static, page)
    groups = static.heads // static.key_heads
    parts = _halves(k[0], static.bits, q.dtype)
    widths = jnp.split(q, len(parts), 1)  # of q [R,D]
    # q k^T: [rows,D] by [columns,D] is [rows,columns], part by part
    raw = sum(dot(a, part, NT) for a, part in zip(widths, parts))
    if static.bits < 16:
        raw = raw * beside.k_scale[0]  # one factor a slot and head
    # row = query * H + head: which key head a row reads
    row = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0)
    local = jnp.where(row < static.queries * static.heads,
                      row % static.heads // groups, -1)
    j = slot if beside.pos is None else beside.pos[0]
    h, i = rows.head[0], rows.pos[0]
    bias = None if beside.bias is None else beside.bias[0]
    s, _ = form.logits(raw, h, i, j, bias)
    # a row keeps the columns of its own key head
    seen = local == kv
    if static.bits == 16:
        seen = seen & _tokens(static, lengths, b, page, real, beside)
    else:  # the same, but in one mask first it takes 7% more bundles of a v6e here
        seen = seen & (slot < _limit(static, lengths, b, kv)) & (j >= 0) & real
        if beside.segment is not None:
            seen = seen & (beside.segment[0] > 0)
    if form.mask is not None:
        seen = seen & form.mask(h, i, j)
    if beside.segment is not None:
        seen = seen & (rows.segment[0] == beside.segment[0])
    return jnp.where(seen, s, NEVER), seen


def _step(static, most, table):
    """(row of the batch, first page of the step, whether it holds a slot)."""
    b, n = pl.program_id(0), pl.program_id(1)
    first = n * static.pages
    return b, first, first * static.page < most[b]


def _real(static, table, b, page):
    """Whether the page is there: inside the table, and not -1."""
    if table is None:
        return True
    pages = static.slots // static.page
    return (page < pages) & (table[b * pages + jnp.minimum(page, pages - 1)] >= 0)


def _full(static, lengths, table, b, first, pages):
    """Whether each slot of a step's pages holds a token of every key head."""
    end = (first + len(pages)) * static.page
    full = end <= static.slots
    for n in range(static.key_heads):
        full = full & (end <= lengths[b * static.key_heads + n])
    for n, (_, _, beside) in enumerate(pages):
        full = full & _real(static, table, b, first + n)
        for array, least in ((beside.pos, 0), (beside.segment, 1)):
            if array is not None:
                full = full & (array[0].min() >= least)
    return full


def _cleared(there, a):
    """A page of v [columns,V], 0 where there is no token, there [1,columns]."""
    there = jnp.broadcast_to(jnp.where(there, 1.0, 0.0), (8, there.shape[1]))
    return jnp.where(there.T[:, :1] > 0, a, 0)  # a whole tile turns


def _attend(static, has_table, most, lengths, table, q, rows, pages, o_ref, top_ref,
            sum_ref, m_ref, l_ref, acc_ref):
    table = table if has_table else None
    b, first, some = _step(static, most, table)

    @pl.when(pl.program_id(1) == 0)
    def _start():
        top: Any = LOW
        weight: Any = 0.0
        if static.sink:
            # a first logit without value; -inf is none
            sink = rows.sink[0]
            top, weight = jnp.maximum(sink, LOW), jnp.where(sink > NEVER, 1.0, 0.0)
        m_ref[...] = jnp.broadcast_to(top, m_ref.shape).astype(F32)  # [R,1]
        l_ref[...] = jnp.broadcast_to(weight, l_ref.shape).astype(F32)  # [R,1]
        acc_ref[...] = jnp.zeros(acc_ref.shape, F32)  # [R,V]

    def run(full: bool):
        top, total, acc = m_ref[...], l_ref[...], acc_ref[...]
        for n, (k, v, beside) in enumerate(pages):
            real = _real(static, table, b, first + n)
            s, seen = _scores(static, lengths, b, first + n, real, q[0], k, rows,
                              beside)
            new = jnp.maximum(top, s.max(1, keepdims=True))  # m' = max(m, rowmax S)
            exp2 = static.form.exp2
            p, rescale = exp2(s - new), exp2(top - new)  # P, 2^(m - m')
            total = total * rescale + p.sum(1, keepdims=True)
            values = _halves(v[0], static.bits, q.dtype)
            if static.bits < 16:
                # chosen, not multiplied by 0: a scale beyond the end may be nan
                p = jnp.where(seen, p * beside.v_scale[0], 0)
            if not full:
                # chosen here too: where there is no token lies anything
                there = _tokens(static, lengths, b, first + n, real, beside)
                values = [_cleared(there, a) for a in values]
            # p v: [rows,columns] by [columns,V] is [rows,V]
            out = [dot(p.astype(q.dtype), a, NN) for a in values]
            # of int4, both halves of V side by side
            acc = acc * rescale + (out[0] if len(out) == 1 else jnp.concatenate(out, 1))
            top = new
        m_ref[...], l_ref[...], acc_ref[...] = top, total, acc

    if static.bits < 16:  # integers are finite
        pl.when(some)(functools.partial(run, full=True))
    else:
        full = _full(static, lengths, table, b, first, pages)
        pl.when(some & full)(functools.partial(run, full=True))
        pl.when(some & jnp.logical_not(full))(functools.partial(run, full=False))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _finish():
        total = l_ref[...]
        safe = jnp.where(total > 0, total, 1)
        o_ref[0] = (acc_ref[...] / safe).astype(o_ref.dtype)  # O / l
        top_ref[0], sum_ref[0] = m_ref[...], total


def _weights(static, has_table, most, lengths, table, q, rows, pages, base, factor,
             w_ref):
    table = table if has_table else None
    b, first, some = _step(static, most, table)
    n = static.page * static.key_heads

    @pl.when(some)
    def _run():
        for m, (k, _, beside) in enumerate(pages):
            real = _real(static, table, b, first + m)
            s, _ = _scores(static, lengths, b, first + m, real, q[0], k, rows, beside)
            p = static.form.recompute(s, base[0]) * factor[0]  # P = exp(S - L)
            # rows of other key heads are hidden here, and so are 0
            w_ref[0, :, m * n:(m + 1) * n] = p.sum(0, keepdims=True)

    @pl.when(jnp.logical_not(some))
    def _none():
        w_ref[...] = jnp.zeros(w_ref.shape, F32)


def _tall(a, rows: int, value=0):
    """[B,R] -> [B,rows,1]."""
    a = jnp.pad(a, ((0, 0), (0, rows - a.shape[1])), constant_values=value)
    return a[..., None]


def _prepared(static, lengths, table, rows, beside, q, k, v):
    """Prefetched scalars, inputs and their blocks, and how many steps there are."""
    b = q.shape[0]
    count = -(-static.queries * static.heads // 16) * 16  # whole tiles of 16 bits
    q = q.reshape(b, -1, q.shape[3])  # [B,R,D]
    q = jnp.pad(q, ((0, 0), (0, count - q.shape[1]), (0, 0)))
    rows = type(rows)(*(_tall(a, count, -1 if n == 0 else 0)
                        for n, a in enumerate(rows)))
    lengths = jnp.broadcast_to(lengths, (q.shape[0], static.key_heads))
    most = jnp.minimum(lengths.max(1), static.slots)
    pages = -(-static.slots // static.page)
    has_table = table is not None
    # behind the padding: sinks in the unit of logits
    rows = rows._replace(sink=sink_logit(rows.sink, static.form.unit))
    scalars = most, lengths.reshape(-1), (
        table.reshape(-1).astype(jnp.int32) if has_table else jnp.zeros(1, jnp.int32))

    def whole(a):
        return pl.BlockSpec((1, *a.shape[1:]), lambda b, n, *s: (b, 0, 0))

    def at(m):
        """The block of the m-th page of a step: nothing new past the row's end."""
        def index(b, n, most, lengths, table):
            last = jnp.maximum((most[b] - 1) // static.page, 0)
            page = jnp.minimum(n * static.pages + m, last)
            if not has_table:
                return b, page
            return jnp.maximum(table[b * pages + page], 0), 0  # -1: fetched, never seen
        return index

    def cut(a, m):
        if a is None:
            return None
        where, tokens = at(m), static.page * static.key_heads
        if a.ndim == 4:
            return pl.BlockSpec((1, tokens, a.shape[3]), lambda *i: (*where(*i), 0))
        return pl.BlockSpec(
            (1, 1, tokens), lambda *i: (where(*i)[0], 0, where(*i)[1]))

    def flat(a):
        if a is None:
            return None
        joined = a.reshape(a.shape[0], -1, *a.shape[3:])
        return joined if a.ndim == 4 else joined[:, None]

    parts = (k, v, beside)

    def tree(f):
        return jax.tree.map(f, parts, is_leaf=lambda a: a is None)

    inputs = [tree(flat)] * static.pages
    specs = [tree(functools.partial(cut, m=m)) for m in range(static.pages)]
    steps = -(-pages // static.pages)
    return (scalars, (q, rows, inputs), (whole(q), jax.tree.map(whole, rows), specs),
            steps, count)


def _launch(static, body, scalars, args, specs, steps, out, out_specs, scratch, name):
    batch = args[0].shape[0]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(batch, steps), in_specs=specs,
            out_specs=out_specs, scratch_shapes=scratch),
        out_shape=out, interpret=static.interpret, name=name,
        compiler_params=pltpu.CompilerParams(
            # steps of a row in order: m, l and o wait in scratch
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem),
    )(*scalars, *args)


def attend(static, lengths, table, rows, beside, q, k, v) -> tuple[Any, Any]:
    """o [B,T,H,V], m and l [B,H,T], m in the unit of logits."""
    b, t, h, _ = q.shape
    width = v.shape[3] * (2 if static.bits == 4 else 1)
    scalars, args, specs, steps, count = _prepared(
        static, lengths, table, rows, beside, q, k, v)

    def own(n):
        return pl.BlockSpec((1, count, n), lambda b, n, *s: (b, 0, 0))

    o, *sums = _launch(
        static, functools.partial(_attend, static, table is not None), scalars, args,
        list(specs), steps,
        [jax.ShapeDtypeStruct((b, count, width), q.dtype),
         *[jax.ShapeDtypeStruct((b, count, 1), F32)] * 2],
        [own(width), own(1), own(1)],
        [pltpu.VMEM((count, 1), F32)] * 2 + [pltpu.VMEM((count, width), F32)],
        "decode",
    )
    o = o[:, :t * h].reshape(b, t, h, width)  # [B,T,H,V]
    return o, *(a[:, :t * h, 0].reshape(b, t, h).transpose(0, 2, 1) for a in sums)


def weights(static, lengths, table, rows, beside, q, k, base, factor) -> jax.Array:
    """The sum of each slot's weights over a key head's queries, [B,S,K]; base, factor
    [B,R]: what weights are made of, the base in the unit of logits."""
    b = q.shape[0]
    scalars, args, specs, steps, count = _prepared(
        static, lengths, table, rows, beside, q, k, None)
    base, factor = _tall(base, count), _tall(factor, count)
    n = static.pages * static.page * static.key_heads
    own = pl.BlockSpec((1, count, 1), lambda b, n, *s: (b, 0, 0))
    body = functools.partial(_weights, static, table is not None)
    w = _launch(
        static, body, scalars, (*args, base, factor), [*specs, own, own], steps,
        jax.ShapeDtypeStruct((b, 1, steps * n), F32),
        pl.BlockSpec((1, 1, n), lambda b, n, *s: (b, 0, n)), [], "decode_weights",
    )
    return w.reshape(b, -1, static.key_heads)[:, :static.slots]
