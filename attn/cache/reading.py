"""Reading: what a few queries find in a cache, by the best implementation here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attn.cache.kv import Cache
from attn.contract.dispatch import interpreted, pick
from attn.contract.segments import TokenPositions
from attn.exact import chunked, dense
from pallas_kernels.decode.api import decode
from pallas_kernels.logits import LogitSpec, Where


def read(
    cache: Cache, kv_segment: jax.Array, q: jax.Array, now: TokenPositions,
    spec: LogitSpec, *, head: jax.Array | None = None, sink: jax.Array | None = None,
    split_lse: bool = False, implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """What a few queries q [B,T,H,D] at `now` find in a cache whose slots have segment
    indices kv_segment [B,C] -> o [B,T,H,V], lse [B,H,T]. head, sink, split_lse: see
    `attend`."""
    where = Where(now.pos, cache.pos, now.segment, kv_segment, head)

    def kernel(backend):
        return decode(
            q, cache.k, cache.v, spec, where, sink=sink, split_lse=split_lse,
            backend=backend, interpret=interpreted(),
        )

    tpu, gpu = (functools.partial(kernel, name) for name in ("tpu", "triton"))
    form = dense if dense.few(q.shape[1] * q.shape[2], q.dtype) else chunked
    xla = functools.partial(
        form.attend, q, cache.k, cache.v, spec, where, sink=sink, split_lse=split_lse
    )
    return pick(implementation, xla=xla, tpu=tpu, gpu=gpu)


def of_slots(by_position: jax.Array, cache: Cache, heads: int) -> jax.Array:
    """Numbers of positions [B|1,H|1,P] at the slots of a cache, [B,H,1,C] as a bias of
    H = `heads` query heads; 0 for empty slots and positions behind the last."""
    b, c, own = cache.pos.shape
    size = by_position.shape[2]
    pos = jnp.repeat(cache.pos, heads // own, 2).swapaxes(1, 2)  # [B,H,C]
    wide = jnp.broadcast_to(by_position, (b, heads, size))
    found = jnp.take_along_axis(wide, jnp.clip(pos, 0, size - 1), 2)
    return jnp.where((pos >= 0) & (pos < size), found, 0)[:, :, None]
