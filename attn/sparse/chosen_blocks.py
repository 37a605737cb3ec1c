"""Blocks: attention to chosen blocks of keys, the mechanism of sparse attention.

Keys are cut into blocks, queries into as many blocks as `chosen` has rows, and each
query block of each head attends exactly to the key blocks that were chosen for it. What
to choose is the idea of a method; gathering it, masking inside and the softmax are
here. Time and memory grow with the number of blocks chosen, not with S.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted, pick
from attn.contract.shapes import check
from attn.exact.dense import weights
from attn.masks import Full, Mask
from pallas_kernels.blocks import api as kernels


def gather(a: jax.Array, chosen: jax.Array, block: int) -> jax.Array:
    """The chosen blocks of a [B,S,K,X]: chosen [B,H,N,n] int32 -> [B,H,N,n,block,X].

    Query head h reads key head h // (H/K). What -1 names is some block: mask it.
    """
    b, s, heads, width = a.shape
    a = jnp.pad(a, ((0, 0), (0, -s % block), (0, 0), (0, 0)))
    a = a.reshape(b, -1, block, heads, width).transpose(0, 3, 1, 2, 4)
    grouped = jnp.maximum(chosen, 0).reshape(b, heads, -1)
    # one index a block: an index for each element would be larger than the blocks
    taken = jax.vmap(jax.vmap(lambda blocks, at: blocks[at]))(a, grouped)
    return taken.reshape(*chosen.shape, block, width)


def distinct(chosen: jax.Array) -> jax.Array:
    """chosen [...,n] sorted, with every block once; -1 for the others, in front."""
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
    mask: Mask = Full(),
    *,
    block: int,
    head: jax.Array | None = None,
    q_pos: jax.Array | None = None,
    kv_pos: jax.Array | None = None,
    q_run: jax.Array | None = None,
    kv_run: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to chosen blocks -> o [B,T,H,V] and lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; chosen [B,H|K,N,n] int32: the key blocks of
    `block` tokens for each of N blocks of ceil(T/N) queries, -1 for none. A block that
    is chosen twice counts twice: `distinct` comes first. The mask acts inside blocks;
    positions (0, 1, ... by default) and runs are those of `dense.allowed`. A
    query that sees nothing gives o = 0 and lse = -inf. implementation: "xla", "pallas"
    or None for the best; see `attn.contract.dispatch.pick`.
    """
    check(q, k, v)
    _check(chosen, (*q.shape[:3], k.shape[2]), k.shape[1], block)
    options: dict[str, Any] = {"block": block, "head": head, "q_pos": q_pos,
                               "kv_pos": kv_pos, "q_run": q_run, "kv_run": kv_run,
                               "scale": scale}
    kernel = lambda backend: lambda: kernels.blocks(
        q, k, v, chosen, mask=mask, backend=backend, interpret=interpreted(), **options
    )
    return pick(
        implementation, xla=lambda: _gathered(q, k, v, chosen, mask, **options),
        tpu=kernel("tpu"), gpu=kernel("triton"),
    )


def _gathered(q, k, v, chosen, mask, *, block, head, q_pos, kv_pos, q_run, kv_run,
              scale):
    """The XLA form: chosen blocks are gathered, once."""
    (b, t, h, d), s = q.shape, k.shape[1]
    chosen = jnp.repeat(chosen, h // chosen.shape[1], 1)
    n = chosen.shape[2]
    size = -(-t // n)
    count = lambda m: jnp.arange(m, dtype=jnp.int32)[None]
    q_pos, kv_pos = (
        jnp.broadcast_to(count(m) if a is None else a, (b, m))
        for a, m in ((q_pos, t), (kv_pos, s))
    )
    fill = lambda a: jnp.pad(a, [(0, 0), (0, n * size - t)] + [(0, 0)] * (a.ndim - 2))
    queries = fill(q).reshape(b, n, size, h, d)
    rows = lambda a: fill(a).reshape(b, 1, n, size, 1)
    taken = lambda a: gather(
        jnp.broadcast_to(a[..., None, None], (b, s, 1, 1)), chosen.reshape(b, 1, -1, 1),
        block,
    ).reshape(b, h, n, 1, -1)
    heads = jnp.arange(h, dtype=jnp.int32) if head is None else head
    j = taken(kv_pos)
    seen = mask(heads[None, :, None, None, None], rows(q_pos), j) & (j >= 0)
    real = jnp.repeat(chosen >= 0, block, -1)[:, :, :, None]
    inside = taken(count(s) * jnp.ones((b, 1), jnp.int32) + 1) > 0  # no key beyond S
    seen = seen & real & inside
    if q_run is not None:
        runs = taken(kv_run)
        seen = seen & (rows(q_run) == runs) & (runs > 0)
    keys, vals = (gather(a, chosen, block) for a in (k, v))
    keys, vals = (a.reshape(b, h, n, -1, a.shape[-1]) for a in (keys, vals))
    logits = jnp.einsum(
        "bnihd,bhnjd->bhnij", queries, keys, preferred_element_type=jnp.float32
    ) * (d**-0.5 if scale is None else scale)
    p = weights(logits, seen)
    o = jnp.einsum("bhnij,bhnjv->bnihv", p.astype(v.dtype), vals,
                   preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, -1, where=seen).reshape(b, h, -1)[..., :t]
    return o.reshape(b, n * size, h, -1)[:, :t].astype(v.dtype), lse


def _check(chosen, sizes: tuple, s: int, block: int) -> None:
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
