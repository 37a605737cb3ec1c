"""Template: one form for whatever lets the tokens of a sequence meet.

    Y = N(P(X)),    P(X) = A(X) V(X)

A [L,L] says how much of each token goes to each other one, V(X) is X or a projection of
it, N a normalisation. Models of long sequences differ in where A comes from (learned,
Fourier, a convolution, a kernel of q and k, a recurrence) and in whether it can be
applied without being written down. Every attention of this library and every mixer of
`attn/mixers.py` says its own row of that table in its class; `row` reads it, and
`matrix(attention, q, k)` writes A down, to look at and for tests.

The template is proposed here after "A Unified View of Long-Sequence Models towards
Modeling Million-Scale Dependencies", of which abstract and symbols were read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.attention import EXACT, MASKED, TemplateRow
from attn.masks import Causal, Full, Mask, tiles


def row(mixer: Any) -> TemplateRow:
    """The row of an attention or mixer. ValueError for one that has none."""
    found = getattr(mixer, "row", None)
    if found is None:
        name = type(mixer).__name__
        raise ValueError(f"{name} has no row: expected `row` in its class")
    if found.kind == EXACT and mixer.visible not in (Causal(), Full()):
        return TemplateRow(MASKED, "visible pairs times D", _power(mixer.visible))
    return found


def _power(mask: Mask) -> float:
    """How the visible pairs grow with L, counted in tiles at two lengths."""
    def visible(n: int) -> int:
        first = 64 * np.arange(n)  # tiles of 64 tokens
        return len(tiles(mask, (first, first + 63), (first, first + 63)))

    # visible pairs grow by 2^p with twice the length
    return float(np.round(np.log2(visible(256) / visible(128)), 1))


def matrix(attention: Any, q: jax.Array, k: jax.Array, *, width: int = 1,
           **options: Any) -> jax.Array:
    """A [B,H,V,T,S] of an attention f(q, k, v): o[b,t,h,c] = sum_s A[b,h,c,t,s]
    v[b,s,h,c] for V = `width`, if it is linear in v, channel by channel.

    q [B,T,H,D], k [B,S,H,D]. A key's column is what the attention gives for values of 1
    at that key and 0 elsewhere. All attentions here are linear in v but `Delta`, whose
    V(X) is silu(conv(v)), learned memories (`Titans`, `Miras`), `SEA` and `ABC`, whose
    A is made of v too, `LongShort`, which norms v, `S4D`, with a gelu, and
    `Relative(by_value=True)`, which adds to v; channels of v share A in all but `RAT`,
    whose gates are of channels.
    """
    b, s, heads = k.shape[:3]
    if heads != q.shape[2]:
        raise ValueError(f"k has K={heads} heads: expected H={q.shape[2]}")

    def column(one: jax.Array) -> jax.Array:
        shape = b, s, heads, width
        # 1 at one key, 0 elsewhere: [S] -> [B,S,H,V]
        v = jnp.broadcast_to(one[None, :, None, None], shape)
        return attention(q, k, v, **options)

    # [S,B,T,H,V] -> [B,H,V,T,S]
    return jnp.moveaxis(jax.vmap(column)(jnp.eye(s, dtype=q.dtype)), (0, 2), (4, 3))
