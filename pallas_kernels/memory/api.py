"""A linear memory that learns with momentum, forward and backward, as a kernel.

    r_i = factor (k_i W - v_i),                the chunk's errors, all at its beginning
    W_t = A_t W + f_t S - sum_i G_ti k_i^T r_i,    o_t = q_t W_t

W and S [D,V] are the weights and the momentum that a chunk of c tokens begins with;
what A, f and G are, and the two of S at the end, is worked out before the kernel
(`chunk.Numbers`), c + 8 numbers a token and head, so that their gradients are XLA's:
the kernel returns those of the numbers. Since all of a chunk's gradients are taken at
its beginning no system is solved, as the delta rule has to; W and S travel from chunk
to chunk in float32. No atomics: the same bits each time.

Two limits, of a chunk and head with D = V: 10 c D^2 + 4 c^2 D flops (k W, q W, q S and
two updates; q k^T, its product with r) over the rate of the matrix units, and, in bytes
of 2, 8 c D + 4 c (c + 8) of tokens and numbers over the bandwidth. At c = 16, D = 64
that is 0.72 M flops for 9.7 kB, 74 flops a byte, where an H200 has 206 for each that it
moves, and a v5e 240: bytes are the limit, before what small products and chunks that
wait for each other cost. To be differentiated, 4 D^2 bytes more for each of W and S:
a TPU keeps those that each 128 tokens begin with and makes the ones in between again; a
GPU keeps those of each chunk, in the type of q.

Sources: Titans (Behrouz et al., 2024, arXiv:2501.00663), equations 13-18; the
gradients are derived here.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import jax

from pallas_kernels import Refused, tables
from pallas_kernels.arrays import FLOAT, check_arrays
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.memory.chunk import F32, TILES, Numbers, laid_out
from pallas_kernels.refusals import DTYPES, WIDEST, check_device

STEP = 128  # tokens of a grid step on TPU: the lanes that their numbers take


class Static(NamedTuple):
    """What is known of one call: T tokens, in chunks of `chunk`, each of which takes
    `tile` of a kernel's; vmem: bytes of fast memory that it may use, on TPU."""

    t: int
    chunk: int
    tile: int
    factor: float
    vmem: int
    backend: str
    interpret: Any


def memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    numbers: Numbers,
    weights: jax.Array,
    momentum: jax.Array,
    *,
    factor: float = 2.0,
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """T tokens -> W and S behind them [B,H,D,V] float32, o [B,T,H,V] in v's dtype.

    q, k [B,T,H,D], v [B,T,H,V]; numbers of N = ceil(T/c) chunks of c <= 64 tokens, in
    which tokens behind the last one change nothing (chunks of 16, 32 and 64 waste no
    part of a tile); weights W and momentum S [B,H,D,V] before the first. factor: of the
    error, 2 for a sum of squares. backend: "tpu" or "triton". Raises Refused for what
    the kernel does not do.
    """
    (b, t, h, d), width = q.shape, v.shape[3]
    c = numbers.moved.shape[-1]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise Refused(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of "
                      "bfloat16, float16, float32 for all three")
    if c > TILES[-1]:
        raise Refused(f"chunk={c}: at most {TILES[-1]}")
    for name, n in (("D", d), ("V", width)):
        if n > WIDEST:
            raise Refused(f"{name}={n}: at most {WIDEST}")
    check_device(backend, (q, k, v), interpret)
    if interpret and backend == "triton" and jax.config.read("jax_enable_x64"):
        raise Refused("interpreted under jax_enable_x64: jax's interpreter mixes its "
                      "integers of 32 and 64 bits")
    sizes = {"B": b, "T": t, "H": h, "D": d, "V": width, "N": -(-t // c), "C": c,
             "E": c + 1}
    check_arrays(
        sizes, k=(k, FLOAT, "B T H D"), v=(v, FLOAT, "B T H V"),
        weights=(weights, FLOAT, "B H D V"), momentum=(momentum, FLOAT, "B H D V"),
        enter=(numbers.enter, FLOAT, "B H N E"),
        carry=(numbers.carry, FLOAT, "B H N E"),
        pair=(numbers.pair, FLOAT, "B H N E C"),
        held=(numbers.held, FLOAT, "B H N"), moved=(numbers.moved, FLOAT, "B H N C"),
    )
    vmem = tables.vmem(tables.device_kind(), backend)
    tile = next(n for n in TILES if n >= c)
    static = Static(t, c, tile, factor, vmem, backend, interpret)
    side = laid_out(numbers, tile, STEP // tile if backend == "tpu" else 1)
    return _memory(static, side, q, k, v, weights.astype(F32), momentum.astype(F32))


def _kernels(static: Static) -> Any:
    """The module with the passes of the call's backend."""
    return importlib.import_module(f"pallas_kernels.memory.{static.backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _memory(static: Static, side, q, k, v, weights, momentum):
    return _kernels(static).forward(static, side, q, k, v, weights, momentum, False)[:3]


@in_32_bits
def _ahead(static: Static, side, q, k, v, weights, momentum):
    after, run, o, *kept = _kernels(static).forward(
        static, side, q, k, v, weights, momentum, True)
    return (after, run, o), (side, q, k, v, kept)


@in_32_bits
def _back(static: Static, saved, cotangents):
    return _kernels(static).backward(static, *saved, *cotangents)


_memory.defvjp(_ahead, _back)
