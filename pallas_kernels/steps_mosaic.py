"""Steps of a flash kernel on Hopper by Mosaic GPU: the lists of tiles, the ring of
shared memory through which they pass, groups of matrix products, and what the elements
of a tile are.

Everything that changed between versions of jax, and everything that an interpreter on a
CPU does differently, stands here: there a matrix product is a dot of what the memory
holds and a layout is nothing, while copies, barriers and warpgroups are simulated.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.schedule import FULL, SKIP, Side, Tiling
from pallas_kernels.tile import LOG2E, NEVER, Form, both

F32 = jnp.float32
ROWS = 64  # queries, or keys, of one warpgroup's matrix product
FEW, MANY = {1: 24, 2: 24, 3: 32}, {1: 240, 2: 240, 3: 160}  # registers of a thread of
# the warpgroup that loads and of those that compute, by how many these are: 512 in all
WIDE = 128  # bytes of a line of shared memory
TILE = plgpu.Layout.WGMMA
ALONG = {False: TILE.reduce(1), True: TILE.reduce(0)}  # a vector of rows, of columns


class Line(NamedTuple):
    """Which tiles of the inner axis a block passes over, for each tile of the outer.

    whole [B|1,N]: how many need no mask, count [B|1,N]: how many in all, at least one;
    where [B|1,N,n]: which, those without a mask first. A line that sees nothing holds
    one tile, in which the mask hides every element.
    """

    whole: Any
    count: Any
    where: Any


class Call(NamedTuple):
    """What is static: the form, the tiles, query heads of a key head, warpgroups that
    compute, and stages of the ring."""

    form: Form
    tiling: Tiling
    groups: int
    warpgroups: int
    stages: int
    interpret: bool

    @property
    def plain(self) -> bool:
        """Whether a logit is a positive multiple of q.k: then maxima are taken first,
        and scale and maximum enter 2^x by one multiply-add."""
        f = self.form
        return f.softcap is None and f.score is None and f.scale > 0


class Arrays(NamedTuple):
    """What a kernel reads; None for what the call does not use.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; heads [H]: global head numbers; q_pos [B,T'],
    kv_pos [B,K|1,S'], q_run [B|1,T'], kv_run [B|1,S'], T' and S' whole tiles; sink [H]
    float32 times log2 e; and backward do [B,T,H,V], lse (times log2 e), delta [B,H,T'].
    """

    q: Any
    k: Any
    v: Any
    heads: Any
    q_pos: Any = None
    kv_pos: Any = None
    q_run: Any = None
    kv_run: Any = None
    sink: Any = None
    do: Any = None
    lse: Any = None
    delta: Any = None


def line(table: np.ndarray, ask: jax.Array | None) -> Line:
    """The tiles that each row of `table` [N,M], or of `ask` [B,N,M], asks for."""
    xp, ask = (np, table[None]) if ask is None else (jnp, ask)
    rank = xp.where(ask == SKIP, 2, xp.where(ask == FULL, 0, 1))
    wanted = (rank < 2).sum(-1)
    most = max(int(wanted.max()), 1) if xp is np else ask.shape[-1]
    where = xp.argsort(rank, axis=-1, stable=True)[..., :most]
    counts = (rank == 0).sum(-1), xp.maximum(wanted, 1), where
    return Line(*(jnp.asarray(a, jnp.int32) for a in counts))


def shared(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory for tiles [...,rows,width] that matrix products read."""
    return plgpu.SMEM(shape, dtype, transforms=(
        plgpu.TilingTransform((8, WIDE // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(WIDE)))


def cast(x, layout, interpret: bool):
    """x laid out over the registers of a warpgroup."""
    return x if interpret else plgpu.layout_cast(x, layout)


def vector(ref, at: tuple, columns: bool, interpret: bool):
    """A slice of a reference, as a vector of the rows or the columns of a tile."""
    if interpret:
        return ref[at]
    return plgpu.load(ref, at, layout=ALONG[columns], optimized=False)


def matrix(ref, interpret: bool):
    """A tile of shared memory in registers."""
    return ref[...] if interpret else plgpu.load(ref, (), layout=TILE)


def spread(x, shape: tuple[int, int], columns: bool):
    """A vector of rows or columns over a tile."""
    return jax.lax.broadcast_in_dim(x, shape, (1,) if columns else (0,))


class Tile(NamedTuple):
    """A tile of shared memory, transposed."""

    turned: Any


def products(interpret: bool, starts: list[Any], body: Callable):
    """body(begin) with an accumulator for each of `starts`: a shape, for zeros, or what
    it starts from. begin(n, a, b) adds a b to the n-th, a: an array or a tile of shared
    memory, b: a tile of shared memory or a `Tile`. What it returns, called, waits for
    that product and all before it, while the given number of later ones may go on.

    All accumulators and arrays have to be ready before the first product begins: ptxas
    runs the products one by one if registers change meanwhile (its warning C7513).
    """
    if interpret:
        return body(lambda n, a, b: lambda later=0, found=_dot(starts[n], a, b): found)
    shapes = [s if isinstance(s, tuple) else s.shape for s in starts]

    def run(*refs):
        for ref, start in zip(refs, starts):
            if not isinstance(start, tuple):
                ref[...] = start

        def begin(n, a, b):
            ref = refs[n]
            turned = isinstance(b, Tile)
            plgpu.wgmma(ref, a, plgpu.transpose_ref(b.turned, (1, 0)) if turned else b)
            return lambda later=0: plgpu.wgmma_accumulator_load(ref, wait_n=later)

        return body(begin)

    return pl.run_scoped(run, *(plgpu.ACC(shape) for shape in shapes))


def _dot(start, a, b):
    a = a if isinstance(a, jax.Array) else a[...]
    b = b.turned[...].T if isinstance(b, Tile) else b[...]
    found = jnp.dot(a, b, preferred_element_type=F32)
    return found if isinstance(start, tuple) else found + start


def zeros(shape: tuple[int, ...], interpret: bool, value: float = 0.0):
    """An accumulator of a warpgroup, or for one axis a vector of its rows."""
    layout = TILE if len(shape) == 2 else ALONG[False]
    return cast(jnp.full(shape, value, F32), layout, interpret)


def tokens(a, size: int, axis: int = 1, value=0):
    """a with whole tiles of tokens."""
    lack = -a.shape[axis] % size
    if not lack:
        return a
    pads = [(0, lack if n == axis else 0) for n in range(a.ndim)]
    return jnp.pad(a, pads, constant_values=value)


def arrays(call: Call, side: Side, q, k, v, sink, do=None) -> Arrays:
    """A call's arrays as a kernel reads them."""
    t = call.tiling

    def tile(a, size):
        a = tokens(a, 64, 3)
        # a copy beyond the end reads 0, but an interpreted one is an error
        return tokens(a, size) if call.interpret or a.shape[1] < size else a

    def vector(a, size, axis=1):
        return None if a is None else tokens(a.astype(jnp.int32), size, axis, -1)

    kv_pos = None if side.kv_pos is None else side.kv_pos.swapaxes(1, 2)
    return Arrays(
        tile(q, t.rows), tile(k, t.columns), tile(v, t.columns),
        side.head.astype(jnp.int32), vector(side.q_pos, t.rows),
        vector(kv_pos, t.columns, 2), vector(side.q_run, t.rows),
        vector(side.kv_run, t.columns),
        None if sink is None else sink.astype(F32) * LOG2E,
        None if do is None else tile(do, t.rows),
    )


class Here:
    """One head of one row of the batch. Tiles of logits lie as [queries, keys], or,
    `turned`, as [keys, queries]."""

    def __init__(self, call: Call, x: Arrays, b, h, turned: bool = False):
        self.call, self.x, self.b, self.h, self.turned = call, x, b, h, turned
        self.kv = jax.lax.div(h, jnp.int32(call.groups))
        self.head = x.heads[h]

    def places(self, first_row, first_key, shape):
        """Query and key positions of a tile [shape]."""
        x, t, interpret = self.x, self.call.tiling, self.call.interpret
        if t.offset is None:
            head = self.kv if x.kv_pos.shape[1] > 1 else 0
            i = self._vector(x.q_pos, (self.b,), first_row, shape, False)
            j = self._vector(x.kv_pos, (self.b, head), first_key, shape, True)
            return i, j
        count = lambda axis: cast(jax.lax.broadcasted_iota(jnp.int32, shape, axis),
                                  TILE, interpret)
        rows, keys = (1, 0) if self.turned else (0, 1)
        return count(rows) + (first_row + t.offset), count(keys) + first_key

    def _vector(self, ref, before, first, shape, keys: bool):
        columns = keys != self.turned
        at = (*before, pl.ds(first, shape[1 if columns else 0]))
        return spread(vector(ref, at, columns, self.call.interpret), shape, columns)

    def logits(self, raw, first_row, first_key, masked: bool):
        """Logits of a tile, NEVER where hidden, their unit, and their slope.

        A logit times log2(e) is the first times the unit, which is 1 unless `plain`."""
        call = self.call
        i = j = slope = None
        if call.form.score is not None or masked:
            i, j = self.places(first_row, first_key, raw.shape)
        unit = 1.0
        if call.plain:
            unit = call.form.scale * LOG2E
        else:
            raw, slope = call.form.logits(raw, self.head, i, j, None, LOG2E)
        if masked:
            seen = self.seen(i, j, first_row, first_key, raw.shape)
            raw = raw if seen is None else jnp.where(seen, raw, NEVER)
        return raw, unit, slope

    def seen(self, i, j, first_row, first_key, shape):
        """Who sees whom in a tile, None for everyone."""
        x, t, form = self.x, self.call.tiling, self.call.form
        seen = None if form.mask is None else form.mask(self.head, i, j)
        if t.offset is None:
            seen = both(seen, j >= 0)
        if x.q_run is not None:
            row = lambda ref: (self.b if ref.shape[0] > 1 else 0,)
            mine = self._vector(x.q_run, row(x.q_run), first_row, shape, False)
            run = self._vector(x.kv_run, row(x.kv_run), first_key, shape, True)
            seen = both(both(seen, mine == run), run > 0)
        if t.s % t.columns:
            number = cast(jax.lax.broadcasted_iota(jnp.int32, shape, int(
                not self.turned)), TILE, self.call.interpret)
            seen = both(seen, number + first_key < t.s)
        return seen


def fetch_keys(here: Here, at, count, rings, barriers) -> None:
    """The warpgroup that loads: `count` tiles of k and v, at(n) the n-th, as room in
    the rings comes free."""
    size = here.call.tiling.columns
    there, free = barriers[:2], barriers[2:]
    stages = [jnp.int32(ring.shape[0]) for ring in rings]

    def load(n, carry):
        place = here.b, pl.ds(at(n) * size, size), here.kv
        for ref, ring, full, room, many in zip(
                (here.x.k, here.x.v), rings, there, free, stages):
            slot = jax.lax.rem(n, many)

            @pl.when(n >= many)
            def _():
                plgpu.barrier_wait(room.at[slot])
            plgpu.copy_gmem_to_smem(ref.at[place], ring.at[slot], full.at[slot])
        return carry

    jax.lax.fori_loop(0, count, load, None)
    for room, many in zip(free, stages):
        drain(room, many, count)


def drain(free, stages, count) -> None:
    """Waits until what was loaded last has been used."""
    def wait(n, carry):
        plgpu.barrier_wait(free.at[jax.lax.rem(n, stages)])
        return carry

    jax.lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, None)


def weights(s, unit: float, lse, columns: bool):
    """2^(s unit - lse), lse along the rows or the columns."""
    shift = spread(lse, s.shape, columns)
    return jnp.exp2(s * unit - shift if unit != 1.0 else s - shift)


def online(s, unit: float, m, total):
    """A step of the online softmax: p, and the new maximum, sum, and by how much what
    was there fades. s [rows,keys]; m times log2(e) and total [rows]."""
    top = jnp.maximum(m, s.max(1) * unit if unit != 1.0 else s.max(1))
    p = weights(s, unit, top, False)
    fade = jnp.exp2(m - top)
    return p, top, total * fade + p.sum(1), fade


def launch(call: Call, kernel, grid: dict[str, int], x: Arrays, seen: Line, outs,
           scratch, name: str):
    """A kernel of warpgroups: kernel(call, x, seen, outs, scratch), on whole arrays."""
    arrays, shape = jax.tree.flatten((x, seen))
    n, m = len(arrays), len(arrays) + len(outs)

    def body(*refs):
        x, seen = jax.tree.unflatten(shape, refs[:n])
        kernel(call, x, seen, refs[n:m], refs[m:])

    body.__name__ = name
    return plgpu.kernel(
        body, out_type=outs, scratch_types=scratch, grid=tuple(grid.values()),
        grid_names=tuple(grid), num_threads=call.warpgroups + 1, thread_name="group",
        interpret=_interpreter() if call.interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=call.form.softcap is None,
            lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*arrays)


def _interpreter():
    # private in every version so far
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams()
