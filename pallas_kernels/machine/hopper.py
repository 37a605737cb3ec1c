"""Warpgroups of a kernel for Hopper, by Mosaic GPU: memory that they share, values in
their registers, matrix products that run beside them, and how a kernel is launched.

Everything that changed between versions of jax, and everything that an interpreter on a
CPU does differently, stands here: there a product whose left side is in registers is a
dot, no product runs beside other work, and a layout is nothing, while copies, barriers,
warpgroups and, from jax 0.11, products of what is in memory are simulated.
"""

from __future__ import annotations

import inspect
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F32 = jnp.float32
ROWS = 64  # queries, or keys, of one warpgroup's matrix product
# registers of a thread of the warpgroup that loads and of those that compute, by how
# many these are: 512 in all
FEW, MANY = {1: 24, 2: 24, 3: 32}, {1: 240, 2: 240, 3: 160}
WIDE = 128  # bytes of a line of shared memory
TILE = plgpu.Layout.WGMMA
LATER = jax.__version_info__ >= (0, 11)  # its interpreter takes transposed operands
INDEXED = "idx" in inspect.signature(plgpu.load).parameters  # until jax 0.12


def shared(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory for tiles [...,rows,width] that matrix products read."""
    return plgpu.SMEM(shape, dtype, transforms=(
        # lines of 128 bytes, swizzled: the form in which wgmma reads
        plgpu.TilingTransform((8, WIDE // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(WIDE)))


def cast(x, layout, interpret: bool):
    """x laid out over the registers of a warpgroup."""
    return x if interpret else plgpu.layout_cast(x, layout)


def vector(ref, columns: bool, interpret: bool, layout=TILE):
    """A vector in memory, as one of the rows or the columns of a tile."""
    # what a sum over the other axis leaves
    return _load(ref, layout.reduce(0 if columns else 1), interpret)


def matrix(ref, interpret: bool, layout=TILE):
    """A tile of shared memory in registers."""
    return _load(ref, layout, interpret)


def _load(ref, layout, interpret: bool):
    if interpret:
        return ref[...]
    index = ((),) if INDEXED else ()  # jax before 0.12 asks for one
    return plgpu.load(ref, *index, layout=layout, optimized=False)


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
        # products are made where they begin, and nothing waits
        return body(lambda n, *ab: lambda later=0, found=_one(starts[n], *ab): found)
    shapes = [s if isinstance(s, tuple) else s.shape for s in starts]

    def run(*refs):
        # before the first product: see above
        for ref, start in zip(refs, starts):
            if not isinstance(start, tuple):
                ref[...] = start

        def begin(n, a, b):
            _multiply(refs[n], a, b)
            return lambda later=0: plgpu.wgmma_accumulator_load(refs[n], wait_n=later)

        return body(begin)

    return pl.run_scoped(run, *(plgpu.ACC(shape) for shape in shapes))


def _multiply(ref, a, b) -> None:
    turned = isinstance(b, Tile)
    plgpu.wgmma(ref, a, b.turned.transpose((1, 0)) if turned else b)


def _one(start, a, b):
    """A product when interpreted: no interpreter so far takes an array as the left side
    or an accumulator that starts from something."""
    if isinstance(a, jax.Array) or not LATER:
        a = a if isinstance(a, jax.Array) else a[...]
        b = b.turned[...].T if isinstance(b, Tile) else b[...]
        found = jnp.dot(a, b, preferred_element_type=F32)
        return found if isinstance(start, tuple) else found + start

    def run(ref):
        _multiply(ref, a, b)
        return ref[...]

    return pl.run_scoped(run, plgpu.ACC(start))


def zeros(shape: tuple[int, ...], interpret: bool, value: Any = 0.0, layout=TILE):
    """An accumulator of a warpgroup, or for one axis a vector of its rows."""
    layout = layout if len(shape) == 2 else layout.reduce(1)
    return cast(jnp.full(shape, value, F32), layout, interpret)


def drain(free, stages, count) -> None:
    """Waits until what was loaded last has been used."""
    def wait(n, carry):
        plgpu.barrier_wait(free.at[jax.lax.rem(n, stages)])
        return carry

    # the last tiles, as many as the ring holds or as there were
    jax.lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, None)


def launch(kernel: Callable, grid: dict[str, int], inputs: Any, outs: list,
           scratch: tuple, *, warpgroups: int, exact: bool, interpret: bool, name: str):
    """Runs kernel(inputs, outs, scratch) on references to whole arrays, with that many
    warpgroups beside the one that loads. The last axis of the grid passes fastest;
    exact: transcendental functions to float32's accuracy."""
    arrays, shape = jax.tree.flatten(inputs)
    n, m = len(arrays), len(arrays) + len(outs)

    def body(*refs):
        kernel(jax.tree.unflatten(shape, refs[:n]), refs[n:m], refs[m:])

    body.__name__ = name
    return plgpu.kernel(
        body, out_type=outs, scratch_types=scratch, grid=tuple(grid.values()),
        grid_names=tuple(grid), num_threads=warpgroups + 1, thread_name="group",
        interpret=_interpreter() if interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=not exact, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*arrays)


def _interpreter():
    # private in every version so far
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams()


def share(group, warpgroups: int, load: Callable[[], None],
          compute: Callable[[], None]) -> None:
    """Warpgroups part: the last one loads with few registers, the others compute."""
    @pl.when(group == warpgroups)
    def _():
        plgpu.set_max_registers(FEW[warpgroups], action="decrease")
        load()

    @pl.when(group < warpgroups)
    def _():
        plgpu.set_max_registers(MANY[warpgroups], action="increase")
        compute()
