"""Softmax over every prefix, forward and backward, as a kernel.

A head's scores do not depend on who asks, so token t's answer is a recurrence over the
state (m, u, w): the greatest score, the sum of exp(s - m), that of v exp(s - m). In a
chunk all prefixes come from one triangular matrix P[t,i] = exp(s_i - m_t) of exponents
<= 0 and a product P v; between chunks the state is carried. The backward pass reads the
chunks from the last to the first and hands on what later tokens ask for.

Source: Feng et al., 2024, arXiv:2405.13956; the passes in chunks and the reverse scan
are proposed here.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Refused, tables
from pallas_kernels.arrays import FLOAT, INT, check_arrays, check_heads
from pallas_kernels.machine.bits import in_32_bits
from pallas_kernels.machine.product import F32, NN, NT, dot
from pallas_kernels.padding import blank
from pallas_kernels.refusals import DTYPES, WIDEST, check_device


class Static(NamedTuple):
    """What is known of one call: tokens of a chunk, the type of o, where it runs."""

    chunk: int
    dtype: Any
    backend: str
    interpret: Any


class Saved(NamedTuple):
    """What the backward pass needs: m, u [B,H,T] after each token, and what chunks
    begin with, m_in, u_in [B,H,N], w_in [B,H,N,V], segment_in [B,N] (None: one
    segment)."""

    m: Any
    u: Any
    m_in: Any
    u_in: Any
    w_in: Any
    segment_in: Any


@in_32_bits
def scan(
    scores: jax.Array,
    v: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array],
    *,
    segment: jax.Array | None = None,
    dtype: Any = jnp.float32,
    chunk: int | None = None,
    backend: str = "tpu",
    interpret: Any = False,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """((m, u, w) after the last token, o [B,T,H,V] in `dtype`).

    scores [B,T,H], v [B,T,K,V] with H a multiple of K; state: m, u [B,H] and w [B,H,V]
    float32, seen by tokens of segment 1. segment [B,T]: rising from 1, a new segment
    begins anew; 0 is padding, whose o is 0. m is a constant for the gradient. backend:
    "tpu" or "triton"; chunk: tokens at once. Raises Refused for what the kernel does
    not do.
    """
    if v.dtype not in DTYPES or dtype not in DTYPES:
        raise Refused(f"v is {v.dtype}, o {jnp.dtype(dtype)}: expected bfloat16, "
                      "float16 or float32")
    if v.shape[3] > WIDEST:
        raise Refused(f"V={v.shape[3]}: at most {WIDEST}")
    (b, t, heads, width), h = v.shape, scores.shape[-1]
    check_arrays(
        {"B": b, "T": t, "H": h, "V": width}, scores=(scores, FLOAT, "B T H"),
        segment=(segment, INT, "B|1 T"), m=(state[0], FLOAT, "B H"),
        u=(state[1], FLOAT, "B H"), w=(state[2], FLOAT, "B H V"),
    )
    check_heads(h, v=heads)
    check_device(backend, (v, scores), interpret)
    scores, v = blank(segment, scores, v)
    short = 128 if backend == "tpu" else 16
    shape = tables.Shape(t, t, width, width, v.dtype.itemsize)
    size = chunk or min(
        tables.chunks(tables.device_kind(), "scan", shape, backend=backend).chunk,
        -(-t // short) * short)
    if backend == "triton":
        size = max(1 << (size - 1).bit_length(), 16)
    static = Static(size, jnp.dtype(dtype), backend, interpret)
    code = None
    if segment is not None:
        # the segment at each token or, negative, before it where it is padding
        present = jnp.maximum(jax.lax.cummax(segment.astype(jnp.int32), axis=1), 1)
        code = jnp.where(segment > 0, present, -present)
    m, u, w = (a.astype(F32) for a in state)
    return _scan(static, code, scores.astype(F32), v, m, u, w)


def _kernels(static: Static) -> Any:
    """The module with the passes of the call's backend."""
    return importlib.import_module(f"pallas_kernels.scan.{static.backend}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@in_32_bits
def _scan(static: Static, code, s, v, m, u, w):
    return _ahead(static, code, s, v, m, u, w)[0]


@in_32_bits
def _ahead(static: Static, code, s, v, m, u, w):
    last, o, saved = _kernels(static).forward(static, code, s, v, m, u, w)
    return (last, o), (code, s, v, saved)


@in_32_bits
def _back(static: Static, kept, cotangents):
    code, s, v, saved = kept
    (_, du, dw), do = cotangents
    if code is not None:
        do = jnp.where(code[..., None, None] > 0, do, 0)  # o of padding is 0
    ds, dv, (g, h) = _kernels(static).backward(static, code, s, v, saved, do, du, dw)
    # what the first chunk asks of those before it, as the state is measured
    first = saved.m[:, :, 0]
    share = exp_diff(saved.m_in[:, :, 0], first)
    if code is not None:
        share = jnp.where(jnp.abs(code[:, :1]) == 1, share, 0)
    du, dw = -share * h, share[..., None] * g
    return None, ds, dv, jnp.zeros_like(du), du, dw


_scan.defvjp(_ahead, _back)


def exp_diff(a, m):
    """exp(a - m) for a <= m, and 0 where both are -inf."""
    return jnp.exp(a - jnp.where(m == -jnp.inf, 0.0, m))


def weights(s, m, seen):
    """P = exp(s - m) of a tile, 0 where not seen."""
    return exp_diff(jnp.where(seen, s, -jnp.inf), m)


def inverse(u, code):
    """1/u, 0 for padding and where nothing was seen."""
    real = u > 0 if code is None else (u > 0) & (code > 0)
    return jnp.where(real, 1 / jnp.where(real, u, 1.0), 0.0)


def score_gradients(p, a, r, share, before, u_in):
    """ds, P r and delta of a tile [i,t] of P and a = v_i.do_t; the rest [1,t]: r = 1/u,
    the share of the state that came in, its w.do, and its u [1,1].

    Where one token has nearly all of the weight, a - delta is a small difference: both
    are measured from a of the token with the greatest score.
    """
    # ds = P (a - delta), delta = sum_i P a + what came in
    top = p == 1  # where the greatest score is
    many = jnp.maximum(top.astype(F32).sum(0, keepdims=True), 1.0)
    level = jnp.where(top, a, 0.0).sum(0, keepdims=True) / many  # [1,t]
    a, p = a - level, p * r
    delta = (p * a).sum(0, keepdims=True) + share * r * (before - level * u_in)
    return p * (a - delta), p, level + delta


def weighted(p, v):
    """p v into float32, with float32 weights p: a narrower v is exact, and p goes in
    two halves of its type."""
    if v.dtype == F32:
        return dot(p, v, NN)
    high = p.astype(v.dtype)
    low = (p - high.astype(F32)).astype(v.dtype)  # what rounding left
    return dot(high, v, NN) + dot(low, v, NN)


def product(a, b):
    """a b^T, in the wider type of the two."""
    if a.dtype != b.dtype:
        a, b = a.astype(F32), b.astype(F32)
    return dot(a, b, NT)
