"""Chosen blocks on TPU (Mosaic): blocks are copied from main memory by number.

A grid step takes one query block. While it computes, the key blocks of the next one are
on their way, into the other half of a buffer; a block that was not chosen (-1) is
neither copied nor computed. Tiles lie as [keys, queries], as in `flash/tpu.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import tpu_layout
from pallas_kernels.machine.product import F32, NN, NT, TN, dot
from pallas_kernels.machine.tpu import column
from pallas_kernels.tile import LOW, NEVER

ANY = pl.BlockSpec(memory_space=pl.ANY)


def logits(static, k, q, rows, number, info):
    """Logits times their unit [block,R] of key block `number`; rows [3,R], info
    [2,block] or None."""
    # k q^T: [block,D] by [rows,D] is [block,rows]
    s, _ = static.form.logits(dot(k, q, NT), None, None, None)
    at = number * static.block
    key = at + jax.lax.broadcasted_iota(jnp.int32, (static.block, 1), 0)
    seen = key < static.s  # S may end inside a block
    i, segment, h = rows[:1], rows[1:2], rows[2:3]  # [1,R] each
    j = key
    if info is not None:
        j, own = column(info[:1]), column(info[1:])  # [block,1] each
        # segment 0 is padding, -1 an empty slot
        seen = seen & (segment == own) & (own > 0) & (j >= 0)
    if static.form.mask is not None:
        seen = seen & static.form.mask(h, i, j)
    return jnp.where(seen, s, NEVER)


class Fetch:
    """Copies of the blocks that a query block chose, two query blocks deep."""

    def __init__(self, static, groups: int, chosen, sources, buffers, semaphores):
        self.static, self.chosen = static, chosen
        self.sources, self.buffers, self.semaphores = sources, buffers, semaphores
        self.b, self.c, self.n = (pl.program_id(a) for a in range(3))
        self.kv = self.c // groups
        self.each = buffers[0].shape[1]

    def number(self, n, m):
        """The m-th key block of query block n."""
        return self.chosen[0, 0, 0, n * self.each + m]

    def copies(self, n, m):
        """The copies of one chosen block into its half of the buffers."""
        number, half = self.number(n, m), n % 2  # halves alternate
        for at, (source, buffer) in enumerate(zip(self.sources, self.buffers)):
            # position and segment are the same for all key heads
            lead = (self.b, number) if source.ndim == 4 else (self.b, self.kv, number)
            yield pltpu.make_async_copy(
                source.at[lead], buffer.at[half, m], self.semaphores.at[half, at]
            )

    def each_chosen(self, n, act) -> None:
        """act(copy) for every copy of query block n."""
        def all_of(m):
            for copy in self.copies(n, m):
                act(copy)

        def one(m, none):
            pl.when(self.number(n, m) >= 0)(lambda: all_of(m))  # -1: none
            return none

        jax.lax.fori_loop(0, self.each, one, 0)

    def arrive(self) -> None:
        """Waits for the blocks at hand, and sends for the next ones."""

        def start(copy):
            copy.start()

        # the first query block of a head sends for its own
        pl.when(self.n == 0)(lambda: self.each_chosen(self.n, start))
        more = self.n + 1 < pl.num_programs(2)
        # the next blocks are on their way before these are waited for
        pl.when(more)(lambda: self.each_chosen(self.n + 1, start))
        self.each_chosen(self.n, lambda copy: copy.wait())

    def for_each_block(self, step, carry):
        """step(carry, number, k, v, info) over the blocks at hand, in order."""
        half = self.n % 2

        def one(m, carry):
            number = self.number(self.n, m)

            def take(carry):
                k, v, *info = (buffer[half, m] for buffer in self.buffers)
                return step(carry, number, k, v, info[0] if info else None)

            return jax.lax.cond(number >= 0, take, lambda c: c, carry)

        return jax.lax.fori_loop(0, self.each, one, carry)


def _forward(static, groups, chosen, rows_ref, q_ref, *refs):
    (o_ref, m_ref, l_ref), sources, buffers, semaphores = _parts(refs, 3)
    fetch = Fetch(static, groups, chosen, sources, buffers, semaphores)
    fetch.arrive()
    q, rows = q_ref[0, 0, 0], rows_ref[0, 0, 0]  # [R,D], [3,R]
    count, width = q.shape[0], o_ref.shape[-1]

    def step(carry, number, k, v, info):
        top, total, acc = carry
        s = logits(static, k, q, rows, number, info)  # s^T [block,R]
        new = jnp.maximum(top, s.max(0, keepdims=True))  # m' = max(m, colmax s^T)
        exp2 = static.form.exp2
        p, rescale = exp2(s - new), exp2(top - new)  # P, 2^(m - m')
        total = total * rescale + p.sum(0, keepdims=True)
        # v^T p: [block,V] by [block,rows] is [V,rows]
        return new, total, acc * rescale + dot(v, p.astype(v.dtype), TN)

    start = (jnp.full((1, count), LOW, F32), jnp.zeros((1, count), F32),
             jnp.zeros((width, count), F32))  # m, l, o^T
    top, total, acc = fetch.for_each_block(step, start)
    safe = jnp.where(total > 0, total, 1)
    o_ref[0, 0, 0] = (acc / safe).T.astype(o_ref.dtype)  # [R,V]
    m_ref[0, 0, 0], l_ref[0, 0, 0] = top, total


def _parts(refs, outs: int):
    """(outputs, sources, buffers, semaphores): the copied arrays come first."""
    copied = (len(refs) - outs - 1) // 2
    return (refs[copied:copied + outs], refs[:copied],
            refs[copied + outs:copied + outs + copied], refs[-1])


def _weights(static, k, v, q, do, rows, parts, number, info):
    """p and ds [block,R], made again from q, k and base; parts [2,R]: base, delta."""
    # P = exp(S - L), dP = dO V^T, dS = P (dP - D)
    p = static.form.recompute(logits(static, k, q, rows, number, info), parts[:1])
    return p, p * (dot(v, do, NT) - parts[1:])  # [block,V] [R,V] -> [block,R]


def _queries(static, groups, chosen, rows_ref, q_ref, parts_ref, do_ref, *refs):
    (dq_ref,), sources, buffers, semaphores = _parts(refs, 1)
    fetch = Fetch(static, groups, chosen, sources, buffers, semaphores)
    fetch.arrive()
    q, do = q_ref[0, 0, 0], do_ref[0, 0, 0]  # [R,D], [R,V]
    rows, parts = rows_ref[0, 0, 0], parts_ref[0, 0, 0]  # [3,R], [2,R]

    def step(acc, number, k, v, info):
        ds = _weights(static, k, v, q, do, rows, parts, number, info)[1]
        # k^T ds: [block,D] by [block,rows] is [D,rows]
        return acc + dot(k, ds.astype(k.dtype), TN)

    acc = fetch.for_each_block(step, jnp.zeros(q.shape[::-1], F32))  # dq^T [D,R]
    dq_ref[0, 0, 0] = (acc * static.form.scale).T.astype(dq_ref.dtype)


def _keys(static, shape, entries, first, k_ref, v_ref, *refs):
    """dk and dv of one key block, over the query blocks that chose it."""
    *info_ref, rows, q, parts, do, dk_ref, dv_ref = refs[:-5]
    buffers, semaphores = refs[-5:-1], refs[-1]
    sources = rows, q, parts, do
    b, kv, number = (pl.program_id(n) for n in range(3))
    start, end = first[0, 0, 0, number], first[0, 0, 0, number + 1]  # its entries
    groups, many = shape
    k, v = k_ref[0, 0, 0], v_ref[0, 0, 0]  # [block,D], [block,V]
    info = info_ref[0][0, 0] if info_ref else None

    def copies(e):
        at = entries[0, 0, 0, e]
        lead = b, kv * groups + at // many, at % many  # choice, query block
        return [
            pltpu.make_async_copy(source.at[lead], buffer.at[e % 2],
                                  semaphores.at[e % 2, n])
            for n, (source, buffer) in enumerate(zip(sources, buffers))
        ]

    def send(e):
        for copy in copies(e):
            copy.start()

    def step(e, carry):
        dk, dv = carry
        # the next rows are on their way before these are waited for
        pl.when(e + 1 < end)(lambda: send(e + 1))
        for copy in copies(e):
            copy.wait()
        rows, q, parts, do = (buffer[e % 2] for buffer in buffers)
        p, ds = _weights(static, k, v, q, do, rows, parts, number, info)
        # p do and ds q: [block,rows] by [rows,V] and [rows,D]
        dv = dv + dot(p.astype(do.dtype), do, NN)
        return dk + dot(ds.astype(q.dtype), q, NN), dv

    pl.when(start < end)(lambda: send(start))
    zeros = jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32)
    dk, dv = jax.lax.fori_loop(start, end, step, zeros)
    dk_ref[0, 0, 0] = (dk * static.form.scale).astype(dk_ref.dtype)
    dv_ref[0, 0, 0] = dv.astype(dv_ref.dtype)


def _launch(static, body, grid, in_specs, out, out_specs, scratch, name, args) -> Any:
    return pl.pallas_call(
        body, grid=grid, in_specs=in_specs, out_shape=out, out_specs=out_specs,
        scratch_shapes=scratch, interpret=static.interpret, name=name,
        compiler_params=pltpu.CompilerParams(
            # steps in order: each sends for the blocks of the next
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=static.vmem,
        ),
    )(*args)


def _by_step(a):
    """The block of [B,C,N,...] that a step (b, c, n) takes."""
    tail = a.shape[3:]
    return pl.BlockSpec((1, 1, 1, *tail), lambda b, c, n: (b, c, n, *(0 for _ in tail)))


def _listed(a):
    """[B,C,...] as scalars of a head: [B,C,1,E] and its block."""
    a = a.reshape(*a.shape[:2], 1, -1)
    spec = pl.BlockSpec((1, 1, 1, a.shape[3]), lambda b, c, n: (b, c, 0, 0),
                        memory_space=pltpu.SMEM)  # the scalar unit reads them
    return a, spec


def _per_query_block(static, kernel, name, chosen, x, tiled, outs):
    """A kernel with a step a query block, that fetches the chosen k, v and info."""
    b, c, n, each = chosen.shape
    sources = [a for a in (x.k, x.v, x.info) if a is not None]
    chosen, spec = _listed(chosen)
    # two halves: while one is computed on, the other is filled
    buffers = [pltpu.VMEM((2, each, *a.shape[-2:]), a.dtype) for a in sources]
    return _launch(
        static, functools.partial(kernel, static, c // x.k.shape[1]), (b, c, n),
        [spec, *map(_by_step, tiled), *[ANY] * len(sources)], outs,
        [_by_step(a) for a in outs],
        [*buffers, pltpu.SemaphoreType.DMA((2, len(sources)))], name,
        (chosen, *tiled, *sources),
    )


def forward(static, side, q, k, v):
    """o [B,T,H,V] in v's dtype, m and l [B,T,H] float32, m in the unit of logits."""
    x = tpu_layout.laid(static, side, q, k, v)
    shape = x.q.shape[:4]
    outs = [jax.ShapeDtypeStruct((*shape, v.shape[-1]), v.dtype),
            *[jax.ShapeDtypeStruct((*shape[:3], 1, shape[3]), F32)] * 2]
    o, *sums = _per_query_block(static, _forward, "blocks_forward", side.chosen, x,
                                (x.rows, x.q), outs)
    found = o, *(a[:, :, :, 0] for a in sums)
    return tuple(tpu_layout.unrows(static, a) for a in found)


def queries_backward(static, side, q, k, v, base, delta, do):
    """dq [B,T,H,D]; base, delta [B,T,H], base in the unit of logits."""
    x = tpu_layout.laid(static, side, q, k, v, base, delta, do)
    outs = [jax.ShapeDtypeStruct(x.q.shape, q.dtype)]
    dq, = _per_query_block(static, _queries, "blocks_backward_queries", side.chosen, x,
                           (x.rows, x.q, x.parts, x.do), outs)
    return tpu_layout.unrows(static, dq)


def keys_backward(static, side, lists, q, k, v, base, delta, do):
    """dk [B,S,K,D] and dv [B,S,K,V], by the lists of `blocks.inverse`."""
    x = tpu_layout.laid(static, side, q, k, v, base, delta, do)
    b, heads, many = x.k.shape[:3]
    shape = x.q.shape[1] // heads, x.q.shape[2]
    (entries, entries_spec), (first, first_spec) = map(_listed, lists)
    sources = x.rows, x.q, x.parts, x.do
    info, info_spec = [], []
    if x.info is not None:
        info, tail = [x.info], x.info.shape[2:]
        info_spec = [pl.BlockSpec((1, 1, *tail), lambda b, c, n: (b, n, 0, 0))]
    buffers = [pltpu.VMEM((2, *a.shape[3:]), a.dtype) for a in sources]
    grads = _launch(
        static, functools.partial(_keys, static, shape), (b, heads, many),
        [entries_spec, first_spec, _by_step(x.k), _by_step(x.v), *info_spec,
         *[ANY] * 4],
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x.k, x.v)],
        [_by_step(x.k), _by_step(x.v)],
        [*buffers, pltpu.SemaphoreType.DMA((2, 4))], "blocks_backward_keys",
        (entries, first, x.k, x.v, *info, *sources),
    )
    return tuple(tpu_layout.unkeys(static, a) for a in grads)
