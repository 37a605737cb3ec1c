"""Blocks: attention to chosen blocks of keys, the mechanism of sparse attention.

Keys are cut into blocks, queries into as many blocks as `chosen` has rows, and each
query block of each head attends exactly to the key blocks that were chosen for it. What
to choose is the idea of a method; gathering it, masking inside and the softmax are
here. Time and memory grow with the number of blocks chosen, not with S.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.contract.shapes import check
from attn.exact.chunked import check_given
from attn.masks import Full
from attn.sparse import chosen_tiles
from pallas_kernels.blocks import api as kernels
from pallas_kernels.logits import LogitSpec, Where


def gather(a: jax.Array, chosen: jax.Array, block: int) -> jax.Array:
    """The chosen blocks of a [B,S,K,X]: chosen [B,H,N,n] int32 -> [B,H,N,n,block,X].

    Query head h reads key head h // (H/K). What -1 names is some block: mask it.
    """
    b, h, rows, n = chosen.shape
    found = chosen_tiles.taken(
        chosen_tiles.by_blocks(a, block), chosen.reshape(b, h, rows * n))
    # [B,H,N n block,X] -> [B,H,N,n,block,X]
    return found.reshape(*chosen.shape, block, a.shape[3])


def distinct(chosen: jax.Array) -> jax.Array:
    """chosen [...,n] sorted, with every block once; -1 for the others, in front."""
    # sorted, the same blocks are neighbours; the second of two becomes -1
    chosen = jnp.sort(chosen, axis=-1)
    again = jnp.concatenate(
        [jnp.zeros_like(chosen[..., :1], bool), chosen[..., 1:] == chosen[..., :-1]], -1
    )
    return jnp.sort(jnp.where(again, -1, chosen), axis=-1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chosen: jax.Array,
    spec: LogitSpec = LogitSpec(Full()),
    where: Where = Where(),
    *,
    block: int,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to chosen blocks -> o [B,T,H,V] and lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; chosen [B,H|K,N,n] int32: the key blocks of
    `block` tokens for each of N blocks of ceil(T/N) queries, -1 for none. A block that
    is chosen twice counts twice: `distinct` comes first. The mask acts inside blocks;
    positions are 0, 1, ... by default, of queries too. A query that sees nothing gives
    o = 0 and lse = -inf. bias, of chosen's shape, is added to the logits of a block and
    has no gradient; kernels have none. implementation: "xla", "pallas" or None for the
    best; see `attn.contract.dispatch.pick`. NotImplementedError for a softcap or a
    score.
    """
    check(q, k, v, piece=True)
    _check(chosen, (*q.shape[:3], k.shape[2]), block)
    if bias is not None and bias.shape != chosen.shape:
        raise ValueError(f"bias has shape {bias.shape}: expected {chosen.shape}")
    check_given(q, k, where, None, None, None)
    for name in ("softcap", "score"):
        if (value := getattr(spec, name)) is not None:
            raise NotImplementedError(
                f"{name}={value}: chosen blocks have logits without one"
            )

    def kernel(backend: str) -> Callable:
        return lambda: kernels.blocks(
            q, k, v, chosen, spec, where, block=block, backend=backend,
            interpret=interpreted(),
        )

    def xla():
        return chosen_tiles.attend(q, k, v, chosen, spec, where, block, bias)

    if bias is not None:
        return pick(implementation, xla=xla)
    return pick(implementation, xla=xla, tpu=kernel("tpu"), gpu=kernel("triton"))


def _check(chosen, sizes: tuple, block: int) -> None:
    b, t, h, heads = sizes
    if block < 1:
        raise ValueError(f"block={block}: expected 1 or more tokens")
    if chosen.ndim != 4 or chosen.shape[0] != b or chosen.shape[1] not in (h, heads):
        raise ValueError(
            f"chosen has shape {chosen.shape}: expected [B={b}, H={h} or K={heads},N,n]"
        )
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"chosen is {chosen.dtype}: expected integers")
    if not 0 < chosen.shape[2] <= t:
        raise ValueError(f"chosen has N={chosen.shape[2]}: expected from 1 to T={t}")
