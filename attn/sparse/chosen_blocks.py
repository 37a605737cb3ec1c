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
from attn.exact.attend import kernel_options
from attn.exact.chunked import check_given
from attn.exact.dense import weights
from attn.exact.logits import LogitSpec, Where
from pallas_kernels.blocks import api as kernels


def gather(a: jax.Array, chosen: jax.Array, block: int) -> jax.Array:
    """The chosen blocks of a [B,S,K,X]: chosen [B,H,N,n] int32 -> [B,H,N,n,block,X].

    Query head h reads key head h // (H/K). What -1 names is some block: mask it.
    """
    b, s, heads, width = a.shape
    # [B,S,K,X] -> [B,K,M,block,X], of M blocks
    a = jnp.pad(a, ((0, 0), (0, -s % block), (0, 0), (0, 0)))
    a = a.reshape(b, -1, block, heads, width).transpose(0, 3, 1, 2, 4)
    grouped = jnp.maximum(chosen, 0).reshape(b, heads, -1)
    # one index a block: an index for each element would be larger than the blocks
    taken = jax.vmap(jax.vmap(lambda blocks, at: blocks[at]))(a, grouped)
    return taken.reshape(*chosen.shape, block, width)


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
    spec: LogitSpec = LogitSpec(),
    where: Where = Where(),
    *,
    block: int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to chosen blocks -> o [B,T,H,V] and lse [B,H,T] float32.

    q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]; chosen [B,H|K,N,n] int32: the key blocks of
    `block` tokens for each of N blocks of ceil(T/N) queries, -1 for none. A block that
    is chosen twice counts twice: `distinct` comes first. The mask acts inside blocks;
    positions are 0, 1, ... by default, of queries too. A query that sees nothing gives
    o = 0 and lse = -inf. implementation: "xla", "pallas" or None for the best; see
    `attn.contract.dispatch.pick`. NotImplementedError for a softcap or a score.
    """
    check(q, k, v)
    _check(chosen, (*q.shape[:3], k.shape[2]), k.shape[1], block)
    check_given(q, k, where, None, None, None)
    for name in ("softcap", "score"):
        if (value := getattr(spec, name)) is not None:
            raise NotImplementedError(
                f"{name}={value}: chosen blocks have logits without one"
            )

    def kernel(backend: str) -> Callable:
        told = kernel_options(spec, where)
        told = {n: a for n, a in told.items() if n not in ("softcap", "score")}
        return lambda: kernels.blocks(
            q, k, v, chosen, block=block, backend=backend, interpret=interpreted(),
            **told,
        )

    return pick(
        implementation, xla=lambda: _gathered(q, k, v, chosen, spec, where, block),
        tpu=kernel("tpu"), gpu=kernel("triton"),
    )


def _gathered(q, k, v, chosen, spec: LogitSpec, where: Where, block: int):
    """The XLA form: chosen blocks are gathered, once."""
    (b, t, h, d), n = q.shape, chosen.shape[2]
    chosen = jnp.repeat(chosen, h // chosen.shape[1], 1)  # [B,H,N,n]
    queries = _rows(q, n)  # [B,N,T/N,H,D]
    # [B,H,N,n,block,.] -> [B,H,N,J,.], the J = n * block keys of each query block
    keys, vals = (gather(a, chosen, block) for a in (k, v))
    keys, vals = (a.reshape(b, h, n, -1, a.shape[-1]) for a in (keys, vals))
    # [B,N,I,H,D] x [B,H,N,J,D] -> [B,H,N,I,J]
    logits = jnp.einsum(
        "bnihd,bhnjd->bhnij", queries, keys, preferred_element_type=jnp.float32
    ) * (d**-0.5 if spec.scale is None else spec.scale)
    seen = _seen(chosen, spec, where, (b, t, k.shape[1], h), block)
    p = weights(logits, seen)
    # [B,H,N,I,J] x [B,H,N,J,V] -> [B,N,I,H,V]
    o = jnp.einsum("bhnij,bhnjv->bnihv", p.astype(v.dtype), vals,
                   preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, -1, where=seen).reshape(b, h, -1)[..., :t]
    return o.reshape(b, -1, h, v.shape[3])[:, :t].astype(v.dtype), lse


def _rows(a, n: int) -> jax.Array:
    """[B,T,...] -> [B,n,T/n,...], filled up behind."""
    b, t = a.shape[:2]
    size = -(-t // n)
    a = jnp.pad(a, [(0, 0), (0, n * size - t)] + [(0, 0)] * (a.ndim - 2))
    return a.reshape(b, n, size, *a.shape[2:])


def _seen(chosen, spec: LogitSpec, where: Where, sizes: tuple, block: int) -> jax.Array:
    """Which of the gathered keys [B,H,N,I,J] a query sees."""
    (b, t, s, h), n = sizes, chosen.shape[2]

    def rows(a):
        return _rows(jnp.broadcast_to(a, (b, t)), n)[:, None, :, :, None]  # [B,1,N,I,1]

    def taken(a):
        a = jnp.broadcast_to(a, (b, s))[..., None, None]
        # the chosen blocks of one row: [B,1,H N n,1] -> [B,H,N,1,J]
        return gather(a, chosen.reshape(b, 1, -1, 1), block).reshape(b, h, n, 1, -1)

    q_pos, kv_pos = where.q_pos, where.kv_pos
    q_pos = jnp.arange(t, dtype=jnp.int32)[None] if q_pos is None else q_pos
    kv_pos = jnp.arange(s, dtype=jnp.int32)[None] if kv_pos is None else kv_pos
    heads = jnp.arange(h, dtype=jnp.int32) if where.head is None else where.head
    j = taken(kv_pos)
    seen = spec.mask(heads[None, :, None, None, None], rows(q_pos), j) & (j >= 0)
    seen = seen & jnp.repeat(chosen >= 0, block, -1)[:, :, :, None]
    seen = seen & taken(jnp.ones((1, s), bool))  # no key beyond S
    if where.q_segment is not None:
        segment = taken(where.kv_segment)
        seen = seen & (rows(where.q_segment) == segment) & (segment > 0)
    return seen


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
