"""Tiles of a flash kernel on TPU: the schedule that is prefetched, the tiles that are
cut out of each array, and what the elements of a tile are.

Tiles of logits lie as [keys, queries]: see `pallas_kernels/flash/tpu.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.machine.product import F32, NT, dot
from pallas_kernels.machine.tpu import column
from pallas_kernels.schedule import FULL, MASKED, GridOrder, Tiling
from pallas_kernels.tile import NEVER, TileSpec, both, dropout_keep
from pallas_kernels.tile_patterns import Part, TilePatterns

# the bits of a word of `Scalars.plan`: what is asked of a tile, whether it opens and
# whether it closes its line, and above them which tile of the inner axis to hold
ASK, FIRST, LAST, HOLD_SHIFT = 15, 16, 32, 6
ROW_SHIFT, COLUMN = 16, 0xFFFF  # of a word of `Scalars.order`


class Arrays(NamedTuple):
    """What a kernel reads by tiles; None for what the call does not use.

    q [B,H,T,D], k [B,K,S,D], v [B,K,S,V], T and S multiples of their tile; bias
    [B|1,H|1,T|1,S|1]; keep [B,H,T,S] int8; q_pos, q_segment [B|1,1,T]; kv_pos
    [B,1|K,1,S]; kv_segment [B|1,1,S]; and backward do [B,H,T,V], lse and delta
    [B,H,1,T].
    """

    q: Any
    k: Any
    v: Any
    bias: Any = None
    keep: Any = None
    q_pos: Any = None
    kv_pos: Any = None
    q_segment: Any = None
    kv_segment: Any = None
    do: Any = None
    lse: Any = None
    delta: Any = None


class Scalars(NamedTuple):
    """What a kernel reads before a step begins: int32, but for sink.

    order [P]: row << 16 | column; plan [B|1 * P]: hold, last, first and ask in the bits
    named above; group [P]: which query head of the key head; heads [H]: global head
    numbers; sink [H] float32; rng [2 + B]: the seed, and the rows' numbers in the
    batch.
    """

    order: Any
    plan: Any
    group: Any
    heads: Any
    sink: Any
    rng: Any


class Call(NamedTuple):
    """What is static: the form, the tiles, how they are taken, what else there is."""

    form: TileSpec
    tiling: Tiling
    patterns: TilePatterns
    groups: int
    sink: bool
    vmem: int  # bytes of fast memory that the compiler may use
    interpret: Any


def scalars(seen: GridOrder, groups: int, heads, sink, seed, batch) -> Scalars:
    """The schedule packed; `groups` > 1 repeats each line for every query head."""
    steps = len(seen.order)
    start = np.flatnonzero(seen.first)  # where lines open
    lines = np.split(np.arange(steps), start[1:])
    at = np.concatenate([np.tile(line, groups) for line in lines])
    group = np.concatenate([np.repeat(np.arange(groups), len(line)) for line in lines])
    first = seen.first[at] & (group == 0)  # with the first head
    last = seen.last[at] & (group == groups - 1)  # with the last head
    words = jnp.asarray(last * LAST | first * FIRST)[None] + seen.ask[:, at]  # [B|1,P]
    words = words + (seen.hold[:, at] << HOLD_SHIFT)
    rng = jnp.zeros(2, jnp.int32)
    if seed is not None:
        rng = jnp.concatenate([seed.astype(jnp.int32), batch.astype(jnp.int32)])
    zeros = jnp.zeros(heads.shape, F32)
    return Scalars(
        jnp.asarray(seen.order[at]), words.astype(jnp.int32).reshape(-1),
        jnp.asarray(group, jnp.int32), heads.astype(jnp.int32),
        zeros if sink is None else sink.astype(F32), rng,
    )


class TileContext:
    """One grid step: which tile, what is asked of it, and what its elements are."""

    def __init__(self, call: Call, info: Scalars, x: Arrays, by_column: bool):
        self.call, self.x, self.info = call, x, info
        steps = info.order.shape[0]
        self.b, outer, self.p = (pl.program_id(n) for n in range(3))
        self.row, self.column = unpack(info.order[self.p])
        self.group = info.group[self.p]
        self.local = outer * call.groups + self.group if by_column else outer
        self.head = info.heads[self.local]
        rows = info.plan.shape[0] // steps  # 1: one plan for every row of the batch
        self.word = info.plan[(self.b * steps if rows > 1 else 0) + self.p]
        self.ask = self.word & ASK
        self.first, self.last = self.word & FIRST != 0, self.word & LAST != 0

    def positions(self, part: Part):
        """Query positions [1,queries] and key positions [keys,1] of a part."""
        t = self.call.tiling
        if t.offset is None:
            j = column(self.x.kv_pos[0, 0, :, part.keys])  # [keys,1]
            return self.x.q_pos[0, :, part.queries], j
        return self.queries(part) + t.offset, self.keys(part)

    def queries(self, part: Part):
        """Query numbers [1,queries]."""
        first = self.row * self.call.tiling.rows + part.first_query
        size = part.end_query - part.first_query
        return first + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)

    def keys(self, part: Part):
        """Key numbers [keys,1]."""
        first = self.column * self.call.tiling.columns + part.first_key
        size = part.end_key - part.first_key
        return first + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)

    def logits(self, part: Part, masked: bool):
        """Logits times their unit of a part [keys,queries], NEVER where hidden."""
        t, form, x = self.call.tiling, self.call.form, self.x
        # s^T = k q^T: [keys,D] by [queries,D] is [keys,queries]
        raw = dot(x.k[0, 0, part.keys], x.q[0, 0, part.queries], NT)
        i = j = None
        if masked or form.score is not None:
            i, j = self.positions(part)  # [1,queries], [keys,1]
        bias = None if x.bias is None else self.bias(part)
        s, slope = form.logits(raw, self.head, i, j, bias)
        if not masked:
            return s, slope
        seen = None if form.mask is None else form.mask(self.head, i, j)
        if t.offset is None:
            seen = both(seen, self.positions(part)[1] >= 0)  # -1: an empty slot
        if x.q_segment is not None:
            segment = column(x.kv_segment[0, :, part.keys])  # [keys,1]
            # segment 0 is padding
            mine = x.q_segment[0, :, part.queries]
            seen = both(seen, (mine == segment) & (segment > 0))
        if t.s % t.columns:
            seen = both(seen, self.keys(part) < t.s)  # the tail is nobody's key
        # masked last, after scale, cap and bias: 2^(NEVER - m) is 0 and no nan
        return (s if seen is None else jnp.where(seen, s, NEVER)), slope

    def bias(self, part: Part):
        """The bias of a part: [keys|1,queries|1]."""
        ref = self.x.bias
        rows, columns = ref.shape[2:]
        own = ref[0, 0, part.queries if rows > 1 else slice(None),  # [queries|1,keys|1]
                  part.keys if columns > 1 else slice(None)]
        # as the logits lie; a single row is turned as a vector
        return (column(own) if rows == 1 else own.astype(F32).T).astype(F32)

    def drop(self, part: Part):
        """What dropout multiplies the weights of a part with; None for nothing."""
        rate = self.call.form.dropout
        if self.x.keep is not None:
            # as the logits lie: [keys,queries]
            stay = self.x.keep[0, 0, part.queries, part.keys].astype(F32).T
            return stay / (1 - rate)
        if not rate:
            return None
        seed = [self.info.rng[n].astype(jnp.uint32) for n in range(2)]
        batch = self.info.rng[2 + self.b]
        # numbers, not positions, so that every form drops the same weights
        stay = dropout_keep(
            rate, seed, batch, self.head, self.queries(part), self.keys(part))
        return jnp.where(stay, 1 / (1 - rate), 0.0)

    def recompute(self, part: Part, masked: bool):
        """p, dropped p and ds of a part [keys,queries], made again from q, k and lse.
        """
        x = self.x
        s, slope = self.logits(part, masked)
        # P = exp(S - L), dP = dO V^T, dS = P (dP - D): Dao, 2023, algorithm 2
        p = self.call.form.recompute(s, x.lse[0, 0, :, part.queries])  # lse [1,queries]
        # v do^T: [keys,V] by [queries,V] is [keys,queries]
        dp = dot(x.v[0, 0, part.keys], x.do[0, 0, part.queries], NT)
        drop = self.drop(part)
        # O = (P drop) V, so dP = drop (dO V^T)
        dropped, dp = (p, dp) if drop is None else (p * drop, dp * drop)
        ds = p * (dp - x.delta[0, 0, :, part.queries])  # delta [1,queries]
        return dropped, ds, (ds if slope is None else ds * slope)

    def run(self, step) -> None:
        """step(parts, masked) as the tile asks; nothing for a tile that is skipped."""
        patterns = self.call.patterns
        all_of = patterns.parts(self.call.tiling)
        ways = {MASKED: all_of} if patterns.masked else {}
        ways |= {MASKED + 1 + n: parts for n, parts in enumerate(patterns.partial)}
        ways |= {FULL: all_of} if patterns.whole else {}

        def skip():
            return None

        otherwise: Any = skip
        # conditions in each other, a program in each: all but one are jumped over
        for code, parts in reversed(ways.items()):
            take = functools.partial(step, parts, code != FULL)
            otherwise = functools.partial(
                jax.lax.cond, self.ask == code, take, otherwise)
        otherwise()


def unpack(word):
    """Row and column of an entry of `Scalars.order`."""
    return word >> ROW_SHIFT, word & COLUMN


def cut(a, part: Part):
    """What belongs to a part's queries of a [n,rows]."""
    return a if part.end_query - part.first_query == a.shape[1] else a[:, part.queries]


def put(a, new, part: Part):
    """`a` [n,rows] with what belongs to a part's queries replaced."""
    if new.shape == a.shape:
        return new
    sides = a[:, :part.first_query], new, a[:, part.end_query:]
    return jnp.concatenate([side for side in sides if side.shape[1]], 1)


def specs(call: Call, x: Arrays, outer, inner, head) -> Arrays:
    """How each array is cut: functions of a grid step give tile and head.

    outer, inner: the query tile and the key tile to hold at a step; head: the query
    head.
    """
    rows, columns = call.tiling.rows, call.tiling.columns

    def batch(b, *at):
        return b

    def one(n, index):
        return (lambda *a: 0) if n == 1 else index

    def kv(*a):
        return head(*a) // call.groups  # key head

    def spec(a, cut):
        if a is None:
            return None
        # (size of a block, its index) along each axis
        sizes, indices = zip(*cut)
        at = [one(n, i) for n, i in zip(a.shape, indices)]
        block = tuple(min(m, n) for m, n in zip(sizes, a.shape))
        return pl.BlockSpec(block, lambda *a: tuple(i(*a) for i in at))

    def whole(*a):
        return 0

    by_q = ((1, batch), (1, head), (rows, outer))  # [B,H,T,.]
    by_k = ((1, batch), (1, kv), (columns, inner))  # [B,K,S,.]
    q_row = ((1, batch), (1, whole), (rows, outer))  # [B|1,1,T]
    # [B|1,H|1,T|1,S|1]
    matrix = ((1, batch), (1, head), (rows, outer), (columns, inner))

    def wide(a):
        return ((a.shape[-1], whole),)

    return Arrays(
        spec(x.q, by_q + wide(x.q)), spec(x.k, by_k + wide(x.k)),
        spec(x.v, by_k + wide(x.v)), spec(x.bias, matrix), spec(x.keep, matrix),
        spec(x.q_pos, q_row),
        spec(x.kv_pos, ((1, batch), (1, kv), (1, whole), (columns, inner))),
        spec(x.q_segment, q_row),
        spec(x.kv_segment, ((1, batch), (1, whole), (columns, inner))),
        spec(x.do, by_q + (wide(x.do) if x.do is not None else ())),
        *(spec(a, ((1, batch), (1, head), (1, whole), (rows, outer)))
          for a in (x.lse, x.delta)),
    )


def listed_row(b, h, p, *info):
    """The query tile of a step."""
    return unpack(info[0][p])[0]


def listed_column(b, h, p, *info):
    """The key tile of a step."""
    return unpack(info[0][p])[1]


def own_head(b, h, *at):
    """The head of a step whose grid counts query heads."""
    return h


def current_inner(b, h, p, *info):
    """The tile of the inner axis to have at hand at a step."""
    order, plan = info[:2]
    steps = order.shape[0]
    return plan[(b * steps if plan.shape[0] > steps else 0) + p] >> HOLD_SHIFT


def launch(call: Call, kernel, grid, info: Scalars, x, in_specs, out_specs, out_shape,
           scratch, name: str):
    """pallas_call with the schedule prefetched."""
    def body(*refs):
        info, rest = refs[:len(Scalars._fields)], refs[len(Scalars._fields):]
        kernel(call, info, *rest)

    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Scalars._fields), grid=grid, in_specs=[in_specs],
            out_specs=out_specs, scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            # steps of a head in order: the sums of a line wait in scratch
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=call.vmem,
        ),
        interpret=call.interpret,
        name=name,
    )(*info, x)
