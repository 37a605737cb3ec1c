"""Linear attention with decay, forward and backward, as a kernel.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t,    o_t = scale q_t S_t,    S [D,V] in float32

Tokens of a chunk meet directly, through a small masked matrix of q.k; chunks meet
through the state. The backward pass is the same recurrence from the other end: it
carries the gradient of the state, and makes each chunk again from q, k, v and the state
that the chunk began with. Everything is deterministic.

Sources: Qin et al., 2024, arXiv:2401.04658 (constant decay); Sun et al., 2023,
arXiv:2307.08621 (the chunked form); Yang et al., 2023, arXiv:2312.06635 (decays by
token and channel). Sorting the pairs of a chunk by the highest bit in which their
numbers differ, so that decays of channels need matrix products only and no exponent is
positive, is proposed here (`pallas_kernels/linear/chunk.py`).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, candidates, tables
from pallas_kernels.arrays import FLOAT, INT, check_arrays, check_heads
from pallas_kernels.linear.chunk import FLOOR
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.machine.product import F32
from pallas_kernels.padding import blank
from pallas_kernels.refusals import WIDEST, check_device
from pallas_kernels.tiles import LinearTpu, LinearTriton

DTYPES = (jnp.bfloat16, jnp.float32)


class Static(NamedTuple):
    """What is known of one call. ahead, back: numbers of the tile table, of the forward
    and of the backward pass; vmem: bytes of fast memory, on TPU; variant: candidates
    that the call asks for."""

    scale: float
    dtype: Any
    ahead: LinearTpu | LinearTriton
    back: LinearTpu | LinearTriton
    vmem: int
    backend: str
    interpret: Any
    variant: tuple[str, ...] = ()


@in_32_bits
def linear(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment: jax.Array | None = None,
    scale: float = 1.0,
    dtype: Any = F32,
    tile: tuple[int, ...] | None = None,
    variant: tuple[str, ...] = (),
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence over T tokens -> state [B,H,D,V] float32, o [B,T,H,V] `dtype`.

    q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] of one type; query head h reads key head
    h // (H/K). log_decay, at most 0: None, [H], [B,T,H] or [B,T,H,D]. state [B,H,D,V]
    is seen by tokens of segment 1. segment [B,T] int: 0 is padding, which writes
    nothing, does not decay, and whose output is 0; a new segment, they rise along the
    row, begins with an empty state. tile: the numbers of the tile table, or the first
    of them; variant: names of candidates (`pallas_kernels/candidates.py`). backend:
    "tpu" or "triton"; interpret: run on a CPU, slowly. Raises Refused for what the
    kernel does not do.
    """
    check(q, k, v, log_decay, state, segment)
    check_device(backend, (q, k, v), interpret)
    q, k, v = blank(segment, q, k, v)
    if log_decay is not None and log_decay.ndim > 1:
        log_decay, = blank(segment, log_decay)
    (b, t, h, d), width = q.shape, v.shape[3]
    channels = log_decay is not None and log_decay.ndim == 4
    device = tables.device_kind()
    shape = tables.Shape(t, t, d, width, q.dtype.itemsize)

    def numbers(which):
        return tables.chunks(device, which, shape, channels, tile, backend)

    static = Static(
        float(scale), jnp.dtype(dtype), numbers("linear_forward"),
        numbers("linear_backward"), tables.vmem(device, backend), backend, interpret,
        candidates.checked(backend, "linear", variant),
    )
    if log_decay is not None and not channels:
        log_decay = jnp.maximum(log_decay.astype(F32), FLOOR)
    flags = None if segment is None else flagged(segment)
    if flags is not None and not channels:
        log_decay = _broken(log_decay, flags, h)
    if state is None:
        state = jnp.zeros((b, h, d, width), F32)
    turned = state.astype(F32).swapaxes(2, 3)
    turned, o = _linear(static, flags, q, k, v, log_decay, turned)
    return turned.swapaxes(2, 3), o


def check(q, k, v, log_decay, state, segment) -> None:
    """Raises Refused for widths and types that no kernel takes, ValueError for arrays
    that do not go together."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise Refused(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: bfloat16 or "
                      "float32 for all three")
    for name, n in (("D", q.shape[3]), ("V", v.shape[3])):
        if n > WIDEST:
            raise Refused(f"{name}={n}: at most {WIDEST}")
    if min(q.shape) < 1:
        raise Refused(f"q has shape {q.shape}: it holds nothing")
    (b, t, h, d), heads = q.shape, k.shape[2]
    check_arrays(
        {"B": b, "T": t, "H": h, "D": d, "K": heads, "V": v.shape[3]},
        k=(k, FLOAT, "B T K D"), v=(v, FLOAT, "B T K V"),
        log_decay=(log_decay, FLOAT, "H", "B|1 T H", "B T H D"),
        state=(state, FLOAT, "B H D V"), segment=(segment, INT, "B|1 T"),
    )
    check_heads(h, k=heads)


def flagged(segment: jax.Array) -> jax.Array:
    """[B,T] int32: 0 for padding, 2 for the first token of a segment, 1 for others."""
    segment = segment.astype(jnp.int32)
    first = jnp.ones_like(segment[:, :1])
    present = jax.lax.cummax(jnp.concatenate([first, segment[:, :-1]], 1), axis=1)
    return jnp.where(segment > 0, jnp.where(segment != present, 2, 1), 0)


def _broken(g, flags, h: int) -> jax.Array:
    """Log decays [B,T,H] that forget all where a segment begins, nothing at padding."""
    flags = flags[:, :, None]
    g = jnp.zeros((1, 1, h), F32) if g is None else g if g.ndim == 3 else g[None, None]
    return jnp.where(flags == 1, g, jnp.where(flags == 2, FLOOR, 0.0))


def _kernels(static: Static) -> Any:
    """The module with `forward` and `backward` of the call's backend."""
    return importlib.import_module(f"pallas_kernels.linear.{static.backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _linear(static: Static, flags, q, k, v, g, state):
    """The turned state [B,H,V,D] and o."""
    return _kernels(static).forward(static, flags, q, k, v, g, state, save=False)[:2]


@in_32_bits
def _ahead(static: Static, flags, q, k, v, g, state):
    after, o, begun = _kernels(static).forward(static, flags, q, k, v, g, state,
                                               save=True)
    return (after, o), (flags, q, k, v, g, state, begun)


@in_32_bits
def _back(static: Static, saved, cotangents):
    flags, q, k, v, g, state, begun = saved
    d_state, do = cotangents
    dq, dk, dv, dg, d_before = _kernels(static).backward(
        static, flags, q, k, v, g, state, begun, d_state.astype(F32),
        do.astype(q.dtype))
    if g is not None and g.ndim == 1:
        dg = dg.sum((0, 1))
    dg = None if g is None else dg.astype(g.dtype)
    return None, dq, dk, dv, dg, d_before


_linear.defvjp(_ahead, _back)
