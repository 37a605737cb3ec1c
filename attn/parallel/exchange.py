"""Exchange: how the queries of one shard meet the keys of the others.

Tokens are split over a mesh axis, and exact attention needs every key for every query.
There are four ways, which give the same numbers:

- "gather": every shard gathers all keys and values (LASP-2H, Sun et al., 2025,
  arXiv:2502.07563). One collective, memory of the whole S.
- "ring": keys and values travel from shard to shard (`attn/parallel/ring.py`). Memory
  of two pieces a direction, transfers hidden behind computing; of a window only
  neighbours' keys travel. Causal work is uneven.
- "zigzag": a ring whose causal work is even (`attn/parallel/zigzag.py`), for two
  exchanges more.
- "swap": heads for tokens (DeepSpeed-Ulysses, Jacobs et al., 2023, arXiv:2309.14509):
  every shard gets all tokens of its part of the heads. It needs as many heads as
  shards; of fewer key heads each is sent to those that read it.

Over two mesh axes at once (USP, Fang & Zhao, 2024, arXiv:2405.07719), heads are swapped
over the last and the other is gathered or a ring.
"""

from __future__ import annotations

from typing import Any, Callable

import jax

from attn.parallel.ring import ring
from attn.parallel.sharding import Axis, gather, names_of

EXCHANGES = ("gather", "ring", "zigzag", "swap")


def split_axis(axis: Axis, exchange: str) -> tuple[str | None, Axis | None]:
    """The mesh axis over which keys are gathered or travel, and the one over which
    heads are swapped."""
    if exchange == "swap":
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
    attend: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: Axis,
    exchange: str,
    head: Any,
    q_pos: Any,
    kv_pos: Any,
    q_run: Any,
    kv_run: Any,
    counted: bool,
    sink: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """o [B,T,H,V] of a shard's queries with the keys of all, inside `shard_map`.

    Arguments of `attn.exact.attend`, which `attend` is, for this shard. counted:
    positions are 0, 1, 2, ... over the shards, there are no runs, and T = S.
    """
    along, swapped = split_axis(axis, exchange)
    if swapped is not None:
        q, k, v = (_to_tokens(a, swapped) for a in (q, k, v))
        q_pos, kv_pos, q_run, kv_run = (
            gather(a, swapped) for a in (q_pos, kv_pos, q_run, kv_run)
        )
        mine = jax.lax.axis_index(swapped) * q.shape[2]
        head, sink = (
            a if a is None else jax.lax.dynamic_slice_in_dim(a, mine, q.shape[2])
            for a in (head, sink)
        )
    where: dict[str, Any] = {
        "q_pos": q_pos, "kv_pos": kv_pos, "q_run": q_run, "kv_run": kv_run
    }
    told = {"head": head, "sink": sink, **options}
    if along is None:
        o, _ = attend(q, k, v, **({} if counted else where), **told)
    elif exchange == "gather":
        for name in ("kv_pos", "kv_run"):
            where[name] = gather(where[name], along)
        o, _ = attend(q, gather(k, along), gather(v, along), **where, **told)
    else:
        o, _ = ring(
            attend, q, k, v, axis=along, counted=counted,
            balanced=exchange == "zigzag", **where, **told,
        )
    return o if swapped is None else _to_heads(o, swapped)


def _to_tokens(a: jax.Array, axis: Axis) -> jax.Array:
    """[B,T/P,H,D] -> [B,T,H/P,D]."""
    return jax.lax.all_to_all(a, axis, split_axis=2, concat_axis=1, tiled=True)


def _to_heads(a: jax.Array, axis: Axis) -> jax.Array:
    """[B,T,H/P,D] -> [B,T/P,H,D]."""
    return jax.lax.all_to_all(a, axis, split_axis=1, concat_axis=2, tiled=True)
