"""Attention to chosen key blocks, forward and backward, as a kernel.

Each block of queries attends to the key blocks that an index array names; what it names
is data, so nothing is known before the run. The forward pass and dq fetch the chosen
blocks of a query block; dk and dv come from the inverse lists, which query blocks chose
a key block, so that no sum depends on an order of arrival. Work and traffic grow with
the number of blocks chosen.

Sources: the index form of block-sparse attention in Dao et al., 2022, arXiv:2205.14135;
the online softmax is that of `pallas_kernels/flash/api.py`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, tables
from pallas_kernels.arrays import INT, check_arrays, check_pairs
from pallas_kernels.logits import LogitSpec, Where
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.refusals import DTYPES, WIDEST, check_device, check_elementwise
from pallas_kernels.tile import TileSpec, base_and_factor, lse_of, unit_of
from pallas_kernels.tiles import FlashTriton

LISTED = 2**17  # entries of the lists of one head that fit beside the scalar unit


class Static(NamedTuple):
    """What is known of one call: `heads` share what they chose, in `n` query blocks of
    `size`; keys in blocks of `block`; T and S tokens. tiles: of the forward pass, of dq
    and of dk and dv, on GPU; vmem: bytes of fast memory that a kernel may use, on TPU.
    """

    form: TileSpec
    block: int
    n: int
    size: int
    t: int
    s: int
    heads: int
    tiles: tuple[FlashTriton, ...]
    vmem: int
    backend: str
    interpret: Any


class Side(NamedTuple):
    """Arrays of a call without a gradient; None for what it does not use.

    chosen [B,C,N,n] with C = H / heads; head [H]: global head numbers; q_pos, q_segment
    [B,T], kv_pos, kv_segment [B,S], int32.
    """

    chosen: Any
    head: Any
    q_pos: Any
    kv_pos: Any
    q_segment: Any
    kv_segment: Any


def blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chosen: jax.Array,
    spec: LogitSpec = LogitSpec(None),
    where: Where = Where(),
    *,
    block: int,
    tile: tuple[int, ...] | None = None,
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to chosen blocks -> o [B,T,H,V] in v's dtype, lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; chosen [B,H|K,N,n] int32: key blocks of
    `block` tokens for each of N blocks of ceil(T/N) queries, -1 for none; one that is
    named twice counts twice. spec, where: see `pallas_kernels.logits`; the mask acts
    inside blocks, positions count from 0, of queries too, kv_pos is [B|1,S], and there
    is no softcap, score or shift. backend: "tpu" or "triton"; tile: rows and keys of a
    tile, on GPU. Raises Refused for what the kernel does not do.
    """
    b, t, h, d = q.shape
    s, n, c = k.shape[1], chosen.shape[2], chosen.shape[1]
    _check(q, k, v, chosen, spec, where, backend)
    check_pairs(segment=(where.q_segment, where.kv_segment))
    sizes = {"B": b, "T": t, "H": h, "S": s, "K": k.shape[2]}
    check_arrays(
        sizes, chosen=(chosen, INT, "B H|K N n"), head=(where.head, INT, "H"),
        q_pos=(where.q_pos, INT, "B|1 T"), kv_pos=(where.kv_pos, INT, "B|1 S"),
        q_segment=(where.q_segment, INT, "B|1 T"),
        kv_segment=(where.kv_segment, INT, "B|1 S"))
    size, heads = -(-t // n), h // c
    check_device(backend, (q, k, v), interpret)

    def whole(a, m):
        return None if a is None else jnp.broadcast_to(a, (b, m)).astype(jnp.int32)

    head = jnp.arange(h) if where.head is None else where.head
    scale = d**-0.5 if spec.scale is None else spec.scale
    unit = unit_of(scale, None)
    static = Static(
        TileSpec(spec.mask, scale, unit=unit),
        block, n, size, t, s, heads,
        () if backend == "tpu" else _tiles(q, k, v, chosen, block, tile, backend),
        tables.vmem(tables.device_kind(), backend), backend, interpret,
    )
    side = Side(chosen.astype(jnp.int32), head.astype(jnp.int32),
                whole(where.q_pos, t), whole(where.kv_pos, s),
                whole(where.q_segment, t), whole(where.kv_segment, s))
    o, m, l = _blocks(static, side, q, k, v)
    m = jax.lax.stop_gradient(m) * (1 / unit)
    return o, lse_of(m, l).transpose(0, 2, 1)


def _check(q, k, v, chosen, spec, where, backend) -> None:
    """Raises Refused for what the kernel does not do."""
    if spec.softcap is not None or spec.score is not None or where.shift:
        raise Refused("chosen blocks have logits without a softcap or a score, and "
                      "queries without a shift")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise Refused(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of "
                      "bfloat16, float16, float32 for all three")
    for name, n in (("D", q.shape[3]), ("V", v.shape[3])):
        if n > WIDEST:
            raise Refused(f"{name}={n}: at most {WIDEST}")
    if not chosen.shape[3]:
        raise Refused(f"chosen has no places: its shape is {chosen.shape}")
    entries = chosen[0].size // k.shape[2]
    if backend == "tpu" and entries > LISTED:
        raise Refused(f"{entries} chosen blocks a key head: at most {LISTED}")
    check_elementwise("mask", spec.mask)


def _tiles(q, k, v, chosen, block: int, tile, backend: str):
    """Tiles of the forward pass, for dq, and for dk and dv: rows are tokens times the
    heads that share a choice, of one query block or of all that chose a key block."""
    (_, t, h, d), (_, c, n, most) = q.shape, chosen.shape
    one, every = -(-t // n) * (h // c), t * (h // k.shape[2])

    def pick(which, rows, columns):
        return tables.tile(
            tables.device_kind(), f"blocks_{which}",
            tables.Shape(rows, columns, d, v.shape[3], q.dtype.itemsize), tile, backend)

    return (pick("forward", one, most * block), pick("backward", one, most * block),
            pick("backward", every, block))


def _kernels(static: Static) -> Any:
    """The module with the passes of the call's backend."""
    return importlib.import_module(f"pallas_kernels.blocks.{static.backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _blocks(static: Static, side: Side, q, k, v):
    return _ahead(static, side, q, k, v)[0]


@in_32_bits
def _ahead(static: Static, side: Side, q, k, v):
    o, m, l = _kernels(static).forward(static, side, q, k, v)  # m, l [B,T,H]
    return (o, m, l), (side, q, k, v, o, m, l)


@in_32_bits
def _back(static: Static, saved, cotangents):
    side, q, k, v, o, m, l = saved
    do, _, dl = cotangents
    do = do.astype(jnp.float32)
    # d(log l) = l d(l) enters exactly where delta leaves
    delta = (do * o.astype(jnp.float32)).sum(-1) - l * dl
    base, factor = base_and_factor(m, l, static.form.unit)
    args = q, k, v, base, delta * factor, (do * factor[..., None]).astype(v.dtype)
    passes = _kernels(static)
    lists = inverse(side.chosen, k.shape[2], -(-static.s // static.block))
    dq = passes.queries_backward(static, side, *args)
    return None, dq, *passes.keys_backward(static, side, lists, *args)


def inverse(chosen: jax.Array, heads: int, many: int):
    """Which query blocks chose each key block: entries [B,K,E] and first [B,K,many+1].

    chosen [B,C,N,n] -> an entry is the number c * N + n of a query block among those of
    a key head's C/K; key block j has the entries first[j] to first[j + 1], in order.
    """
    b, c, n, each = chosen.shape
    flat = chosen.reshape(b, heads, -1)  # [B,K,C/K*N*n]
    where = jnp.where((flat >= 0) & (flat < many), flat, many)  # `many`: none
    order = jnp.argsort(where, axis=-1, stable=True)  # in order of query blocks
    ordered = jnp.take_along_axis(where, order, -1)
    edges = jnp.arange(many + 1, dtype=jnp.int32)
    first = jax.vmap(jax.vmap(lambda a: jnp.searchsorted(a, edges)))(ordered)
    return (order // each).astype(jnp.int32), first.astype(jnp.int32)


_blocks.defvjp(_ahead, _back)
