"""Exchange: how the queries of one shard meet the keys of the others.

Tokens are split over a mesh axis, and exact attention needs every key for every query.
There are four ways, which give the same numbers:

- "all_gather", or "gather": every shard gathers all keys and values (LASP-2H, Sun et
  al., 2025, arXiv:2502.07563). One collective, memory of the whole S.
- "ring": keys and values travel from shard to shard (`attn/parallel/ring.py`). Memory
  of two pieces a direction, transfers hidden behind computing; of a window only
  neighbours' keys travel. Causal work is uneven.
- "zigzag": a ring whose causal work is even (`attn/parallel/zigzag.py`), for two
  exchanges more.
- "ulysses", or "swap": heads for tokens (DeepSpeed-Ulysses, Jacobs et al., 2023,
  arXiv:2309.14509): every shard gets all tokens of its part of the heads. It needs as
  many heads as shards; of fewer key heads each is sent to those that read it.

Over two mesh axes at once (USP, Fang & Zhao, 2024, arXiv:2405.07719), heads are swapped
over the last and the other is gathered or a ring.
"""

from __future__ import annotations

import dataclasses

import jax

from attn.exact.attend import attend
from attn.parallel.ring import ring
from attn.parallel.sharding import Axis, gather, names_of
from pallas_kernels.logits import LogitSpec, Where

GATHER, SWAP = ("gather", "all_gather"), ("swap", "ulysses")  # two words for one thing
EXCHANGES = (*GATHER, "ring", "zigzag", *SWAP)


def split_axis(axis: Axis, exchange: str) -> tuple[str | None, Axis | None]:
    """The mesh axis over which keys are gathered or travel, and the one over which
    heads are swapped."""
    if exchange in SWAP:
        return None, axis
    names = names_of(axis)
    if len(names) == 1:
        return names[0], None
    if len(names) == 2:
        return names[0], names[1]
    raise ValueError(
        f"axis={axis!r} with exchange={exchange!r}: expected one mesh axis, or two, of "
        "which heads are swapped over the last"
    )


def exchanged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: LogitSpec,
    where: Where,
    *,
    axis: Axis,
    exchange: str,
    counted: bool,
    bias: jax.Array | None = None,
    sink: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o [B,T,H,V] of a shard's queries with the keys of all, inside `shard_map`.

    Arguments of `attn.exact.attend` for this shard. counted: positions are 0, 1, 2, ...
    over the shards, there are no segments, and T = S.
    """
    along, swapped = split_axis(axis, exchange)
    # heads first: [B,T/P,H,D] -> [B,T/P_along,H/P_swapped,D]
    if swapped is not None:
        q, k, v = (_to_tokens(a, swapped) for a in (q, k, v))
        where, sink = _of_heads(where, sink, swapped, q.shape[2])
    if along is None:
        # all tokens are here; if they count, nothing has to be said of them
        where = Where(head=where.head) if counted else where
        o, _ = attend(
            q, k, v, spec, where, bias=bias, sink=sink, implementation=implementation
        )
    elif exchange in GATHER:
        # [B,S/P,...] -> [B,S,...]: keys come, and where they stand
        everywhere = dataclasses.replace(
            where, kv_pos=gather(where.kv_pos, along),
            kv_segment=gather(where.kv_segment, along),
        )
        o, _ = attend(
            q, gather(k, along), gather(v, along), spec, everywhere, bias=bias,
            sink=sink, implementation=implementation,
        )
    else:
        o, _ = ring(
            q, k, v, spec, where, axis=along, sink=sink, counted=counted,
            balanced=exchange == "zigzag", implementation=implementation,
        )
    # [B,T/P_along,H/P_swapped,V] -> [B,T/P,H,V]
    return o if swapped is None else _to_heads(o, swapped)


def _of_heads(where: Where, sink, axis: Axis, heads: int):
    """`where` of all tokens of the shards along `axis`, and of this one's `heads`, with
    their sinks."""
    # all-to-all hands heads out in order: shard n gets the n-th part of them
    first = jax.lax.axis_index(axis) * heads
    head, sink = (
        a if a is None else jax.lax.dynamic_slice_in_dim(a, first, heads)
        for a in (where.head, sink)
    )
    q_pos, kv_pos, q_segment, kv_segment = (
        gather(a, axis)
        for a in (where.q_pos, where.kv_pos, where.q_segment, where.kv_segment)
    )
    return Where(q_pos, kv_pos, q_segment, kv_segment, head), sink


def _to_tokens(a: jax.Array, axis: Axis) -> jax.Array:
    """[B,T/P,H,D] -> [B,T,H/P,D]."""
    # each shard sends the n-th part of its heads to shard n, and gets its own of all
    return jax.lax.all_to_all(a, axis, split_axis=2, concat_axis=1, tiled=True)


def _to_heads(a: jax.Array, axis: Axis) -> jax.Array:
    """[B,T,H/P,D] -> [B,T/P,H,D]."""
    return jax.lax.all_to_all(a, axis, split_axis=1, concat_axis=2, tiled=True)
