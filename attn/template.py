"""Template: one form for whatever lets the tokens of a sequence meet.

    Y = N(P(X)),    P(X) = A(X) V(X)

A [L,L] says how much of each token goes to each other one, V(X) is X or a projection of
it, N a normalisation. Models of long sequences differ in where A comes from (learned,
Fourier, a convolution, a kernel of q and k, a recurrence) and in whether it can be
applied without being written down. `TEMPLATE` is that table, with a row for every
attention of this library and for the mixers of `attn/mixers.py`; `matrix(attention, q,
k)` writes A down, to look at and for tests.

The template is proposed here after "A Unified View of Long-Sequence Models towards
Modeling Million-Scale Dependencies", of which abstract and symbols were read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks import Causal, Full, Mask, tiles


class Row(NamedTuple):
    """A row of the table: where A comes from; the cost of applying it in tokens L,
    channels D, features m, rank r, window or kernel w, block b; its power of L, of a
    call on all tokens with default settings (a logarithm counts as 0)."""

    kind: str
    cost: str
    power: float


STATIC, FOURIER, CONV = "static, dense", "static, Fourier", "static, convolution"
EXACT, FACTORS = "kernel, exact", "kernel, in factors"
LOW, MASKED, RECURRENT = "low rank", "masked", "recurrent or pooling"
TEMPLATE: dict[str, Row] = {
    "Static": Row(STATIC, "L^2 D", 2),
    "FNet": Row(FOURIER, "L D log(L D)", 1),
    "LongConv": Row(CONV, "L D log L", 1),
    "Depthwise": Row(CONV, "L w D", 1),
    "BaseConv": Row(CONV, "L w D", 1),
    "MeanPool": Row(RECURRENT, "L D", 1),
    "Softmax": Row(EXACT, "L^2 D", 2),
    "LinearTransformer": Row(FACTORS, "L m D", 1),
    "Based": Row(FACTORS, "L m D", 1),
    "Flow": Row(FACTORS, "L m D", 1),
    "Essa": Row(FACTORS, "L m D", 1),
    "Linformer": Row(LOW, "L r D", 1),
    "RAT": Row(LOW, "L^2 D / b", 2),
    "Landmark": Row(MASKED, "L^2 D, or L^2 D / b + L r b D for r blocks", 2),
    "SnapKV": Row(MASKED, "L^2 D, then r D a token", 2),
    "Lightning": Row(RECURRENT, "L m D", 1),
    "RetNet": Row(RECURRENT, "L m D", 1),
    "GLA": Row(RECURRENT, "L m D", 1),
    "LightNet": Row(RECURRENT, "L m D", 1),
    "Delta": Row(RECURRENT, "L m D", 1),
    "Aaren": Row(RECURRENT, "L D", 1),
}


def row(mixer: Any) -> Row:
    """The row of an attention or mixer. ValueError for one that has none."""
    name = type(mixer).__name__
    if name not in TEMPLATE:
        raise ValueError(f"{name} has no row: expected one of {sorted(TEMPLATE)}")
    if name == "Softmax" and mixer.mask not in (Causal(), Full()):
        return Row(MASKED, "visible pairs times D", _power(mixer.mask))
    return TEMPLATE[name]


def _power(mask: Mask) -> float:
    """How the visible pairs grow with L, counted in tiles at two lengths."""
    def visible(n: int) -> int:
        first = 64 * np.arange(n)
        return len(tiles(mask, (first, first + 63), (first, first + 63)))

    return float(np.round(np.log2(visible(256) / visible(128)), 1))


def matrix(attention: Any, q: jax.Array, k: jax.Array, *, width: int = 1,
           **options: Any) -> jax.Array:
    """A [B,H,V,T,S] of an attention f(q, k, v): o[b,t,h,c] = sum_s A[b,h,c,t,s]
    v[b,s,h,c] for V = `width`, if it is linear in v, channel by channel.

    q [B,T,H,D], k [B,S,H,D]. A key's column is what the attention gives for values of 1
    at that key and 0 elsewhere. All attentions here are linear in v but `Delta`, whose
    V(X) is silu(conv(v)); channels of v share A in all but `RAT`, whose gates are of
    channels.
    """
    b, s, heads = k.shape[:3]
    if heads != q.shape[2]:
        raise ValueError(f"k has K={heads} heads: expected H={q.shape[2]}")

    def column(one: jax.Array) -> jax.Array:
        shape = b, s, heads, width
        v = jnp.broadcast_to(one[None, :, None, None], shape)
        return attention(q, k, v, **options)

    return jnp.moveaxis(jax.vmap(column)(jnp.eye(s, dtype=q.dtype)), (0, 2), (4, 3))
