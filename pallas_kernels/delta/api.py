"""The delta rule, with and without decay, forward and backward, as a kernel.

    S' = exp(g_t) S_{t-1},  u_t = beta_t (v_t - k_t S'),  S_t = S' + k_t^T u_t,
    o_t = scale q_t S_t

Inside a chunk of 64 tokens every u depends on those before it, by a lower triangular
system that is inverted on the chip; the state travels from chunk to chunk in float32.
What a token decays, and which tokens belong together, is worked out before the kernel
as eight numbers a token and head, so that its gradient is XLA's: the kernel returns the
gradient of these numbers. Decays of key channels come as they are; their sums are made
in the kernel (`pallas_kernels/delta/channels.py`). The backward pass reads the states
that chunks begin with, and passes from the last chunk to the first. No atomics: the
same bits each time.

Sources: the chunked form of DeltaNet (Yang et al., 2024, arXiv:2406.06484), Gated
DeltaNet (Yang et al., 2024, arXiv:2412.06464) and, for channels, Kimi Delta Attention
(Kimi team, 2025, arXiv:2510.26692); the gradients are derived here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, candidates, tables
from pallas_kernels.arrays import FLOAT, INT, check_arrays, check_heads
from pallas_kernels.delta.chunk import CHUNK, ROWS, Side
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.padding import blank
from pallas_kernels.refusals import DTYPES, WIDEST, check_channels, check_device
from pallas_kernels.tiles import DeltaTriton

F32 = jnp.float32
KERNELS = "inside", "forward", "backward", "values", "keys"  # on GPU
APART = "inside", "keys"  # those with tiles of their own where channels decay
FLOOR = -128.0  # exp of it is 0 in float32, so a log decay below it says nothing more


class Static(NamedTuple):
    """What is known of one call: T tokens; gated: whether heads decay; channels:
    whether channels of keys do; tiles: on GPU, of the two kernels of the forward pass
    and the three of the backward pass, rows and columns of the state; pieces: chunks of
    a grid step, and vmem: bytes of fast memory that a kernel may use, on TPU; variant:
    candidates that the call asks for."""

    t: int
    scale: float
    gated: bool
    channels: bool
    tiles: tuple[DeltaTriton, ...]
    pieces: int
    vmem: int
    backend: str
    interpret: Any
    variant: tuple[str, ...] = ()


def delta(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment: jax.Array | None = None,
    scale: float = 1.0,
    tile: tuple[int, ...] | None = None,
    variant: tuple[str, ...] = (),
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The rule over T tokens -> state [B,H,D,V] float32, o [B,T,H,V] in v's dtype.

    beta [B,T,H]; q, k [B,T,.,D] and v [B,T,.,V] have a number of heads that divides H;
    log_decay None, [H], [B,T,H] or, of each channel of the key, [B,T,H,D], at most 0;
    state [B,H,D,V]: None for zeros; segment [B,T]: 0 is padding, a new number begins
    with an empty state, 1 sees `state`.
    backend: "tpu" or "triton"; tile: chunks of a grid step on TPU; columns of the
    state, warps and stages on GPU; variant: names of candidates
    (`pallas_kernels/candidates.py`). Raises Refused for what the kernel does not do.
    """
    check_arrays(dict(zip("BT", q.shape)), beta=(beta, FLOAT, "B T H"))
    (b, t, h), (d, width) = beta.shape, (q.shape[3], v.shape[3])
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise Refused(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one of "
                      "bfloat16, float16, float32 for all three")
    for name, n in (("D", d), ("V", width)):
        if n > WIDEST:
            raise Refused(f"{name}={n}: at most {WIDEST}")
    check_arrays(
        {"B": b, "T": t, "H": h, "D": d, "V": width},
        q=(q, FLOAT, "B T Q D"), k=(k, FLOAT, "B T K D"), v=(v, FLOAT, "B T W V"),
        log_decay=(log_decay, FLOAT, "H", "B T H", "B T H D"),
        state=(state, FLOAT, "B H D V"), segment=(segment, INT, "B|1 T"),
    )
    check_heads(h, q=q.shape[2], k=k.shape[2], v=v.shape[2])
    check_device(backend, (q, k, v), interpret)
    if t == 1:
        return _alone(q, k, v, beta, log_decay, segment, state=state, scale=scale,
                      tile=tile, variant=variant, backend=backend,
                      interpret=interpret)
    q, k, v = blank(segment, q, k, v)  # `sides` does the same to the rest
    if interpret and backend == "triton" and jax.config.read("jax_enable_x64"):
        raise Refused("interpreted under jax_enable_x64: jax's interpreter mixes its "
                      "integers of 32 and 64 bits")
    if state is None:
        state = jnp.zeros((b, h, d, width), F32)
    g, gated = None, log_decay is not None
    if log_decay is not None and log_decay.ndim == 4:
        # of channels: the chunks' numbers then only say which tokens belong together
        check_channels(backend)
        g, = blank(segment, log_decay.astype(F32))
        g, log_decay, gated = jnp.maximum(g, FLOOR), None, False
    heads, channels = b * h, g is not None
    static = Static(
        t, scale, gated, channels, *_tiles(q, v, heads, channels, tile, backend),
        tables.vmem(tables.device_kind(), backend), backend, interpret,
        candidates.checked(backend, "delta", variant))
    side = sides(beta, log_decay, segment, static.pieces * CHUNK)
    return _delta(static, side, q, k, v, g, state.astype(F32))


def _alone(q, k, v, beta, log_decay, segment, **options):
    """`delta` of one token, with padding behind it: of what `sides` makes of a single
    token, XLA's GPU compiler makes a fusion that it fails to translate (jax 0.10.2,
    0.11.2 and 0.12.0)."""
    def padded(a):
        return jnp.pad(a, [(0, 0), (0, 1)] + [(0, 0)] * (a.ndim - 2))

    segment = jnp.ones((1, 1), jnp.int32) if segment is None else segment
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = padded(log_decay)
    q, k, v, beta, segment = map(padded, (q, k, v, beta, segment))
    state, o = delta(q, k, v, beta, log_decay, segment=segment, **options)
    return state, o[:, :1]


def _tiles(q, v, heads, channels, tile, backend) -> tuple[tuple[DeltaTriton, ...], int]:
    """Tiles of the kernels on GPU, and chunks of a grid step on TPU."""
    device, width = tables.device_kind(), v.shape[3]
    shape = tables.Shape(q.shape[3], width, q.shape[3], width, q.dtype.itemsize)
    if backend == "tpu":
        most = tables.chunks(device, "delta", shape, override=tile and tile[:1]).chunks
        return (), min(most, -(-q.shape[1] // CHUNK))
    ask = None if tile is None else (CHUNK, *tile)
    names = [f"{kind}_channels" if channels and kind in APART else kind
             for kind in KERNELS]
    found = [tables.tile(device, f"delta_{name}", shape, ask, backend)
             for name in names]
    if tile is None:
        # what passes over the chunks takes fewer columns where processors would idle
        found[1:3] = (_narrowed(a, width, heads) for a in found[1:3])
    if channels and shape.d > 128:
        # of three arrays of keys and queries a chunk there is no room for the next ones
        found[1:3] = (dataclasses.replace(a, num_stages=1) for a in found[1:3])
    return tuple(found), 1


def _narrowed(tile: DeltaTriton, width: int, heads: int) -> DeltaTriton:
    columns = tile.block_v
    while columns > 16 and 2 * heads * -(-width // columns) <= tables.cores():
        columns //= 2
    return dataclasses.replace(tile, block_v=columns)


def sides(beta, log_decay, segment, step: int) -> jax.Array:
    """What a chunk's tokens are beside q, k and v [B,H,N,ROWS,CHUNK] float32, see
    `chunk.Side`; T is padded to a multiple of `step`."""
    b, t, h = beta.shape
    segment = jnp.ones((1, t), jnp.int32) if segment is None else segment
    segment = jnp.pad(segment, ((0, 0), (0, -t % step)))

    def split(a):
        return a.reshape(a.shape[0], -1, CHUNK, a.shape[2]).transpose(0, 3, 1, 2)

    def real(a):
        there = (segment > 0)[..., None]
        a = jnp.pad(a.astype(F32), ((0, 0), (0, -t % step), (0, 0)))
        return split(jnp.where(there, a, 0))

    shape = b, h, segment.shape[1] // CHUNK, CHUNK
    coarse = fine = later = jnp.zeros((1, 1, *shape[2:]), F32)
    if log_decay is not None:
        g = jnp.maximum(log_decay.astype(F32), FLOOR)
        coarse, fine, later = _clocks(real(jnp.broadcast_to(g, beta.shape)))
    # the segment of the last token before that is no padding; 1 where there is none
    before = jnp.pad(segment, ((0, 0), (1, 0)), constant_values=1)
    present = jax.lax.cummax(before, axis=1)
    first, last = (
        a[:, None, :, None] for a in (present[:, :-1:CHUNK], present[:, CHUNK::CHUNK]))
    r = split(segment[..., None])

    def of(a):
        return (r == a) & (r > 0)

    def end(a):
        return a[..., -1:]

    # the state that a chunk begins with belongs to the segment before it
    enter = jnp.where(of(first), jnp.exp(coarse + fine), 0)
    keep = jnp.where(first == last, jnp.exp(end(coarse) + end(fine)), 0)
    keep = jnp.pad(keep, ((0, 0), (0, 0), (0, 0), (0, CHUNK - 1)))
    found = Side(real(beta), coarse, fine, r.astype(F32), enter,
                 jnp.where(of(last), jnp.exp(later), 0), keep)
    rows = [jnp.broadcast_to(a, shape) for a in found]
    return jnp.stack(rows + [jnp.zeros(shape, F32)] * (ROWS - len(rows)), 3)


def _clocks(g) -> tuple[jax.Array, ...]:
    """Log decays from the chunk's beginning to a token, itself included: multiples of
    1/256, whose sums are exact, and a small rest, so that the decay of two neighbours
    stays exact behind one that decays strongly; and from behind a token to the end."""
    # the gradient goes by the rest: step and rest are g, and step is a constant
    step = jax.lax.stop_gradient(jnp.round(g * 256) / 256)
    behind = jnp.pad(g[..., 1:], ((0, 0),) * 3 + ((0, 1),))
    return (jnp.cumsum(step, 3), jnp.cumsum(g - step, 3),
            jax.lax.cumsum(behind, 3, reverse=True))


def _kernels(static: Static) -> Any:
    """The module with the passes of the call's backend."""
    return importlib.import_module(f"pallas_kernels.delta.{static.backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _delta(static: Static, side, q, k, v, g, state):
    return _kernels(static).forward(static, side, q, k, v, g, state, False)[:2]


@in_32_bits
def _ahead(static: Static, side, q, k, v, g, state):
    final, o, *kept = _kernels(static).forward(static, side, q, k, v, g, state, True)
    return (final, o), (side, q, k, v, g, kept)


@in_32_bits
def _back(static: Static, saved, cotangents):
    side, q, k, v, g, kept = saved
    d_final, do = cotangents
    found = _kernels(static).backward(static, side, q, k, v, g, kept, d_final, do)
    d_side, dq, dk, dv, dg, d_state = found

    # over the heads that share a query or key head
    def share(a, like):
        heads = a.reshape(*like.shape[:3], -1, like.shape[3])
        return heads.sum(3).astype(like.dtype)

    return d_side, share(dq, q), share(dk, k), share(dv, v), dg, d_state


_delta.defvjp(_ahead, _back)
